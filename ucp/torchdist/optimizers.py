"""Model and torch optimizers by parameter name, and the states of optimizers that have not stepped yet.

torch makes such states by a step with zero gradients and no learning rate (``_init_optim_state`` of
torch/distributed/checkpoint/state_dict.py), which takes longer than reading them. Here torch's own optimizers take that
step on stand-ins of a few elements. What they keep for these shows what they will keep for the parameters.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict as api

from ucp.errors import Unsupported
from ucp.formats.shared.roles import MODEL, PARAM
from ucp.loading.name_match import bare
from ucp.torchdist.dtensors import is_dtensor, local_tensor
from ucp.torchdist.state_dicts import is_in_parts, parts_of

OPTIMIZER = "optim"
"""The optimizers' entry in the state dict of a training state."""

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
# States made for optimizers that had none, so that they can be asked for and filled.
Made = dict[torch.optim.Optimizer, dict[Any, Any]]

_LENGTHS = (3, 5, 7, 11, 13, 17, 19, 23)  # of a stand-in's dimensions, all different


def listed(optimizer: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    return (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else tuple(optimizer)


def state_dict_of(model: torch.nn.Module, optimizer: Optimizers, *, blank: bool = False) -> tuple[dict[str, Any], Made]:
    """Model and optimizer by parameter name. For an optimizer that has not stepped, these are the states that it will
    have. It still has none itself afterwards: they are the second result.

    blank: tensors of such states may only be allocated, with any elements.

    Raises Unsupported for an optimizer whose states could not be restored: one that steps by a closure (LBFGS), or has
    more in its state_dict() than states and param groups (Ranger21).
    """
    for o in listed(optimizer):
        _check_kind(o)
    out: dict[str, Any] = {MODEL: api.get_model_state_dict(model)}
    made: Made = {}
    if listed(optimizer):
        with _untouched(optimizer, made, blank):
            out[OPTIMIZER] = api.get_optimizer_state_dict(model, listed(optimizer))
        _without_the_step(out[OPTIMIZER], made)
    return out, made


def has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has states. Empty entries, which Schedule-free's ``train()`` makes, do not count."""
    return any(optimizer.state.values())


def _check_kind(optimizer: torch.optim.Optimizer) -> None:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise Unsupported(
            f"{type(optimizer).__name__} is not supported: it steps by a closure, so that its states can neither be "
            "made nor restored by parameter name; leave it out (optimizer=()) and save its own state_dict() in extra"
        )
    if type(optimizer).state_dict is torch.optim.Optimizer.state_dict:
        return
    more = sorted(optimizer.state_dict().keys() - {"state", "param_groups"})
    if more:
        raise Unsupported(
            f"{type(optimizer).__name__} is not supported: its state_dict() keeps '{more[0]}' beside the parameters' "
            "states and the param groups, which no state dict by parameter name has; leave it out (optimizer=()) and "
            "save its own state_dict() in extra"
        )


@contextmanager
def _untouched(optimizer: Optimizers, made: Made, blank: bool) -> Iterator[None]:
    """Keep optimizers that have not stepped as they are. To get their states torch has them take a step, which they
    count, and it does not do so if there are gradients. ``made`` gets these states."""
    fresh = [o for o in listed(optimizer) if not has_stepped(o)]
    gradients = {p: p.grad for o in fresh for group in o.param_groups for p in group["params"]}
    before = {o: (dict(o.state), [_options(group) for group in o.param_groups], _counters(o)) for o in fresh}
    hooks = {o: (o._optimizer_step_pre_hooks, o._optimizer_step_post_hooks) for o in fresh}
    for param in gradients:
        param.grad = None
    try:
        for o in fresh:
            o.state.clear()  # of empty entries: with those torch would think that the states are there
            o._optimizer_step_pre_hooks, o._optimizer_step_post_hooks = (
                OrderedDict(),
                OrderedDict(),
            )  # no step of theirs
            if blank:
                o.state.update(blank_states(o) or {})  # and then torch does not make them
            for group in o.param_groups:
                if group.get("train_mode") is False:
                    group["train_mode"] = True  # Schedule-free steps only in this mode
        yield
    finally:
        for param, gradient in gradients.items():
            param.grad = gradient
        for o in fresh:
            o._optimizer_step_pre_hooks, o._optimizer_step_post_hooks = hooks[o]
            made[o] = dict(o.state)
            states, groups, counters = before[o]
            vars(o).update(counters)
            o.state.clear()
            o.state.update(states)
            for group, options in zip(o.param_groups, groups, strict=True):
                for key in set(group) - set(options) - {"params"}:
                    del group[key]
                group.update(options)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of a group's options, since an optimizer may change them in place."""
    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}


def _counters(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's own progress, which some keep in plain attributes (Ranger21 counts there)."""
    return {k: v for k, v in vars(optimizer).items() if isinstance(v, (bool, int, float, str, type(None)))}


def _groups(states: Mapping[str, Any], optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[tuple[Any, Any, Any]]:
    """(optimizer, its group, that group of the state dict), in order."""
    saved = iter(states["param_groups"])
    for o in optimizers:
        for group in o.param_groups:
            yield o, group, next(saved)


def _without_the_step(states: dict[str, Any], made: Made) -> None:
    """Undo in the state dict what the step that made states has counted in the param groups.

    An option that the optimizer keeps only from its first step on stays, so that it is asked for. A step count is 0.
    """
    for _, live, saved in _groups(states, made):
        for key in set(saved) - {"params"}:
            if key in live:
                saved[key] = copy.deepcopy(live[key])
            elif key == "step":
                saved[key] = 0


def to_save(state_dict: dict[str, Any], optimizer: Optimizers) -> None:
    """Remove what optimizers that have not stepped do not have yet."""
    if not listed(optimizer):
        return
    for name in names_without_states(state_dict, optimizer):
        state_dict[OPTIMIZER]["state"].pop(name, None)
    for o, live, saved in _groups(state_dict[OPTIMIZER], listed(optimizer)):
        if not has_stepped(o):
            for key in set(saved) - set(live) - {"params"}:
                del saved[key]


def names_without_states(state_dict: Mapping[str, Any], optimizer: Optimizers) -> list[str]:
    """The names of the parameters whose optimizers have no states yet."""
    if not listed(optimizer):
        return []
    groups = _groups(state_dict[OPTIMIZER], listed(optimizer))
    return [name for o, _, saved in groups if not has_stepped(o) for name in saved["params"]]


def tensors_now(
    model: torch.nn.Module, optimizer: Optimizers, state_dict: Mapping[str, Any]
) -> dict[tuple[str, str], Any]:
    """What model and optimizers have themselves: (name, 'param' or state) -> tensor or value. state_dict is that of
    `state_dict_of`; the names of the optimizers' parameters are taken from it."""
    out: dict[tuple[str, str], Any] = {}
    for name, tensor in (
        *model.named_buffers(remove_duplicate=False),
        *model.named_parameters(remove_duplicate=False),
    ):
        out[bare(name), PARAM] = tensor
    if not listed(optimizer):
        return out
    for o, live, saved in _groups(state_dict[OPTIMIZER], listed(optimizer)):
        for param, name in _pairs(live, saved):
            out.update({(name, state): value for state, value in o.state.get(param, {}).items()})
    return out


def state_by_flat_name(now: Mapping[tuple[str, str], Any], name: str) -> Any:
    """A state that a state dict has under a flat name of its own, since its shape is not its parameter's, or a part of
    a quantised one (`parts_of`). now: what `tensors_now` gives. None if there is none."""
    owner, _, last = name.rpartition(".")
    owner = owner.removesuffix(".__bnb_optimizer_quant_state__")  # what bitsandbytes puts around its states
    if (owner, last) in now:
        return now[owner, last]
    parameter, _, state = owner.rpartition(".")
    whole = now.get((parameter, state))
    return parts_of(owner, whole).get(last) if isinstance(whole, torch.Tensor) and is_in_parts(whole) else None


def set_states(
    model: torch.nn.Module,
    optimizer: Optimizers,
    state_dict: dict[str, Any],
    made: Made | None,
    unstepped: Collection[str] = (),
    more: Sequence[Collection[str]] = (),
) -> None:
    """Give the optimizers what was loaded.

    made: from `state_dict_of`; None if the optimizers are to have no states. unstepped: names of parameters whose
    states were made here and not loaded. They get none, so that the optimizer makes them at its next step. more: for
    each group, the options that were loaded and that the optimizer did not have.
    """
    if made is None:
        _set_unstepped(state_dict, listed(optimizer), more)
        return
    gradients = {p: p.grad for o in listed(optimizer) for group in o.param_groups for p in group["params"]}
    named = [(o, p, n) for o, live, saved in _groups(state_dict, listed(optimizer)) for p, n in _pairs(live, saved)]
    for param in gradients:
        param.grad = None
    for o, states in made.items():
        o.state.clear()  # of empty entries
        o.state.update(states)  # or torch makes them once more
    with _quickly_found(listed(optimizer)):
        api.set_optimizer_state_dict(model, listed(optimizer), _with_names(state_dict))
    for param, gradient in gradients.items():
        param.grad = gradient
    for o, param, name in named:
        if name in unstepped:
            o.state.pop(param, None)


class _Names(list[Any]):
    """A list of parameters that is quickly asked whether it has one. torch asks that for each state of each parameter,
    which takes half of a load of 10,000 parameters with a plain list. It must not be changed."""

    @cached_property
    def _there(self) -> frozenset[Any]:
        return frozenset(self)

    def __contains__(self, name: object) -> bool:
        return name in self._there

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Any]:
        return list(self)


def _with_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with `_Names` in its param groups."""
    groups = [{**group, "params": _Names(group["params"])} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


@contextmanager
def _quickly_found(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Have the optimizers load state dicts with `_Names`, by torch's own hook: torch makes plain lists of them before.
    It is their last hook, so that those of others see what they would see otherwise."""
    taking = [o for o in optimizers if hasattr(o, "_optimizer_load_state_dict_pre_hooks")]  # others load by themselves
    hooks = [o.register_load_state_dict_pre_hook(lambda _, given: _with_names(given)) for o in taking]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _set_unstepped(
    state_dict: Mapping[str, Any], optimizers: Sequence[torch.optim.Optimizer], more: Sequence[Collection[str]]
) -> None:
    """Set hyperparameters alone. torch's own function would make states by a step."""
    for k, (o, live, saved) in enumerate(_groups(state_dict, optimizers)):
        live.pop("step", None)
        brought = {*live, *(more[k] if more else ())} - {"params"}
        live.update({key: saved[key] for key in brought if key in saved})
        o.state.clear()


def _pairs(live: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, str]]:
    return zip(live["params"], saved["params"], strict=True)


# --- without a step --------------------------------------------------------------------------------------------------


def blank_states(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, dict[str, Any]] | None:
    """The states that one of torch's own optimizers will have after its first step. Tensors of a parameter's shape are
    only allocated. None if stand-ins do not show the states. The optimizer and its parameters stay as they are."""
    if not type(optimizer).__module__.startswith("torch.optim."):
        return None  # others may keep states for large parameters that they do not keep for small ones
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
    """The parameter's states, made after its stand-in's. Raises ValueError if those do not show them."""
    shape = _LENGTHS[: param.ndim]
    if param.ndim > len(_LENGTHS) or (not shape and is_dtensor(param)):
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
