"""Model and torch optimizers by parameter name, and the states of optimizers that have not stepped yet.

torch makes those by a step with zero gradients and no learning rate (``_init_optim_state`` of
torch/distributed/checkpoint/state_dict.py), which takes longer than reading them does. Here torch's own optimizers take
that step on stand-ins of a few elements, and what they keep for these tells what they will keep for the parameters.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict as api
from torch.distributed.tensor import DTensor

from ucp.formats.shared.roles import MODEL, PARAM
from ucp.loading.name_match import bare
from ucp.torchdist.dtensors import local_tensor

OPTIMIZER = "optim"
"""The optimizers' entry in the state dict of a training state."""

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
# The states of optimizers that had none, made so that they can be asked for and filled.
Made = dict[torch.optim.Optimizer, dict[Any, Any]]

_LENGTHS = (3, 5, 7, 11, 13, 17, 19, 23)  # of a stand-in's dimensions; none is another's


def listed(optimizer: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    return (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else tuple(optimizer)


def state_dict_of(model: torch.nn.Module, optimizer: Optimizers, *, blank: bool = False) -> tuple[dict[str, Any], Made]:
    """Model and optimizer by parameter name; of an optimizer that has not stepped, the states that it will have. It has
    none itself afterwards: they are the second result.

    blank: tensors of such states may have been allocated only, their elements being anything.
    """
    out: dict[str, Any] = {MODEL: api.get_model_state_dict(model)}
    made: Made = {}
    if listed(optimizer):
        with _untouched(optimizer, made, blank):
            out[OPTIMIZER] = api.get_optimizer_state_dict(model, listed(optimizer))
    return out, made


@contextmanager
def _untouched(optimizer: Optimizers, made: Made, blank: bool) -> Iterator[None]:
    """Leave optimizers that have not stepped as they are, though torch asks them for their states by a step, which
    counts, and asks for none where there are gradients. ``made`` gets these states."""
    fresh = [o for o in listed(optimizer) if not o.state]
    gradients = {p: p.grad for o in fresh for group in o.param_groups for p in group["params"]}
    for param in gradients:
        param.grad = None
    try:
        for o in fresh:
            if blank:
                o.state.update(blank_states(o) or {})  # and then torch does not make them
        yield
    finally:
        for param, gradient in gradients.items():
            param.grad = gradient
        for o in fresh:
            made[o] = dict(o.state)
            o.state.clear()


def names_without_states(state_dict: Mapping[str, Any], optimizer: Optimizers) -> list[str]:
    """The names of the parameters of optimizers that have no states yet."""
    out: list[str] = []
    at = 0
    for o in listed(optimizer):
        groups = state_dict[OPTIMIZER]["param_groups"][at : at + len(o.param_groups)]
        at += len(o.param_groups)
        if not o.state:
            out += [name for group in groups for name in group["params"]]
    return out


def tensors_now(
    model: torch.nn.Module, optimizer: Optimizers, state_dict: Mapping[str, Any]
) -> dict[tuple[str, str], Any]:
    """What model and optimizers have themselves: (name, 'param' or state) -> tensor or value. state_dict: of
    `state_dict_of`, for the names of the optimizers' parameters."""
    out: dict[tuple[str, str], Any] = {}
    for name, tensor in (
        *model.named_buffers(remove_duplicate=False),
        *model.named_parameters(remove_duplicate=False),
    ):
        out[bare(name), PARAM] = tensor
    at = 0
    for o in listed(optimizer):
        groups = state_dict[OPTIMIZER]["param_groups"][at : at + len(o.param_groups)]
        at += len(o.param_groups)
        for named, group in zip(groups, o.param_groups, strict=True):
            for name, param in zip(named["params"], group["params"], strict=True):
                out.update({(name, state): value for state, value in o.state.get(param, {}).items()})
    return out


def set_states(model: torch.nn.Module, optimizer: Optimizers, state_dict: dict[str, Any], made: Made | None) -> None:
    """Give the optimizers what was loaded. made: of `state_dict_of`; None where those are to have no states."""
    gradients = {p: p.grad for o in listed(optimizer) for group in o.param_groups for p in group["params"]}
    for param in gradients:
        param.grad = None
    for o, states in (made or {}).items():
        o.state.update(states)  # or torch makes them once more
    api.set_optimizer_state_dict(model, listed(optimizer), state_dict)
    for param, gradient in gradients.items():
        param.grad = gradient
    for o in listed(optimizer):
        if made is None:
            o.state.clear()


# --- without a step --------------------------------------------------------------------------------------------------


def blank_states(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, dict[str, Any]] | None:
    """The states that one of torch's own optimizers will have after its first step, tensors like their parameter
    allocated only. None where stand-ins do not tell. The optimizer and its parameters stay as they are."""
    if not type(optimizer).__module__.startswith("torch.optim."):
        return None  # others may keep for large parameters what they do not keep for small ones
    shadow = copy.copy(optimizer)
    shadow.state = defaultdict(dict)
    shadow._optimizer_step_pre_hooks = OrderedDict()
    shadow._optimizer_step_post_hooks = OrderedDict()
    standins = {p: _standin(p) for group in optimizer.param_groups for p in group["params"]}
    shadow.param_groups = [_standing_in(group, standins) for group in optimizer.param_groups]
    try:
        type(optimizer).step(shadow)
        return {p: _grown(p, shadow.state[s]) for p, s in standins.items() if s in shadow.state}
    except Exception:  # noqa: BLE001 - torch's own way says what is wrong
        return None


def _standin(param: torch.Tensor) -> torch.Tensor:
    shape = _LENGTHS[: param.ndim]
    out = torch.zeros(shape, dtype=param.dtype, device=local_tensor(param).device, requires_grad=param.requires_grad)
    if param.requires_grad:
        out.grad = torch.zeros_like(out)
    return out


def _standing_in(group: Mapping[str, Any], standins: Mapping[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    out = {**group, "params": [standins[p] for p in group["params"]]}
    if "lr" in out:
        out["lr"] = torch.zeros_like(out["lr"]) if isinstance(out["lr"], torch.Tensor) else 0.0
    return out


def _grown(param: torch.Tensor, states: Mapping[str, Any]) -> dict[str, Any]:
    """The parameter's states, by its stand-in's. Raises ValueError where those do not tell."""
    shape = _LENGTHS[: param.ndim]
    if param.ndim > len(_LENGTHS) or (not shape and isinstance(param, DTensor)):
        raise ValueError(f"{param.ndim} dimensions")
    out: dict[str, Any] = {}
    for key, value in states.items():
        if not isinstance(value, torch.Tensor):
            if not isinstance(value, (bool, int, float, str, type(None))):
                raise ValueError(key)
            out[key] = value
        elif tuple(value.shape) == shape and shape:
            out[key] = torch.empty_like(param.detach(), dtype=value.dtype)
        elif value.numel() == 1:
            out[key] = value.detach().clone()
        else:
            raise ValueError(key)
    return out
