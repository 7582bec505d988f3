"""The random number generators of one rank: torch's, the device's, numpy's, Python's, and DeepSpeed's trackers.

They belong to ranks, not to parameters: they come back where as many ranks resume as saved, each on its own rank, and
stay as the program seeded them otherwise, since a stream cannot be divided among another number of ranks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def capture(engine: Any) -> dict[str, Any]:
    """The present states, as plain values and numpy arrays."""
    version, words, gauss = random.getstate()
    found: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().copy(),
        "numpy": np.random.get_state(legacy=True),
        "python": (version, np.array(words, np.uint32), gauss),
    }
    if engine.device.type != "cpu":
        from deepspeed.accelerator import get_accelerator

        found["device"] = get_accelerator().get_rng_state().cpu().numpy().copy()
    trackers = {name: state.cpu().numpy().copy() for name, state in _tracker().get_states().items()}
    return {**found, "trackers": trackers} if trackers else found


def restore(engine: Any, found: Mapping[str, Any]) -> None:
    """Set what `capture` returned on the same rank of a run with as many ranks."""
    torch.set_rng_state(torch.from_numpy(np.array(found["torch"], np.uint8)))
    np.random.set_state(tuple(found["numpy"]))
    version, words, gauss = found["python"]
    random.setstate((version, tuple(int(word) for word in words), gauss))
    if "device" in found and engine.device.type != "cpu":
        from deepspeed.accelerator import get_accelerator

        get_accelerator().set_rng_state(torch.from_numpy(np.array(found["device"], np.uint8)))
    if "trackers" in found:
        _tracker().set_states({k: torch.from_numpy(np.array(v, np.uint8)) for k, v in found["trackers"].items()})


def _tracker() -> Any:
    """Model parallelism's named generators (``runtime/activation_checkpointing/checkpointing.py``)."""
    from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker

    return get_cuda_rng_tracker()
