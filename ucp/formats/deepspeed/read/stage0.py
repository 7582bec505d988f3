"""Optimizer state of stage 0, which lies in the model file and names no parameters.

Sources: ``runtime/fp16/unfused_optimizer.py``, ``runtime/fp16/fused_optimizer.py`` and, in fp32, the optimizer's own
state dict. Three forms: one master per parameter (``fp32_groups``), one flat master per param group
(``fp32_groups_flat``), or no masters at all. torch numbers parameters through the param groups in turn, so a number has
to be given its name:

1. by the names that the optimizer itself recorded (torch's ``param_names``), else by those that the caller gives, if
   they are as many in every group and name this module's parameters; a group that follows the caller's module is taken
   in the order of this one (`ucp.formats.nouns.ModuleOrder`);
2. else by the module's own order: the names with a slot's shape are taken in the order in which the module lists them.
   The values confirm it: a master rounded to the module's element type is the module's weight.

The checkpoint is refused if neither decides. Parameters of one shape may lie in several groups (or some of them may be
frozen) while no masters tell them apart. Or the slots' shapes may show that the optimizer was made in another order
than the module's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucp import limits
from ucp.catalog import ParamGroup
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.deepspeed.read.experts import ExpertFiles
from ucp.formats.deepspeed.read.model_files import ModelFile
from ucp.formats.deepspeed.read.optimizer_files import divide_step, options_of, split_state
from ucp.formats.nouns import by_module
from ucp.formats.shared.apart import belongs_to, entries, is_plain, name_apart
from ucp.formats.shared.builder import Builder, Rows, Scalar
from ucp.geometry import Shape, numel, row_major
from ucp.storage.dtypes import itemsize
from ucp.storage.rounding import rounds_to
from ucp.storage.torch_pt.values import TensorRef

# A weight of the module. AutoEP's stacks lie apart, row by row.
Weight = TensorRef | Rows


@dataclass(frozen=True)
class _UnnamedParameter:
    """One parameter of the optimizer, not yet named. shape: None if nothing tells it. apart: states by flat name that
    are of other shapes than the parameter, whatever that is."""

    group: int
    shape: Shape | None
    master: TensorRef | None
    states: Mapping[str, TensorRef]
    scalars: Mapping[str, Scalar]
    apart: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def is_odd(self) -> bool:
        """Whether its states do not show its shape."""
        return bool(self.apart) or (self.shape is None and bool(self.states))


def read(
    builder: Builder,
    model: ModelFile,
    trainable: Mapping[str, Weight],
    aliases: Mapping[str, list[str]],
    names: Sequence[Sequence[str]] | None,
    experts: ExpertFiles,
) -> list[ParamGroup]:
    """Enter all parameters that the optimizer updates.

    trainable: candidates, in the module's order: the module's tensors except buffers and tied aliases.
    names: each param group's parameters in order, if the caller knows them (from a live engine, say).
    """
    saved = model.raw["optimizer"]
    inner = saved.get("optimizer_state_dict", saved)
    if not isinstance(inner, Mapping) or "param_groups" not in inner:
        raise Unsupported(f"{model.path}: 'optimizer' is in a form that is not understood; it has {sorted(saved)}")
    groups = inner["param_groups"]
    pools = _pools(trainable, groups, experts)
    recorded = [g.get("param_names") for g in groups]
    if all(recorded):
        names = recorded
    elif names is not None and not (len(names) == len(groups) and all(n in trainable for g in names for n in g)):
        names = None  # an engine may well have other groups than the source had
    elif names is not None:
        names = [by_module(group, trainable) for group in names]
    if "fp32_groups_flat" in saved:
        named = _flat(builder, model, inner, saved["fp32_groups_flat"], pools, names)
    else:
        slots = _slots(builder, model, inner, saved.get("fp32_groups"))
        counts = [len(g["params"]) for g in groups]
        moved = _pools(_made_last(trainable, experts), groups, experts)
        named = _name(builder, model, slots, (pools, moved), names, counts)
    members: list[list[str]] = [[] for _ in groups]
    common = _common_steps(groups, [slot for _, slot in named])
    counting = {slot.group for _, slot in named if "step" in slot.scalars}
    divided = [divide_step(options_of(group), g in counting) for g, group in enumerate(groups)]
    for name, slot in named:
        members[slot.group].append(name)
        tensors = [builder.whole(name, "param", slot.master or trainable[name])]
        alike = {state: ref for state, ref in slot.states.items() if ref.shape == tensors[0].shape}
        tensors += [builder.whole(name, state, ref) for state, ref in alike.items()]
        scalars = {**divided[slot.group][1], **slot.scalars}
        if "step" in scalars and slot.group in common:
            scalars["step"] = common[slot.group]
        builder.add(name, "parameter", tensors, scalars, aliases.get(name, ()))
        for state, ref in {**slot.states, **slot.apart}.items():
            if state not in alike:
                by_itself = name_apart(name, state)
                builder.add(by_itself, "buffer", [builder.whole(by_itself, "param", ref)])
    return [ParamGroup(tuple(m), options) for m, (options, _) in zip(members, divided, strict=True)]


def _pools(
    trainable: Mapping[str, Weight], groups: Sequence[Mapping[str, Any]], experts: ExpertFiles
) -> list[Mapping[str, Weight]]:
    """The candidates of each param group: experts for those that are marked as experts', all others for the rest."""
    if not any(group.get("moe") for group in groups):
        return [trainable] * len(groups)
    kinds: dict[bool, dict[str, Weight]] = {False: {}, True: {}}
    for name, ref in trainable.items():
        kinds[experts.experts.has(name)][name] = ref
    return [kinds[bool(group.get("moe"))] for group in groups]


