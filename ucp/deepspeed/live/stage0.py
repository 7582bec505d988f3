"""Stage 0: masters whole on every rank, per parameter (unfused, fp32) or flat per param group (fused)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ucp.deepspeed.live import releases
from ucp.deepspeed.live.base import everyone, put_states, set_group_options, state_dtypes
from ucp.deepspeed.live.expects import live_group
from ucp.geometry import whole
from ucp.loading.target import Group, Loaded, Member, Slot, Weights
from ucp.parallel.zero import flat_offsets
from ucp.storage.dtypes import from_torch


@dataclass(frozen=True)
class _Unit:
    """A tensor that the optimizer steps, and the parameters that lie in it, themselves or as masters."""

    group: int
    master: torch.Tensor
    params: tuple[torch.nn.Parameter, ...]


def _lies_as(value: Any, master: torch.Tensor) -> bool:
    """Whether a state has its master's shape. The same number of elements is not enough, since they may belong anywhere
    (Prodigy's)."""
    return isinstance(value, torch.Tensor) and value.shape == master.shape


class Stage0:
    @staticmethod
    def fits(optimizer: Any) -> bool:
        return any(kind.has(optimizer) for kind in (releases.FUSED, releases.UNFUSED)) or isinstance(
            optimizer, torch.optim.Optimizer
        )

    def __init__(self, engine: Any) -> None:
        self._wrapper = engine.optimizer
        self._names = engine.param_names
        self._inner: torch.optim.Optimizer = getattr(self._wrapper, "optimizer", self._wrapper)
        self._units = list(self._find())
        self._steps = self._common_steps()
        self._keys: list[int] = []

    def _find(self) -> Iterator[_Unit]:
        if releases.FUSED.has(self._wrapper):
            for g, (flat, params) in enumerate(
                zip(self._wrapper.fp32_groups_flat, self._wrapper.fp16_groups, strict=True)
            ):
                yield _Unit(g, flat, tuple(params))
        elif releases.UNFUSED.has(self._wrapper):
            for g, (masters, params) in enumerate(
                zip(self._wrapper.fp32_groups, self._wrapper.fp16_groups, strict=True)
            ):
                for master, param in zip(masters, params, strict=True):
                    yield _Unit(g, master, (param,))
        else:
            for g, group in enumerate(self._inner.param_groups):
                for param in group["params"]:
                    yield _Unit(g, param, (param,))

    def _common_steps(self) -> dict[int, Any]:
        """The step count of each group of DeepSpeed's FusedAdam. It steps a whole group at once, and raises the count
        only in the state of the group's last parameter."""
        steps: dict[int, Any] = {}
        for unit in self._units if releases.FUSED_ADAM.has(self._inner) else ():
            if "step" in (state := self._inner.state.get(unit.master, {})):
                steps[unit.group] = max(steps.get(unit.group, 0), state["step"])
        return steps

    def make_slots(self, keys: Iterator[int]) -> list[Slot]:
        slots = []
        for unit in self._units:
            offsets, _ = flat_offsets([p.numel() for p in unit.params])
            members = tuple(
                Member(self._names[p], tuple(p.shape), whole(tuple(p.shape), at))
                for p, at in zip(unit.params, offsets, strict=True)
            )
            self._keys.append(next(keys))
            size = unit.master.numel()
            state = self._inner.state.get(unit.master, {})
            states = state_dtypes({k: v for k, v in state.items() if _lies_as(v, unit.master)}, size)
            dtype = from_torch(unit.master.dtype)
            slots.append(
                Slot(self._keys[-1], "parameter", size, dtype, members, unit.group, states, holders=everyone())
            )
        return slots

    def groups(self) -> list[Group]:
        names: list[list[str]] = [[] for _ in self._inner.param_groups]
        for unit in self._units:
            names[unit.group] += [self._names[p] for p in unit.params]
        return [live_group(n, self._inner, options) for n, options in zip(names, self._inner.param_groups, strict=True)]

    def live(self, key: int) -> tuple[torch.Tensor, Mapping[str, Any]]:
        unit = self._units[self._keys.index(key)]
        state = self._inner.state.get(unit.master, {})
        if "step" in state and unit.group in self._steps:
            state = {**state, "step": self._steps[unit.group]}
        return unit.master, state

    def is_in_memory(self, key: int) -> bool:
        return True

    def weights(self) -> Iterator[Weights]:
        for unit in self._units:
            if unit.master is unit.params[0]:
                continue
            for param, at in zip(unit.params, flat_offsets([p.numel() for p in unit.params])[0], strict=True):
                shape = tuple(param.shape)
                name, alone = self._names[param], (torch.distributed.get_rank(),)
                yield Weights(name, alone, shape, unit.master, whole(shape, at), param.detach(), whole(shape))

    def begin(self) -> None:
        pass

    def put(self, loaded: Loaded) -> None:
        for key, unit in zip(self._keys, self._units, strict=True):
            if (key, "param") in loaded.tensors:
                loaded.tensors.fill(key, "param", unit.master.data)
            put_states(self._inner, unit.master, key, loaded, self._inner.param_groups[unit.group])

    def finish(self) -> None:
        """Round the masters into the model."""
        if releases.FUSED.has(self._wrapper):
            for flat, low in zip(self._wrapper.fp32_groups_flat, self._wrapper.fp16_groups_flat, strict=True):
                low.data.copy_(flat.data)
        elif releases.UNFUSED.has(self._wrapper):
            for unit in self._units:
                unit.params[0].data.copy_(unit.master.data)

    def set_options(self, options: Mapping[int, Mapping[str, Any]]) -> None:
        for g, values in options.items():
            set_group_options(self._inner.param_groups[g], values)
