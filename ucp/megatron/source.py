"""A sharded state dict of Megatron-Core as a source for the saver.

Ranks tell each other which boxes they hold of which tensors. Those that hold the same share the writing of it, which
Megatron's replica numbers alone do not allow. What is saved is what the format ``megatron`` reads of Megatron's own
folders: masters in place of the weights that are rounded from them, and the common state as the training state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ucp import limits
from ucp.catalog import ParameterInfo
from ucp.errors import SaveFailed
from ucp.formats.megatron import keys
from ucp.formats.megatron.read import common
from ucp.formats.shared.roles import PARAM
from ucp.geometry import Shape, empty
from ucp.job import ranks
from ucp.megatron import parts
from ucp.megatron.parts import Held, Key, Taken
from ucp.saving.source import Holding, Source

BYTES_COMPARED = 8
"""Scratch for each element that is compared: a rounded copy and what four comparisons say."""


@dataclass(frozen=True)
class Facts:
    """What a rank says about a tensor. regions: offsets and sizes of its boxes."""

    shape: Shape
    dtype: str
    regions: tuple[tuple[Shape, Shape], ...]
    flexible: bool


def facts(taken: Taken) -> dict[Key, Facts]:
    return {key: Facts(h.shape, h.dtype, h.regions, h.flexible) for key, h in taken.held.items()}


@dataclass(frozen=True)
class Told:
    """What all ranks say. by_key: for each tensor, the ranks that have it, and what they say. states: of each parameter
    in the model's order, what any rank has, the weight first. trained: those that an optimizer updates."""

    by_key: Mapping[Key, Mapping[int, Facts]]
    states: Mapping[str, tuple[str, ...]]
    trained: frozenset[str]

    def some(self, name: str, state: str) -> Facts:
        return next(iter(self.by_key[name, state].values()))

    def agreed(self, key: Key) -> Facts:
        """What all ranks say of a tensor. Raises SaveFailed where they differ."""
        (first, fact), *others = self.by_key[key].items()
        for rank, other in others:
            if (other.shape, other.dtype) != (fact.shape, fact.dtype):
                raise SaveFailed(
                    f"'{key[0]}' is {fact.dtype} {list(fact.shape)} on rank {first} and {other.dtype} "
                    f"{list(other.shape)} on rank {rank}; nothing was saved"
                )
        return fact

    def holders(self, key: Key, region: tuple[Shape, Shape]) -> tuple[int, ...]:
        """The ranks that hold this box, in ascending order."""
        return tuple(rank for rank, fact in self.by_key[key].items() if region in fact.regions)


def tell(taken: Taken) -> Told:
    """What all ranks hold. Collective."""
    several, which = ranks.distinct(facts(taken))
    by_key: dict[Key, dict[int, Facts]] = {}
    for rank, index in enumerate(which):
        for key, fact in several[index].items():
            by_key.setdefault(key, {})[rank] = fact
    trained = frozenset(name for name, state in by_key if state != keys.WEIGHT)
    found: dict[str, list[str]] = {}
    for name, state in by_key:
        found.setdefault(name, []).append(state)
    ranked = {name: sorted(states, key=lambda s: (s != keys.WEIGHT, s != PARAM, s)) for name, states in found.items()}
    return Told(by_key, {name: tuple(ranked[name]) for name in keys.order(ranked)}, trained)


def make_source(taken: Taken) -> Source:
    """What this rank saves. Collective. Raises SaveFailed on every rank where ranks contradict each other."""
    told = tell(taken)
    objects = _objects(taken)
    return ranks.all_or_none(lambda: _source(taken, told, objects))


