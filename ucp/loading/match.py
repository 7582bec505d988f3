"""Compare a whole checkpoint with a live training state, before anything is changed.

The result is either a complete plan, or one refusal with everything that does not fit: what would stay unrestored, what
would stay unused, shapes that differ, hyperparameters that one group would have to merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat
from typing import Any

from ucp.catalog import Catalog, LogicalTensor, ParameterInfo
from ucp.columns import tuples_of
from ucp.formats.shared.apart import states_apart
from ucp.geometry import Blocks, restrict, whole
from ucp.loading.name_match import match
from ucp.loading.nouns import Entry, LoadPlan, Wish
from ucp.loading.options import holds, match_named, match_options
from ucp.loading.refusals import PARAM, VALUE, Findings, Item, allowed, values_text
from ucp.loading.target import Asked, Member, Slot, Target, kept_for
from ucp.storage.rounding import ROUNDED
from ucp.transfer.exact import EXACT
from ucp.transfer.gather import Want
from ucp.units import counted

_WEIGHTS = frozenset((PARAM,))


@dataclass(frozen=True)
class _Sides:
    """The two sides of a comparison, and its results so far. names: live name -> the checkpoint's."""

    catalog: Catalog
    target: Target
    wish: Wish
    names: dict[str, str]
    found: Findings
    wants: dict[Entry, list[Want]] = field(default_factory=dict)
    scalars: dict[int, dict[str, Any]] = field(default_factory=dict)
    kept_in: set[Entry] = field(default_factory=set)

    @cached_property
    def asked(self) -> Mapping[str, frozenset[str]]:
        """Live name -> the states and values that slots say they ask for, all slots of that name together."""
        return _asked(self.target)

    def may_miss(self, name: str, state: str) -> bool:
        return allowed(self.target.words.spellings(name, state), self.wish.allow_missing)

    def may_leave(self, name: str, state: str = PARAM) -> bool:
        return allowed(self.target.words.spellings(name, state), self.wish.allow_unused)


def plan(catalog: Catalog, target: Target, wish: Wish) -> LoadPlan:
    """The plan of a load. Raises Mismatch with a list of all that does not fit. Changes nothing, and does not
    communicate."""
    found = Findings(target.words)
    asked = [m.name for s in target.slots for m in s.members] + [*target.elsewhere]
    asked += [name for group in target.groups for name in group.names]
    sides = _Sides(catalog, target, wish, match(catalog, asked, target.copies), found)
    _without_other_padding(sides)
    for slot in _but_weights_alone(sides):
        if slot.asked is None or PARAM in slot.asked.states:
            _weights(sides, slot)
        if slot.kind == "parameter" and wish.states:
            _states(sides, slot)
    if wish.states and not wish.strict:
        _some_trained(sides)
    _unused(sides)
    options, sources = (
        match_options(catalog, target, sides.names, found, partial=wish.partial) if wish.states else ({}, {})
    )
    named = match_named(
        catalog,
        target,
        found,
        lambda key: sides.may_miss(key, VALUE),
        lambda key: wish.partial or sides.may_leave(key, VALUE),
    )
    found.refuse(catalog.layout, target.layout, {state for _, state in catalog.tensors} - {PARAM})
    return LoadPlan(
        sides.wants,
        sides.scalars,
        options,
        sources,
        tuple(found.left),
        tuple(found.spared),
        tuple(found.rounded),
        tuple(dict.fromkeys(found.notes)),
        tuple(found.tied),
        named,
        frozenset(sides.kept_in),
    )


def _asked(target: Target) -> dict[str, frozenset[str]]:
    out: dict[str, frozenset[str]] = {}
    for slot in target.slots:
        if slot.asked is not None:
            asked = slot.asked.states.union(slot.asked.values) if slot.asked.values else slot.asked.states
            for member in slot.members:
                before = out.get(member.name)
                out[member.name] = asked if before is None else before | asked
    return out