def _common_steps(groups: Sequence[Mapping[str, Any]], slots: Sequence[_UnnamedParameter]) -> dict[int, Scalar]:
    """Param groups whose parameters share one step count -> that count.

    DeepSpeed's FusedAdam (the only optimizer there with 'bias_correction' in its groups that counts so; ``ops/adam``)
    steps a group as one. It raises the count only in the state of the group's last parameter, and the others keep the
    count that they began with.
    """
    steps: dict[int, Scalar] = {}
    for slot in slots:
        if "bias_correction" in groups[slot.group] and "step" in slot.scalars:
            steps[slot.group] = max(steps.get(slot.group, 0), slot.scalars["step"])
    return steps


def _slots(builder: Builder, model: ModelFile, inner: Mapping[str, Any], masters: Any) -> list[_UnnamedParameter]:
    slots = []
    for g, group in enumerate(inner["param_groups"]):
        for i, number in enumerate(group["params"]):
            state = inner["state"].get(number, {})
            master = masters[g][i] if masters is not None else None
            shape = master.shape if master is not None else None
            tensors: dict[str, TensorRef] = {}
            scalars: dict[str, Scalar] = {}
            apart: dict[str, TensorRef] = {}
            for key, value in entries(state):
                if value is None:
                    continue
                listed = key not in state
                if isinstance(value, TensorRef) and value.shape == () and not listed and (shape or key == "step"):
                    scalars[key] = builder.scalar(value)
                elif isinstance(value, TensorRef) and not listed and (shape is None or value.shape == shape):
                    tensors[key] = value
                elif isinstance(value, TensorRef) and value.shape:
                    apart[key] = value
                elif is_plain(value) and not listed:
                    scalars[key] = value
                else:
                    found = f"shape {list(value.shape)}" if isinstance(value, TensorRef) else type(value).__name__
                    raise Unsupported(
                        f"{model.path}: optimizer state '{key}' of parameter {number} has {found}, neither the "
                        f"parameter's shape {list(shape or ())} nor a single value; checkpoints of this optimizer "
                        "cannot be resharded"
                    )
            if shape is None and (apart or any(ref.shape for ref in tensors.values())):
                # The parameter has dimensions, so what has none is a single value.
                scalars.update({key: builder.scalar(ref) for key, ref in tensors.items() if not ref.shape})
                tensors = {key: ref for key, ref in tensors.items() if ref.shape}
            shapes = {ref.shape for ref in tensors.values()}
            if len(shapes) > 1:
                shapes = set()  # some are of the parameter's shape, perhaps
            slots.append(_UnnamedParameter(g, shape or next(iter(shapes), None), master, tensors, scalars, apart))
    return slots


def _name(
    builder: Builder,
    model: ModelFile,
    slots: list[_UnnamedParameter],
    orders: Sequence[Sequence[Mapping[str, Weight]]],
    names: Sequence[Sequence[str]] | None,
    counts: list[int],
) -> list[tuple[str, _UnnamedParameter]]:
    """orders: the pools, with names in each order that the optimizer may have been made in; the module's is first."""
    pools = orders[0]
    every = {name: ref for pool in pools for name, ref in pool.items()}
    if names is not None and [len(g) for g in names] == counts:
        pairs = list(zip((n for g in names for n in g), slots, strict=True))
        if all(_fits(builder, slot, every[name]) for name, slot in pairs):
            return pairs
    if any(s.is_odd and s.master is None for s in slots):
        return _in_order(model, slots, pools, names, counts)
    if all(s.shape is None for s in slots):  # no states at all: only the groups are to be told
        if len(set(map(id, pools))) == len(pools) and counts == [len(pool) for pool in pools]:
            return list(zip((name for pool in pools for name in pool), slots, strict=True))
        raise _undecided(model, list(every))
    found: list[list[tuple[str, _UnnamedParameter]]] = []
    refusals: list[Unsupported] = []
    for order in orders:
        try:
            found.append(_by_shapes(builder, model, slots, order))
        except Unsupported as error:
            refusals.append(error)
    if not found:
        raise refusals[0]
    differing = [name for (name, _), *others in zip(*found, strict=True) if any(n != name for n, _ in others)]
    if differing:
        raise _undecided(model, differing)
    return found[0]


