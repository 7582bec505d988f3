"""Which states an optimizer keeps for a parameter, told before its first step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

# DeepSpeed's own optimizers (deepspeed/ops/*): states that have the parameter's shape.
_DEEPSPEED = {
    "FusedAdam": ("exp_avg", "exp_avg_sq"),
    "DeepSpeedCPUAdam": ("exp_avg", "exp_avg_sq"),
    "FusedLion": ("exp_avg",),
    "DeepSpeedCPULion": ("exp_avg",),
    "DeepSpeedCPUAdagrad": ("exp_avg_sq",),
    "FusedLamb": ("exp_avg", "exp_avg_sq"),
}


def expected_states(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> frozenset[str] | None:
    """Names of the param-shaped states that this optimizer keeps under this group's options; None if unknown.

    torch's own optimizers are asked: a twin of the same class and options takes one step on a single element.
    """
    kind = type(optimizer)
    if kind.__name__ in _DEEPSPEED:
        return frozenset(_DEEPSPEED[kind.__name__])
    if kind.__name__ == "MuonWithAuxAdam":
        return frozenset(("momentum_buffer",) if group.get("use_muon") else ("exp_avg", "exp_avg_sq"))
    if kind.__module__.startswith("torch.optim"):
        return _of_twin(kind, group)
    return None


def _of_twin(kind: type[torch.optim.Optimizer], group: Mapping[str, Any]) -> frozenset[str]:
    accepted = inspect.signature(kind.__init__).parameters
    options = {k: v for k, v in group.items() if k in accepted and k not in ("params", "fused", "capturable")}
    probe = torch.zeros(2, 2, requires_grad=True)
    with torch.enable_grad():
        twin = kind([probe], **options)
        probe.grad = torch.ones_like(probe)
        twin.step()
    state = twin.state.get(probe, {})
    return frozenset(k for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == probe.shape)