def _without_other_padding(sides: _Sides) -> None:
    """Leave out padding that has another width in the checkpoint, since padding is no part of a parameter."""
    for slot in sides.target.slots:
        for member in slot.members:
            source = sides.catalog.parameters.get(sides.names.get(member.name, "")) if member.padding else None
            if member.padding and (source is None or source.shape != member.shape):
                sides.names.pop(member.name, None)
                sides.found.notes.append(
                    f"{member.name} {list(member.shape)} stays as it is: the checkpoint's is another"
                )


# --- weights and buffers ---------------------------------------------------------------------------------------------


def _but_weights_alone(sides: _Sides) -> list[Slot]:
    """Want the weights of slots that ask for nothing else, where the checkpoint has nothing else and they are alike, as
    is usual. Returns the other slots."""
    names, parameters, tensors = sides.names, sides.catalog.parameters, sides.catalog.tensors
    others, plain = list[Slot](), list[tuple[Entry, LogicalTensor, Blocks, str]]()
    asking = {id(slot.asked): slot.asked for slot in sides.target.slots if slot.asked is not None}
    of_weights = {number for number, asked in asking.items() if asked.states == _WEIGHTS and not asked.values}
    for slot in sides.target.slots:
        if id(slot.asked) in of_weights and not slot.placed and len(slot.members) == 1:
            name, shape, blocks, _ = slot.members[0]
            info = parameters[names[name]] if name in names else None
            tensor = None if info is None else tensors.get((info.name, PARAM))
            alone = info is not None and len(info.states) == 1 and not info.scalars
            if tensor is not None and alone and (tensor.dtype, tensor.shape) == (slot.dtype, shape):
                plain.append(((slot.key, PARAM, slot.dtype), tensor, blocks, slot.dtype))
                continue
        others.append(slot)
    if plain:
        entries, *columns = zip(*plain, strict=True)
        each = zip(tuples_of(Want, *columns, repeat(0), repeat(False)), strict=True)
        sides.wants.update(zip(entries, map(list, each), strict=True))
    return others


def _weights(sides: _Sides, slot: Slot) -> None:
    dtype = slot.dtype
    for member in slot.members:
        source = sides.names.get(member.name)
        tensor = None if source is None else sides.catalog.tensors.get((source, PARAM))
        # The checkpoint's weight has the shape and the element type of the one here.
        if tensor is not None and tensor.shape == member.shape and tensor.dtype == dtype and PARAM not in slot.placed:
            sides.wants.setdefault((slot.key, PARAM, dtype), []).append(Want(tensor, member.blocks, dtype))
            continue
        item = Item(slot.kind, member.name, member.shape)
        if source is None:
            may = member.padding or not sides.wish.strict or sides.may_miss(member.name, PARAM)
            sides.found.lacks(item, may and not _is_blank(slot, PARAM))
            if not may:
                sides.found.changed("added", member.name)
            continue
        if tensor is None:
            note = " (the checkpoint has its optimizer state but no weight)"
            sides.found.lacks(replace(item, note=note), source in sides.wish.grown)
            continue
        blocks, grows = member.blocks, source in sides.wish.grown and tensor.shape != member.shape
        if grows:
            blocks, _ = restrict(member.blocks, whole(tensor.shape), tensor.shape)
        read_as = _read_as(sides, slot, replace(item, shape=tensor.shape) if grows else item, tensor)
        if read_as is not None:
            if grows:
                sides.kept_in.add((slot.key, PARAM, read_as))
            sides.wants.setdefault((slot.key, PARAM, read_as), []).append(Want(tensor, blocks, read_as))


