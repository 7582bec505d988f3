"""What a checkpoint with experts reads as, beside what the engines held."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import ucp


def check_read(checkpoint: ucp.Checkpoint, truth: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """The checkpoint has the truth's parameters and states, no others, each equal to the bit."""
    held = {name for name, info in checkpoint.parameters.items() if info.kind == "parameter"}
    assert held == truth.keys()
    for name, states in truth.items():
        assert checkpoint.parameters[name].states.keys() == states.keys()
        for state, value in states.items():
            assert torch.equal(checkpoint.read(name, state), value), (name, state)
