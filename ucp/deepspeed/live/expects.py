"""Which states an optimizer will keep for a parameter, known before its first step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ucp.loading.target import Group
from ucp.printable import logger

log = logger(__name__)

# DeepSpeed's own optimizers (deepspeed/ops/*): states that have the parameter's shape.
_DEEPSPEED = {
    "FusedAdam": ("exp_avg", "exp_avg_sq"),
    "DeepSpeedCPUAdam": ("exp_avg", "exp_avg_sq"),
    "FusedLion": ("exp_avg",),
    "DeepSpeedCPULion": ("exp_avg", "exp_avg_sq"),  # the second is zero: its update never reads it
    "DeepSpeedCPUAdagrad": ("exp_avg_sq",),
    "FusedLamb": ("exp_avg", "exp_avg_sq"),
}


@dataclass(frozen=True)
class Expected:
    """What an optimizer keeps for a parameter: names of tensors of its shape, of single values, and of tensors of other
    shapes. None if unknown."""

    tensors: frozenset[str] | None
    values: frozenset[str] | None
    apart: frozenset[str] | None = frozenset()


def of_few_elements(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape that an optimizer treats as this one: axes of one element stay such, others are short and all differ."""
    return tuple(1 if size == 1 else k + 2 for k, size in enumerate(shape))


def expected(
    optimizer: torch.optim.Optimizer, options: Mapping[str, Any], shape: tuple[int, ...] | None = None
) -> Expected:
    """What this optimizer keeps for the parameters of a group with these options; shape: for those of this shape.

    torch's own optimizers are tried out: a twin of the same class and options takes one step on a few elements.
    """
    kind = type(optimizer)
    if kind.__name__ in _DEEPSPEED:
        return Expected(frozenset(_DEEPSPEED[kind.__name__]), frozenset(("step",)))
    if kind.__name__ == "MuonWithAuxAdam":
        if options.get("use_muon"):
            return Expected(frozenset(("momentum_buffer",)), frozenset())
        return Expected(frozenset(("exp_avg", "exp_avg_sq")), frozenset(("step",)))
    if kind.__module__.startswith("torch.optim"):
        return _of_twin(kind, options, shape)
    return Expected(None, None, None)


def live_group(names: Sequence[str], optimizer: torch.optim.Optimizer, options: Mapping[str, Any]) -> Group:
    """A param group of a target.

    An optimizer that is not known here may add hyperparameters to its group in its first step (a step count, an
    estimate). So it takes all that the checkpoint has, as torch's own ``load_state_dict`` does.
    """
    keeps = expected(optimizer, options)
    if keeps.values is None:
        return Group(tuple(names), options, keeps.tensors, keeps.values, takes=None)
    return Group(tuple(names), options, keeps.tensors, keeps.values)


def _of_twin(kind: type[torch.optim.Optimizer], group: Mapping[str, Any], shape: tuple[int, ...] | None) -> Expected:
    accepted = inspect.signature(kind.__init__).parameters
    options = {k: v for k, v in group.items() if k in accepted and k not in ("params", "fused", "capturable")}
    # Some keep other states for matrices than for the flat buffers of stages 1 to 3 (Adafactor).
    if shape is None:
        shape = (4,) if all(p.dim() < 2 for p in group.get("params", ())) else (2, 3)
    probe = torch.zeros(shape, requires_grad=True)
    try:
        with torch.enable_grad():
            twin = kind([probe], **options)
            probe.grad = torch.ones_like(probe)
            twin.step()
    except (RuntimeError, TypeError, ValueError) as error:  # one for sparse gradients, say
        log.debug("%s does not tell its states beforehand: %s", kind.__name__, error)
        return Expected(None, None, None)
    state = {k: v for k, v in twin.state.get(probe, {}).items() if v is not None}
    tensors = frozenset(k for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == probe.shape)
    apart = frozenset(k for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim()) - tensors
    return Expected(tensors, frozenset(state) - tensors - apart, apart)