def _made_last(trainable: Mapping[str, Weight], experts: ExpertFiles) -> dict[str, Weight]:
    """The candidates with AutoEP's routers at the end, where they are if the program gave DeepSpeed a list of
    parameters (``runtime/engine.py: _remap_param_groups_after_module_replacement``)."""
    prefixes = tuple({f"{name.rpartition('experts.')[0]}router." for name in experts.experts.stacks})
    return {n: trainable[n] for last in (False, True) for n in trainable if n.startswith(prefixes) == last}


def _by_shapes(
    builder: Builder, model: ModelFile, slots: list[_UnnamedParameter], pools: Sequence[Mapping[str, Weight]]
) -> list[tuple[str, _UnnamedParameter]]:
    """Names by the slots' shapes, and by values where there are masters. Names of one shape are in the pools' order."""
    every = {name: ref for pool in pools for name, ref in pool.items()}
    alike: dict[tuple[int, Shape | None], list[int]] = defaultdict(list)
    for i, slot in enumerate(slots):
        if slot.shape is None:
            raise _undecided(model, list(every))
        alike[id(pools[slot.group]), slot.shape].append(i)
    found: dict[int, str] = {}
    for (_, shape), members in alike.items():
        pool = pools[slots[members[0]].group]
        candidates = [n for n, ref in pool.items() if ref.shape == shape]
        found.update(_match(builder, model, [(i, slots[i]) for i in members], candidates, pool))
    pairs = [(found[i], slot) for i, slot in enumerate(slots)]
    _check_order(model, pairs, list(every))
    return pairs


def _in_order(
    model: ModelFile,
    slots: Sequence[_UnnamedParameter],
    pools: Sequence[Mapping[str, Weight]],
    names: Sequence[Sequence[str]] | None,
    counts: Sequence[int],
) -> list[tuple[str, _UnnamedParameter]]:
    """Names of parameters whose states do not show their shapes: by the groups' names, or by the module's order where
    the optimizer has all of it in one group."""
    every = {name: ref for pool in pools for name, ref in pool.items()}
    known = [n for g in names for n in g] if names is not None and [len(g) for g in names] == list(counts) else []
    whole = list(every) if len(counts) == 1 and counts[0] == len(every) else []
    for order in (known, whole):
        if order and all(_may_be(slot, every[name].shape) for name, slot in zip(order, slots, strict=True)):
            return list(zip(order, slots, strict=True))
    raise _undecided(model, list(every))


def _may_be(slot: _UnnamedParameter, weight: Shape) -> bool:
    """Whether the states of a slot may be those of such a weight, by their axes."""
    return all(
        ref.shape == weight or belongs_to(ref.shape, weight) for ref in (*slot.states.values(), *slot.apart.values())
    )


def _check_order(model: ModelFile, pairs: Sequence[tuple[str, _UnnamedParameter]], module: Sequence[str]) -> None:
    """Raise Unsupported if names found by shapes alone are not in the module's order. Then the optimizer was made in
    another order, in which parameters of one shape may be anywhere."""
    place = {name: k for k, name in enumerate(module)}
    for group in {slot.group for _, slot in pairs if slot.master is None}:
        places = [place[name] for name, slot in pairs if slot.group == group]
        if places != sorted(places):
            raise _undecided(model, [name for name, slot in pairs if slot.group == group])


def _fits(builder: Builder, slot: _UnnamedParameter, weight: Weight) -> bool:
    """Whether nothing speaks against a slot being this parameter."""
    return slot.shape in (None, weight.shape) and (slot.master is None or _rounds_to(builder, slot.master, weight))


def _match(
    builder: Builder,
    model: ModelFile,
    slots: list[tuple[int, _UnnamedParameter]],
    candidates: list[str],
    trainable: Mapping[str, Weight],
) -> dict[int, str]:
    """Give slots of one shape their names, in order, confirmed by values where there are masters."""
    if len(candidates) < len(slots):
        raise DamagedCheckpoint(
            f"{model.path}: the optimizer has {len(slots)} parameters of shape {list(slots[0][1].shape or ())}, the "
            f"module {len(candidates)}"
        )
    if slots[0][1].master is None:
        one_group = len({s.group for _, s in slots}) == 1
        if not one_group or len(candidates) != len(slots):
            raise _undecided(model, candidates)
        return {i: n for (i, _), n in zip(slots, candidates, strict=True)}
    left = list(candidates)
    out: dict[int, str] = {}
    for i, slot in slots:
        hits = [n for n in left if slot.master is not None and _rounds_to(builder, slot.master, trainable[n])]
        if not hits:
            raise DamagedCheckpoint(
                f"{model.path}: no weight of the module equals the rounded master of optimizer parameter {i}; the "
                "module and the optimizer are not of the same step"
            )
        if len(hits) > 1 and not _interchangeable(slots, hits, candidates):
            raise _undecided(model, hits)
        out[i] = hits[0]
        left.remove(hits[0])
    return out