def _objects(taken: Taken) -> dict[str, Any]:
    """The objects of all ranks that hold anything, from their main replicas. Collective."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    mine = {k: o.data for k, o in taken.objects.items() if o.data is not None and is_main_replica(o.replica_id)}
    out: dict[str, Any] = {}
    for found in ranks.distinct(mine)[0]:
        out.update(found)
    return out


def _source(taken: Taken, told: Told, objects: Mapping[str, Any]) -> Source:
    said = {key: _numbers(value) if key == "optimizer" else value for key, value in taken.common.items()}
    groups = common.groups(common.optimizers(said))
    step = common.step("the state dict", said, groups)
    parameters: dict[str, ParameterInfo] = {}
    holdings: list[Holding] = []
    weights: dict[str, str] = {}
    for name, (first, *states) in told.states.items():
        weight = told.some(name, first)
        if first != keys.WEIGHT:
            raise SaveFailed(f"'{name}' has optimizer states in the state dict and no weight; nothing was saved")
        if PARAM in states:
            weights[name] = weight.dtype
            _check_master(taken.held, name)
        else:
            states.insert(0, keys.WEIGHT)
        trained = name in told.trained
        kind = _kind(weight.dtype, trained, bool(told.trained))
        parameters[name] = ParameterInfo(name, weight.shape, {}, kind, {"step": step} if trained and step else {})
        for state in states:
            holdings += _holdings(taken, told, (name, state))
    ndims = {name: len(info.shape) for name, info in parameters.items() if name in told.trained}
    named, unnamed = common.named(groups, ndims) if groups else ((), "")
    if unnamed:
        said["param_groups"] = [group.options for group in groups]
    if weights:
        low = set(weights.values())
        said["weights"] = low.pop() if len(low) == 1 else weights
    layout = parts.layout(taken)
    return Source(layout, parameters, holdings, common.training_state(said, objects, named, layout.dp))


def _kind(dtype: str, trained: bool, some_trained: bool) -> str:
    if trained:
        return "parameter"
    if "float" not in dtype:
        return "buffer"
    return "frozen" if some_trained else "parameter"


def _holdings(taken: Taken, told: Told, key: Key) -> list[Holding]:
    """What this rank writes of a tensor, or writes together with others that hold the same: one for each box."""
    name, state = key
    fact = told.agreed(key)
    saved = PARAM if state == keys.WEIGHT else state
    held = taken.held.get(key)
    if held is None:
        return [Holding(name, saved, fact.shape, fact.dtype, torch.empty(0), empty(len(fact.shape)), (ranks.rank(),))]
    out = []
    for part in held.parts:
        one = replace(held, parts=(part,))
        memory, blocks, _ = parts.flat(one)
        if memory is None:
            memory = part.view.contiguous().reshape(-1)
        holders = told.holders(key, part.region)
        out.append(
            Holding(name, saved, fact.shape, fact.dtype, memory, blocks, holders, volatile=name not in told.trained)
        )
    return out


def _check_master(held: Mapping[Key, Held], name: str) -> None:
    """The weights are their masters, rounded: only masters are saved. Raises SaveFailed where they are not."""
    weight, master = held.get((name, keys.WEIGHT)), held.get((name, PARAM))
    if weight is None or master is None or weight.regions != master.regions:
        return
    for low, high in _together(weight, master):
        rounded = high.to(low.dtype)
        same = (rounded == low) | ((rounded != rounded) & (low != low))
        if not bool(same.all()):
            raise SaveFailed(
                f"'{name}': the model's weights are not the optimizer's masters, rounded, and a checkpoint keeps the "
                "masters; call optimizer.reload_model_params() where weights were set without it; nothing was saved"
            )


def _numbers(value: Any) -> Any:
    """An optimizer's own state with numbers for tensors of one element, such as a step."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if type(value) is dict:
        return {key: _numbers(item) for key, item in value.items()}
    if type(value) is list:
        return [_numbers(item) for item in value]
    return value


def _together(one: Held, other: Held) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What two tensors of the same boxes hold at the same places, a little at a time: a comparison makes copies."""
    left = [(a.view, b.view) for a, b in zip(one.parts, other.parts, strict=True)]
    most = limits.SCRATCH_BYTES // BYTES_COMPARED
    while left:
        a, b = left.pop()
        if a.numel() <= most:
            yield a, b
            continue
        dim = next(k for k, size in enumerate(a.shape) if size > 1)
        step = max(1, most * a.shape[dim] // a.numel())
        left.extend(zip(a.split(step, dim), b.split(step, dim), strict=True))
