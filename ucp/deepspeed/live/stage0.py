"""Stage 0: masters whole on every rank, per parameter (unfused, fp32) or flat per param group (fused)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ucp.catalog import Catalog, LogicalTensor
from ucp.deepspeed.live import releases
from ucp.deepspeed.live.base import everyone, put_states, set_group_options, state_dtypes
from ucp.deepspeed.live.expects import Expected, expected, live_group, of_few_elements
from ucp.errors import Unsupported
from ucp.formats.shared.apart import entries, name_apart, put_entry, states_apart
from ucp.geometry import Shape, whole
from ucp.loading.target import Group, Loaded, Member, Slot, Weights
from ucp.parallel.zero import flat_offsets
from ucp.spec.factored import kept_axes
from ucp.storage.dtypes import from_torch, to_torch

_CODES = ("uint8", "int8")


@dataclass(frozen=True)
class _Unit:
    """A tensor that the optimizer steps, and the parameters that lie in it, themselves or as masters."""

    group: int
    master: torch.Tensor
    params: tuple[torch.nn.Parameter, ...]


@dataclass(frozen=True)
class _Apart:
    """A state of another shape than its parameter's: a tensor by itself. state: its flat name."""

    unit: _Unit
    state: str
    tensor: torch.Tensor


def _lies_as(value: Any, master: torch.Tensor) -> bool:
    """Whether a state has its master's shape. The same number of elements is not enough, since they may belong anywhere
    (Prodigy's)."""
    return isinstance(value, torch.Tensor) and value.shape == master.shape