def _interchangeable(slots: list[tuple[int, _UnnamedParameter]], hits: list[str], candidates: list[str]) -> bool:
    """Equal weights (norms at their initial ones, say) can only be told apart by their order. It is trusted if all
    slots of the shape lie in one group and no candidate is left over."""
    return len({s.group for _, s in slots}) == 1 and len(slots) == len(candidates)


def _flat(
    builder: Builder,
    model: ModelFile,
    inner: Mapping[str, Any],
    masters: Sequence[TensorRef],
    pools: Sequence[Mapping[str, Weight]],
    names: Sequence[Sequence[str]] | None,
) -> list[tuple[str, _UnnamedParameter]]:
    """One flat master per group: parameters end to end, recognised one after the other by their values."""
    out: list[tuple[str, _UnnamedParameter]] = []
    taken: set[str] = set()
    for g, flat in enumerate(masters):
        trainable = pools[g]
        number = inner["param_groups"][g]["params"][0]
        state = split_state(builder, model.path, f"group {g}", inner["state"].get(number, {}), (flat.numel,))
        at = 0
        expected = list(names[g]) if names is not None else []
        while at < flat.numel:
            hits = [n for n, ref in trainable.items() if n not in taken and _lies_at(builder, flat, at, ref)]
            name = expected.pop(0) if expected else None
            if name not in hits:
                expected = []
                if not hits:
                    raise DamagedCheckpoint(
                        f"{model.path}: no weight of the module equals the rounded master at element {at} of flat "
                        f"group {g}"
                    )
                if len(hits) > 1 and sum(pool is trainable for pool in pools) > 1:
                    raise _undecided(model, hits)
                name = hits[0]
            shape = trainable[name].shape
            tensors = {k: _slice(v, at, shape) for k, v in state.tensors.items()}
            out.append((name, _UnnamedParameter(g, shape, _slice(flat, at, shape), tensors, state.scalars)))
            at += numel(shape)
            taken.add(name)
    return out


def _lies_at(builder: Builder, flat: TensorRef, at: int, weight: Weight) -> bool:
    """Whether the elements from ``at`` of a flat master round to this weight."""
    return at + weight.numel <= flat.numel and _rounds_to(builder, _slice(flat, at, weight.shape), weight)


def _slice(flat: TensorRef, at: int, shape: Shape) -> TensorRef:
    """A parameter inside a flat buffer."""
    offset = flat.offset + at * itemsize(flat.dtype)
    return replace(flat, offset=offset, shape=shape, strides=row_major(shape))


def _rounds_to(builder: Builder, master: TensorRef, weight: Weight) -> bool:
    """Whether a sample of the master, rounded to the weight's element type, is the weight's, bit for bit."""
    if master.shape != weight.shape:
        return False
    n, k = master.numel, min(master.numel, limits.STAGE0_SAMPLE_COUNT // 2)
    return all(
        rounds_to(_at(builder, master, first, k), master.dtype, _at(builder, weight, first, k), weight.dtype)
        for first in (0, n - k)
    )


def _at(builder: Builder, ref: Weight, first: int, count: int) -> NDArray[Any]:
    """``count`` elements in row-major order from number ``first`` on, whatever their order in the file."""
    if isinstance(ref, Rows):
        size, stop = ref.numel // len(ref.refs), first + count
        spans = ((e * size, max(first, e * size), min(stop, (e + 1) * size)) for e in range(len(ref.refs)))
        return np.concatenate([_at(builder, ref.refs[b // size], a - b, c - a) for b, a, c in spans if a < c])
    size = itemsize(ref.dtype)
    if ref.is_contiguous:
        return builder.bits(ref.file, ref.offset + first * size, count, ref.dtype)
    index = np.stack(np.unravel_index(np.arange(first, first + count), ref.shape))
    places = (np.array(ref.strides) @ index).tolist()
    return np.concatenate([builder.bits(ref.file, ref.offset + at * size, 1, ref.dtype) for at in places])


def _undecided(model: ModelFile, names: Sequence[str]) -> Unsupported:
    shown = ", ".join(f"'{n}'" for n in names[:4]) + (", …" if len(names) > 4 else "")
    return Unsupported(
        f"{model.path}: a stage-0 checkpoint does not name the optimizer's parameters, and nothing in it tells {shown} "
        "apart; load it into the engine that has the same param groups, whose order then decides"
    )
