"""What a pipeline's engines hold, as whole tensors: every stage's own truth, joined by hand-written rules.

Tensor-parallel shards are joined kind by kind as `pipe_models` cuts them, and what several ranks hold must be equal.
Nothing here uses this project's library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.engines import packing
from tests.engines import truth as truths
from tests.engines.truth import Truth, same


def gather(engine: Any) -> Truth | None:
    """The truth on rank 0; None on the others. Collective; raises ValueError if ranks contradict each other."""
    group = engine.seq_data_parallel_group
    own = truths.gather(engine, group)
    grid = getattr(engine.module, "_grid", None)
    if grid is None:
        return own
    at = (grid.get_pipe_parallel_rank(), grid.get_slice_parallel_rank())
    everyone = packing.gather_object((at, own))
    if everyone is None:
        return None
    parts = {at: found for at, found in everyone if found is not None}
    stages = sorted({stage for stage, _ in parts})
    slices = sorted({slice_ for _, slice_ in parts})
    return _join_stages([_join_slices([parts[stage, slice_] for slice_ in slices]) for stage in stages])


def _cat(name: str, shards: list[Tensor]) -> Tensor:
    """A tensor from its tensor-parallel shards."""
    kind = ".".join(name.split(".")[-2:])
    if kind in ("gate_up.weight", "gate_up.bias"):
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    if kind == "down.weight":
        return torch.cat(shards, dim=1)
    for shard in shards[1:]:
        if not same(shards[0], shard):
            raise ValueError(f"{name}: tensor-parallel ranks hold other values of it")
    return shards[0]


def _join_slices(slices: list[Truth]) -> Truth:
    first = slices[0]
    if len(slices) == 1:
        return first
    for other in slices[1:]:
        for field in ("scalars", "groups", "counters", "loss_scaler", "lr_scheduler", "aliases"):
            if not same(getattr(first, field), getattr(other, field)):
                raise ValueError(f"tensor-parallel ranks differ in {field}")

    def join(field: str) -> dict[str, Tensor]:
        return {n: _cat(n, [getattr(s, field)[n] for s in slices]) for n in getattr(first, field)}

    params = {
        name: {state: _cat(name, [s.params[name][state] for s in slices]) for state in states}
        for name, states in first.params.items()
    }
    return replace(first, params=params, frozen=join("frozen"), buffers=join("buffers"), module=join("module"))


def _join_stages(stages: list[Truth]) -> Truth:
    first = stages[0]
    for other in stages[1:]:
        for field in ("counters", "loss_scaler", "lr_scheduler"):
            if not same(getattr(first, field), getattr(other, field)):
                raise ValueError(f"stages differ in {field}: {getattr(first, field)}, {getattr(other, field)}")
        if len(first.groups) != len(other.groups):
            raise ValueError(f"stages have {len(first.groups)} and {len(other.groups)} param groups")
    groups = []
    for parts in zip(*(stage.groups for stage in stages), strict=True):
        options = [{k: v for k, v in part.items() if k != "names"} for part in parts]
        if not all(same(options[0], other) for other in options):
            raise ValueError("stages differ in a param group's hyperparameters")
        groups.append({**options[0], "names": list(dict.fromkeys(n for part in parts for n in part["names"]))})
    joined: dict[str, Mapping[str, Any]] = {
        field: _union(field, [getattr(stage, field) for stage in stages])
        for field in ("params", "scalars", "frozen", "buffers", "module", "aliases")
    }
    return replace(first, **joined, groups=tuple(groups))


def _union(field: str, parts: list[Mapping[str, Any]]) -> dict[str, Any]:
    """All names; what several stages hold (a tied module) must be equal on them, but for the idle copy of `shift`."""
    out: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if not same(out.setdefault(name, value), value) and not name.endswith(".shift"):
                raise ValueError(f"{field}: stages hold other values of '{name}'")
    return out