def _is_apart(value: torch.Tensor, master: torch.Tensor) -> bool:
    """Whether a state is a tensor of another shape, and no single value."""
    return value.dim() > 0 and value.shape != master.shape


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
        self._apart: dict[int, _Apart] = {}
        self._told: dict[tuple[int, tuple[int, ...]], Expected] = {}  # by group and a shape of a few elements
        self._may_be_apart = not engine.has_moe_layers

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
            self._expected(unit)
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
                Slot(
                    self._keys[-1],
                    "parameter",
                    size,
                    dtype,
                    members,
                    unit.group,
                    states,
                    holders=everyone(),
                    keeps=self._keeps(unit),
                )
            )
        for unit in self._units:
            for name, value in self._apart_in(unit).items():
                slots.append(self._slot_apart(next(keys), _Apart(unit, name, value)))
        return slots

    def _keeps(self, unit: _Unit) -> tuple[frozenset[str], frozenset[str]] | None:
        """What is kept for a parameter whose shape decides it, as matrices have factors and vectors have none."""
        told = self._expected(unit)
        if not told.apart and not self._has_factors(unit.group):
            return None
        return None if told.tensors is None or told.values is None else (told.tensors, told.values)

    def _has_factors(self, group: int) -> bool:
        """Whether any parameter of the group has states of other shapes, so that its parameters keep different ones."""
        return any(told.apart for (g, _), told in self._told.items() if g == group)

    def _expected(self, unit: _Unit) -> Expected:
        key = (unit.group, of_few_elements(unit.master.shape))
        if key not in self._told:
            self._told[key] = expected(self._inner, self._inner.param_groups[unit.group], key[1])
        return self._told[key]

    def _apart_in(self, unit: _Unit) -> dict[str, torch.Tensor]:
        """The states of a parameter that are of other shapes, by flat name."""
        if len(unit.params) > 1 or not self._may_be_apart:
            return {}
        state = self._inner.state.get(unit.master, {})
        found = {k: v for k, v in entries(state) if isinstance(v, torch.Tensor) and v.dim()}
        return {k: v for k, v in found.items() if k not in state or _is_apart(v, unit.master)}

    def _slot_apart(self, key: int, one: _Apart) -> Slot:
        self._apart[key] = one
        shape = tuple(one.tensor.shape)
        member = Member(name_apart(self._names[one.unit.params[0]], one.state), shape, whole(shape))
        return Slot(key, "buffer", one.tensor.numel(), from_torch(one.tensor.dtype), (member,), holders=everyone())

    def slots_to_come(self, catalog: Catalog, keys: Iterator[int], whole_shapes: Mapping[str, Shape]) -> list[Slot]:
        """Slots for the states of other shapes that an optimizer which has not stepped is yet to make, as the
        checkpoint has them. One that the optimizer will have, and the checkpoint not, gets a slot without elements.

        whole_shapes: of the parameters that are cut, by name. Raises Unsupported for a state of which it is open how it
        is cut with its parameter."""
        if not self._may_be_apart or catalog.training_state.global_steps == 0:
            return []
        known: dict[str, dict[str, LogicalTensor]] = {}
        named = [name for name, info in catalog.parameters.items() if info.kind != "padding"]
        for name, (owner, state) in states_apart(named, catalog.parameters).items():
            known.setdefault(owner, {})[state] = catalog.tensors[name, "param"]
        slots = []
        for unit in self._units:
            if len(unit.params) > 1 or self._inner.state.get(unit.master):
                continue
            names, has = self._expected(unit).apart, known.get(self._names[unit.params[0]], {})
            for state in has if names is None else sorted(names):
                shape: Shape = (0,)
                dtype = None
                if state in has:
                    shape, dtype = self._cut_as(unit, has[state], state, whole_shapes), to_torch(has[state].dtype)
                blank = torch.zeros(shape, dtype=dtype, device=unit.master.device)
                slots.append(self._slot_apart(next(keys), _Apart(unit, state, blank)))
        return slots

    def with_codes(self, slot: Slot, catalog: Catalog) -> Slot:
        """A parameter's slot with the element types of codes, as the checkpoint has them: an optimizer that quantises
        its states (bitsandbytes') and has not stepped does not tell that they will be no floating point."""
        if slot.key not in self._keys or slot.states:
            return slot
        unit = self._units[self._keys.index(slot.key)]
        info = catalog.parameters.get(self._names[unit.params[0]])
        if len(unit.params) > 1 or info is None or self._expected(unit).tensors is not None:
            return slot
        return slot._replace(states={s: dtype for s, dtype in info.states.items() if dtype in _CODES})

    def _cut_as(self, unit: _Unit, state: LogicalTensor, name: str, whole_shapes: Mapping[str, Shape]) -> Shape:
        """What this rank will have of a state of another shape than its parameter's."""
        owner, local = self._names[unit.params[0]], tuple(unit.params[0].shape)
        full = whole_shapes.get(owner, local)
        if full == local:
            return state.shape
        shapes = {tuple(1 if k is None else local[k] for k in kept) for kept in kept_axes(name, [full], [state.shape])}
        if len(shapes) != 1:
            raise Unsupported(
                f"optimizer state '{name}' of '{owner}' has shape {list(state.shape)} in the checkpoint; its axes are "
                f"not those of the parameter ({list(full)}), or it is open which of them, and this rank has "
                f"{list(local)} of that; let the optimizer step once before the load, so that its own state shows it"
            )
        return next(iter(shapes))

    def groups(self) -> list[Group]:
        names: list[list[str]] = [[] for _ in self._inner.param_groups]
        for unit in self._units:
            names[unit.group] += [self._names[p] for p in unit.params]
        return [live_group(n, self._inner, options) for n, options in zip(names, self._inner.param_groups, strict=True)]

    def live(self, key: int) -> tuple[torch.Tensor, Mapping[str, Any]]:
        if key in self._apart:
            return self._apart[key].tensor, {}
        unit = self._units[self._keys.index(key)]
        state = self._inner.state.get(unit.master, {})
        if apart := {name.partition(".")[0] for name in self._apart_in(unit)}:
            state = {k: v for k, v in state.items() if k not in apart}
        if "step" in state and unit.group in self._steps:
            state = {**state, "step": self._steps[unit.group]}
        return unit.master, state

    def is_apart(self, key: int) -> bool:
        """Whether a slot is a state of another shape than its parameter's."""
        return key in self._apart

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
        for key, one in self._apart.items():
            if (key, "param") in loaded.tensors:
                loaded.tensors.fill(key, "param", one.tensor.data)
                put_entry(self._inner.state[one.unit.master], one.state, one.tensor)

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
