"""The random number generators of one rank under DeepSpeed.

These are the generators of any rank (`ucp.job.generators`), its accelerator's, and its trackers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ucp.deepspeed.live import releases
from ucp.job import generators


def capture(engine: Any) -> dict[str, Any]:
    """The current states, as plain values and numpy arrays."""
    found = generators.capture()
    if engine.device.type != "cpu":
        found["device"] = releases.accelerator().get_rng_state().cpu().numpy().copy()
    trackers = {name: state.cpu().numpy().copy() for name, state in _tracker().get_states().items()}
    return {**found, "trackers": trackers} if trackers else found


def restore(engine: Any, found: Mapping[str, Any]) -> None:
    """Set what `capture` returned on the same rank of a run with the same number of ranks."""
    generators.restore(found)
    if "device" in found and engine.device.type != "cpu":
        releases.accelerator().set_rng_state(torch.from_numpy(np.array(found["device"], np.uint8)))
    if "trackers" in found:
        _tracker().set_states({k: torch.from_numpy(np.array(v, np.uint8)) for k, v in found["trackers"].items()})


def _tracker() -> Any:
    """Model parallelism's named generators (``runtime/activation_checkpointing/checkpointing.py``)."""
    return releases.GENERATORS.load().get_cuda_rng_tracker()
