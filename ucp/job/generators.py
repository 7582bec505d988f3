"""The random number generators of one rank: torch's, the CUDA device's, numpy's and Python's.

They belong to ranks, not to parameters. If as many ranks resume as saved, each rank's generators are restored.
Otherwise they stay as the program seeded them, since a stream cannot be divided among another number of ranks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """The current states, as plain values and numpy arrays. The device's is included if CUDA is in use."""
    version, words, gauss = random.getstate()
    found: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().copy(),
        "numpy": np.random.get_state(legacy=True),
        "python": (version, np.array(words, np.uint32), gauss),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["device"] = torch.cuda.get_rng_state().cpu().numpy().copy()
    return found


def restore(found: Mapping[str, Any]) -> None:
    """Set what `capture` returned on the same rank of a run with the same number of ranks."""
    torch.set_rng_state(torch.from_numpy(np.array(found["torch"], np.uint8)))
    np.random.set_state(tuple(found["numpy"]))
    version, words, gauss = found["python"]
    random.setstate((version, tuple(int(word) for word in words), gauss))
    if "device" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(np.array(found["device"], np.uint8)))