def _read_as(sides: _Sides, slot: Slot, item: Item, tensor: LogicalTensor) -> str | None:
    """The element type in which to read a weight or state. None if it does not fit, which is noted."""
    dtype = slot.dtype if item.state == PARAM else slot.states.get(item.state, slot.dtype)
    placed = slot.placed.get(item.state)
    if placed is not None and placed.shape is not None:
        item = replace(item, shape=placed.shape)
    if tensor.shape != item.shape:
        sides.found.wrong.append(sides.target.words.other_shape(item, tensor.shape))
        if len(tensor.shape) == len(item.shape):
            sides.found.changed("resized", item.name)
        return None
    if tensor.dtype == dtype or (tensor.dtype, dtype) in EXACT:
        return dtype
    if slot.kind != "parameter" and (tensor.dtype, dtype) in ROUNDED:
        sides.found.rounded.append(item.name)
        return tensor.dtype
    what = sides.target.words.live(item)
    sides.found.wrong.append(f"{what} is {tensor.dtype} in the checkpoint and {dtype} here, which would lose bits")
    if (tensor.dtype, dtype) in ROUNDED:
        sides.found.changed("dtype", item.name, dtype)
    return None


# --- optimizer states ------------------------------------------------------------------------------------------------


def _states(sides: _Sides, slot: Slot) -> None:
    """Compare the optimizer states of one slot. All its members have the same states, and one value of 'step'."""
    if slot.asked is not None:
        if _only_weights(sides, slot.asked, slot):
            return
        _lacking_all(sides, slot)
    members = [(m, sides.catalog.parameters[sides.names[m.name]]) for m in slot.members if m.name in sides.names]
    if not members:
        return
    kept = {m.name: set(info.states) - {PARAM} for m, info in members}
    brought = set().union(*kept.values())
    if slot.asked is None and not brought and _steps_taken(sides.catalog) == 0:
        sides.scalars[slot.key] = {}
        return
    expects = _expected(sides, slot, brought)
    for member, _ in members:
        for state in sorted(expects - kept[member.name]):
            _lack(sides, slot, member, state)
            if not kept[member.name]:
                sides.found.changed("unfrozen", member.name)
        for state in sorted(kept[member.name] - expects - sides.asked.get(member.name, frozenset())):
            may = sides.wish.partial or sides.may_leave(member.name, state)
            sides.found.leaves(Item(slot.kind, member.name, member.shape, state), may)
        _unasked_values(sides, slot, member)
    values = _values(sides, slot, [(m, info) for m, info in members if kept[m.name] or info.scalars])
    for member, value in _values_lacking(sides, slot, members, values, bool(brought & expects)):
        _lack(sides, slot, member, value)
    if values or (brought & expects and slot.asked is None):
        sides.scalars[slot.key] = values
    if brought & expects or (values and slot.asked is None):
        _want_states(sides, slot, members, sorted(expects))


def _only_weights(sides: _Sides, asked: Asked, slot: Slot) -> bool:
    """Whether weights are all that a slot asks for, and all that the checkpoint has for it."""
    if asked.values or not asked.states <= _WEIGHTS:
        return False
    for member in slot.members:
        source = sides.names.get(member.name)
        info = None if source is None else sides.catalog.parameters[source]
        if info is None or info.scalars or not info.states.keys() <= _WEIGHTS:
            return False
    return True


def _unasked_values(sides: _Sides, slot: Slot, member: Member) -> None:
    """Refuse single values of torch's optimizers that have no place here. Those of DeepSpeed's optimizers ('step') may
    mean nothing to a torch optimizer, so for them there is only a note."""
    if slot.asked is None or sides.wish.partial:
        return
    for value in sorted(set(sides.catalog.parameters[sides.names[member.name]].scalars) - sides.asked[member.name]):
        if sides.may_leave(member.name, value):
            continue
        if sides.catalog.training_state.config:
            note = f"the optimizer here has no single value '{value}' of a parameter, so the checkpoint's stay unused"
            sides.found.notes.append(note)
        else:
            sides.found.leaves(Item(slot.kind, member.name, member.shape, value), False)


