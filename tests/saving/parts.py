"""A checkpoint's catalog and a live training state, made of plain values: no files, no engine, one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ucp.catalog import Catalog, LogicalTensor, ParameterInfo, ParamGroup, TrainingState
from ucp.geometry import numel, whole
from ucp.loading.refusals import Words
from ucp.loading.target import Group, Loaded, Member, Slot, Weights
from ucp.parallel.mesh import Layout

Shape = tuple[int, ...]
ADAM = ("exp_avg", "exp_avg_sq")
OPTIONS: Mapping[str, Any] = {"lr": 0.1, "weight_decay": 0.0}


@dataclass(frozen=True)
class Saved:
    """One parameter of a catalog."""

    shape: Shape = (2, 3)
    kind: str = "parameter"
    states: Sequence[str] = ADAM
    dtype: str = "float32"
    state_dtype: str = "float32"
    step: float | None = 4.0
    aliases: tuple[str, ...] = ()


def catalog(
    saved: Mapping[str, Saved], groups: Sequence[ParamGroup] | None = None, steps: int | None = 4, skipped: int = 0
) -> Catalog:
    """A catalog of one file that nobody reads. groups: by default one with every trained parameter."""
    tensors: dict[tuple[str, str], LogicalTensor] = {}
    parameters: dict[str, ParameterInfo] = {}
    for name, item in saved.items():
        states = {"param": item.dtype}
        if item.kind == "parameter":
            states |= dict.fromkeys(item.states, item.state_dtype)
        scalars = {} if item.kind != "parameter" or item.step is None else {"step": item.step}
        parameters[name] = ParameterInfo(name, item.shape, states, item.kind, scalars, item.aliases)
        for state, dtype in states.items():
            blocks = whole(item.shape)
            tensors[name, state] = LogicalTensor(
                name, state, item.shape, dtype, blocks, np.zeros(len(blocks), np.int64)
            )
    trained = tuple(n for n, item in saved.items() if item.kind == "parameter")
    training = TrainingState(
        param_groups=tuple(groups) if groups is not None else (ParamGroup(trained, OPTIONS),),
        global_steps=steps,
        skipped_steps=skipped,
    )
    return Catalog("raw", "a test", Layout(dp=2, zero=1), (), parameters, tensors, training)


@dataclass(frozen=True)
class FakeTarget:
    """A target of given slots, which keeps nothing."""

    slots: Sequence[Slot]
    groups: Sequence[Group]
    layout: Layout = field(default_factory=lambda: Layout(dp=1, zero=3))
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    words: Words = field(default_factory=lambda: Words("the engine", "allow_missing, allow_unused", "not strict"))
    copies: bool = False
    named: Mapping[str, Any] | None = None
    keeps_memory: bool = True

    def room(self, key: int, state: str, dtype: str, length: int) -> torch.Tensor | None:
        return None

    def current(self, key: int, state: str) -> torch.Tensor | None:
        return None

    def memory(self, key: int, state: str) -> torch.Tensor | None:
        return None

    def weights(self) -> tuple[Weights, ...]:
        return ()

    def check(self, training_state: TrainingState, sources: Mapping[int, int]) -> None:
        return None

    def home(self, key: int, state: str, dtype: str, length: int) -> torch.Tensor | None:
        return None

    def begin(self) -> None:
        raise AssertionError("a plan changes nothing")

    def put(self, loaded: Loaded) -> None:
        raise AssertionError("a plan changes nothing")

    def apply(self, loaded: Loaded) -> None:
        raise AssertionError("a plan changes nothing")


def slot(
    key: int,
    members: Mapping[str, Shape],
    kind: str = "parameter",
    group: int | None = 0,
    dtype: str = "float32",
    states: Mapping[str, str] | None = None,
) -> Slot:
    """A flat buffer with these members end to end."""
    placed, at = [], 0
    for name, shape in members.items():
        placed.append(Member(name, shape, whole(shape, at)))
        at += numel(shape)
    return Slot(key, kind, at, dtype, tuple(placed), group if kind == "parameter" else None, dict(states or {}))


def group(
    *names: str, expects: Sequence[str] | None = ADAM, values: Sequence[str] | None = None, **options: Any
) -> Group:
    return Group(
        names,
        {**OPTIONS, **options},
        None if expects is None else frozenset(expects),
        None if values is None else frozenset(values),
    )


def target(*slots: Slot, groups: Sequence[Group] | None = None) -> FakeTarget:
    """groups: by default one with every trained parameter."""
    trained = [m.name for s in slots if s.kind == "parameter" for m in s.members]
    return FakeTarget(slots, groups if groups is not None else [group(*trained)])