def _lacking_all(sides: _Sides, slot: Slot) -> None:
    """Note what a slot asks for of parameters that the checkpoint does not have."""
    if slot.asked is None:
        return
    for member in slot.members:
        if member.name not in sides.names:
            for state in sorted({*slot.asked.states, *slot.asked.values} - {PARAM}):
                _lack(sides, slot, member, state)


def _lack(sides: _Sides, slot: Slot, member: Member, state: str) -> None:
    may = sides.may_miss(member.name, state) and not _is_blank(slot, state)
    sides.found.lacks(Item(slot.kind, member.name, member.shape, state), may)


def _is_blank(slot: Slot, state: str) -> bool:
    return slot.asked is not None and state in slot.asked.blank


def _expected(sides: _Sides, slot: Slot, brought: set[str]) -> set[str]:
    """The states that the slot takes."""
    if slot.asked is not None:
        return set(slot.asked.states) - {PARAM}
    if (tensors := kept_for(slot, sides.target.groups)[0]) is not None:
        return set(tensors)
    sides.found.notes.append(f"the optimizer's states are not known beforehand; it is given {sorted(brought)}")
    return brought


def _values(sides: _Sides, slot: Slot, members: Sequence[tuple[Member, ParameterInfo]]) -> dict[str, Any]:
    """The values (such as 'step') that all members of a slot have, as far as the slot takes them."""
    if not members:
        return {}
    first, values = members[0][0], dict(members[0][1].scalars)
    for member, info in members[1:]:
        if dict(info.scalars) != values:
            sides.found.wrong.append(
                f"'{member.name}' has {values_text(info.scalars)} and '{first.name}' {values_text(values)}, but one "
                "flat buffer has one value here"
            )
            break
    taken = _values_taken(sides, slot)
    if taken is not None:
        values = {k: v for k, v in values.items() if k in taken}
    for name, dtype in (slot.asked.values if slot.asked is not None else {}).items():
        if name in values and dtype is not None and not holds(dtype, values[name]):
            words, item = sides.target.words, Item(slot.kind, first.name, first.shape, name)
            sides.found.wrong.append(words.not_held(words.value_of(item), values[name], dtype))
    return values


def _values_taken(sides: _Sides, slot: Slot) -> frozenset[str] | None:
    """Names of the values that the slot takes; None if unknown."""
    if slot.asked is not None:
        return frozenset(slot.asked.values)
    return kept_for(slot, sides.target.groups)[1]


def _values_lacking(
    sides: _Sides,
    slot: Slot,
    members: Sequence[tuple[Member, ParameterInfo]],
    values: Mapping[str, Any],
    any_states: bool,
) -> Iterator[tuple[Member, str]]:
    """The values that the slot takes and the checkpoint lacks. If no states of the optimizer are loaded, it needs no
    values."""
    if any_states or slot.asked is not None:
        for value in sorted((_values_taken(sides, slot) or frozenset()) - set(values)):
            yield from ((member, value) for member, _ in members)


def _want_states(
    sides: _Sides, slot: Slot, members: Sequence[tuple[Member, ParameterInfo]], states: Sequence[str]
) -> None:
    for state in states:
        having = [(m, info) for m, info in members if state in info.states]
        if not having and slot.asked is not None:
            continue
        placed = slot.placed.get(state)
        places = {} if placed is None else dict(zip(map(id, slot.members), placed.blocks, strict=True))
        dtype = slot.states.get(state, slot.dtype)
        # A state that is not loaded, since the caller allows it, stays as it is, or starts from zero if it is new.
        of_state = sides.wants.setdefault((slot.key, state, dtype), [])
        for member, info in having:
            if slot.asked is None and info.shape != member.shape:
                continue  # this is noted for its weights
            tensor = sides.catalog.tensors[info.name, state]
            item = Item(slot.kind, member.name, member.shape, state)
            if _read_as(sides, slot, item, tensor) is None:
                return
            of_state.append(Want(tensor, places.get(id(member), member.blocks), dtype))


def _steps_taken(catalog: Catalog) -> int | None:
    state = catalog.training_state
    return None if state.global_steps is None else state.global_steps - (state.skipped_steps or 0)


# --- what the other side has -----------------------------------------------------------------------------------------


def _trained(target: Target) -> set[str]:
    """The parameters that are trained here, on any rank."""
    trained = {m.name for s in target.slots if s.kind == "parameter" for m in s.members}
    return trained | {name for name, kind in target.elsewhere.items() if kind == "parameter"}


def _some_trained(sides: _Sides) -> None:
    """Refuse a load without strictness if all trained parameters are missing: that would be no resume."""
    trained = sorted(_trained(sides.target))
    if trained and not any(n in sides.names or sides.may_miss(n, PARAM) for n in trained):
        more = sides.target.words.unstrict
        sides.found.wrong.append(
            f"none of the {counted(len(trained), 'parameter')} trained here ('{trained[0]}', …) is in the checkpoint"
            + (f", {more}" if more else "")
        )


def _unused(sides: _Sides) -> None:
    """Note what the checkpoint has and nothing here takes."""
    used = {
        sides.names[member.name]
        for slot in sides.target.slots
        if slot.asked is None or PARAM in slot.asked.states
        for member in slot.members
        if member.name in sides.names
    }
    used |= {sides.names[name] for name in sides.target.elsewhere if name in sides.names}
    owners = _owners(sides)
    wish = sides.wish
    states = {} if wish.states else states_apart(sides.catalog.parameters, sides.catalog.parameters)
    for info in sides.catalog.parameters.values():
        if info.name in used or info.name in states:
            continue
        may = sides.may_leave(info.name)
        if info.name in owners and wish.strict and not may:
            _same_as_owner(sides, info, sides.catalog.parameters[owners[info.name]])
        else:
            free = may or wish.partial or not wish.strict or info.kind == "padding"
            if not free:
                sides.found.changed("removed", info.name)
            sides.found.leaves(Item(info.kind, info.name, info.shape), free)
    if not wish.states:
        return
    untrained = {m.name for s in sides.target.slots if s.kind != "parameter" for m in s.members}
    untrained |= {name for name, kind in sides.target.elsewhere.items() if kind != "parameter"}
    for live, source in sides.names.items() if untrained else ():
        if live in untrained:
            for state in sorted(set(sides.catalog.parameters[source].states) - {PARAM}):
                item = Item("", live, (), state, note=", which is not trained here")
                may = wish.partial or sides.may_leave(live, state)
                sides.found.leaves(item, may)
                if not may:
                    sides.found.changed("frozen", live)


def _owners(sides: _Sides) -> dict[str, str]:
    """The checkpoint's parameters that are other names of a tied one here -> the one that is restored.

    torch's state dicts have a tied parameter under each of its names, and so do checkpoints of them.
    """
    names = sides.names
    tied = {alias: owner for alias, owner in sides.target.tied.items() if owner in names}
    return {
        source: names[tied[alias]]
        for alias, source in match(sides.catalog, tied).items()
        if source not in names.values()
    }


def _same_as_owner(sides: _Sides, info: ParameterInfo, owner: ParameterInfo) -> None:
    """Have the plan check that the checkpoint has the same under a tied parameter's other name as under the one that is
    read."""
    for state in sorted(info.states):
        if state != PARAM and not sides.wish.states:
            continue
        one, other = sides.catalog.tensors[info.name, state], sides.catalog.tensors.get((owner.name, state))
        if other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
            has = "it has none" if other is None else f"it has {other.dtype} {list(other.shape)}"
            sides.found.wrong.append(
                f"'{info.name}' ({state}, {one.dtype} {list(one.shape)}) is tied to '{owner.name}' here, and {has} in "
                "the checkpoint"
            )
        else:
            sides.found.tied.append((one, other))
