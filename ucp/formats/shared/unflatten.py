"""A state dict's entries with parameters in the place of FSDP1's flat vectors (`ucp.formats.shared.flat`).

LOCAL_STATE_DICT saves a vector without the names and shapes in it. These are told, in this order, by the caller
(``param_shapes``), by the shards' metadata that a program has saved with them, and by the shapes of the optimizer's
states where those have names. With ``use_orig_params``, a state dict also has each parameter's elements on one rank
under the parameter's own name: they are checked against the vector, and left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ucp.catalog import LogicalTensor
from ucp.errors import DamagedCheckpoint, Mismatch, Unsupported
from ucp.formats.shared import flat
from ucp.formats.shared.flat import FlatMember, unit_of
from ucp.formats.shared.numbered import GROUPS, MEMBERS, STATE
from ucp.formats.shared.roles import StateEntry
from ucp.formats.shared.state_dicts import Entries
from ucp.geometry import Shape, numel


def unflatten(
    into: Entries,
    path: Path,
    shapes: Mapping[str, Shape] | None = None,
    units: Mapping[str, Sequence[FlatMember]] | None = None,
    unsaid: str = "",
) -> list[str]:
    """Put the parameters, and their optimizer states, in the place of all flat vectors among the entries.

    shapes: of the module's parameters, in its order, if the caller tells. units: what the files tell, by unit.
    unsaid: how entries' names begin that no file has so.

    Returns what to tell of it. Raises Unsupported for a flat vector of which nothing tells what is in it, Mismatch
    where the caller's shapes don't fit it, DamagedCheckpoint where the files' own don't.
    """
    model = _FlatModel.of(into, path, unsaid)
    if model is None:
        return []
    members = _members(into, model, shapes, units or {})
    gone = _parts(into, model, members)
    order = {name: k for k, name in enumerate([*(shapes or ()), *model.own])}
    found = [
        (member.name, tensor)
        for key, unit in model.vectors.items()
        for member, tensor in flat.lifted(path, key, into.tensors[key], members[unit])
    ]
    found.sort(key=lambda item: order.get(item[0], len(order)))
    entries, tensors = dict[str, StateEntry](), dict[str, LogicalTensor]()
    for key, entry in into.entries.items():
        if key in model.vectors:  # all parameters at the place of the first vector, in the module's order
            for name, tensor in found:
                at = (*model.root, name)
                entries[_key(at)], tensors[_key(at)] = StateEntry(at, tensor.shape), tensor
            found = []
        elif entry.path[:-1] != model.root or entry.path[-1] not in gone:
            entries[key] = entry
            if key in into.tensors:
                tensors[key] = into.tensors[key]
    into.entries, into.tensors = entries, tensors
    _unflatten_states(into, path, members)
    tied = sorted(gone - {member.name for own in members.values() for member in own})
    alias = f"{_some(tied)} are one rank's parts of parameters that are tied to others, and are left out"
    return [*([alias] if tied else []), *_without_lost_states(into), *_assumed(members.values())]


@dataclass(frozen=True)
class _FlatModel:
    """The model with flat vectors. root: the keys that lead to it. vectors: entry -> unit. own: the shapes of the
    model's other tensors by name. unsaid: how entries' names begin that messages leave out."""

    path: Path
    root: tuple[Any, ...]
    vectors: Mapping[str, str]
    own: Mapping[str, Shape]
    unsaid: str = ""

    @classmethod
    def of(cls, into: Entries, path: Path, unsaid: str) -> _FlatModel | None:
        """The model among the entries, None without flat vectors. Raises Unsupported for several."""
        vectors = {
            key: unit
            for key, entry in into.entries.items()
            if key in into.tensors and STATE not in entry.path and (unit := unit_of(str(entry.path[-1]))) is not None
        }
        roots = {into.entries[key].path[:-1] for key in vectors}
        if not vectors:
            return None
        if len(roots) > 1 or any(len(into.tensors[key].shape) != 1 for key in vectors):
            raise Unsupported(f"{path}: has FSDP1's flat parameters of several models, or such with dimensions")
        (root,) = roots
        own = {
            str(entry.path[-1]): entry.shape
            for key, entry in into.entries.items()
            if entry.path[:-1] == root and key not in vectors and entry.shape is not None
        }
        return cls(path, root, vectors, own, unsaid)

    def unit(self, name: str) -> str | None:
        """The innermost unit that a parameter is in."""
        return max((unit for unit in self.vectors.values() if name.startswith(unit)), key=len, default=None)


def _key(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", …" if names[3:] else "")


def _members(
    into: Entries, model: _FlatModel, shapes: Mapping[str, Shape] | None, units: Mapping[str, Sequence[FlatMember]]
) -> dict[str, Sequence[FlatMember]]:
    """What is in the vector of each unit."""
    found: dict[str, Sequence[FlatMember]] = {}
    by_unit: dict[str, list[FlatMember]] = {unit: [] for unit in model.vectors.values()}
    for name, shape in (_shapes_of_states(into, model) if shapes is None else shapes).items():
        unit = model.unit(name)
        if unit is not None:
            by_unit[unit].append(FlatMember(name, shape))
    for key, unit in model.vectors.items():
        told, vector = units.get(unit) if shapes is None else None, into.tensors[key]
        mine = by_unit[unit] if told is None else told
        # Those with tensors of their own may be such that FSDP was told to ignore.
        ways = [mine, [member for member in mine if member.name not in model.own]]
        fitting = next((way for way in ways if flat.starts_of(way, vector) is not None), None)
        if fitting is None and told is None and shapes is None:
            flat.refuse(model.path, [key.removeprefix(model.unsaid)])
        if fitting is None:
            listed = ", ".join(f"'{m.name}' {list(m.shape)}" for m in mine[:3]) + (", …" if mine[3:] else "")
            raise (DamagedCheckpoint if shapes is None else Mismatch)(
                f"{model.path}: FSDP1's flat parameter '{key}' has {vector.shape[0]} elements, and its parameters "
                f"({listed or 'none are told'}) have {sum(numel(m.shape) for m in mine)}, which does not fill it; give "
                "the shapes of the model that was saved, in its module's order"
            )
        flat.check_padding(model.path, key, vector, fitting, into.builder)
        found[unit] = fitting
    return found


def _shapes_of_states(into: Entries, model: _FlatModel) -> dict[str, Shape]:
    """The shapes of an optimizer's states that have the parameters' names, in the module's order: that of the model's
    own entries, if it has all of them, else that in which FSDP has unflattened them."""
    shapes: dict[str, Shape] = {}
    for entry in into.entries.values():
        where = entry.path.index(STATE) if STATE in entry.path else -1
        if where < 0 or len(entry.path) != where + 3 or not isinstance(entry.path[where + 1], str):
            continue
        if entry.shape is not None and entry.path[where + 2] != "step" and unit_of(entry.path[where + 1]) is None:
            shapes.setdefault(entry.path[where + 1], entry.shape)
    if model.own.keys() >= shapes.keys():
        return {name: shapes[name] for name in model.own if name in shapes}
    return shapes


def _parts(into: Entries, model: _FlatModel, members: Mapping[str, Sequence[FlatMember]]) -> set[str]:
    """Names in the model of one rank's parts of what vectors have: of their parameters, and of such as are tied to
    them. Raises Mismatch where a part is not as long as a rank's share of its parameter."""
    shares: dict[str, dict[str, set[int]]] = {}
    for key, unit in model.vectors.items():
        vector = into.tensors[key]
        starts, chunks = flat.starts_of(members[unit], vector) or [], flat.chunks_of(vector)
        shares[unit] = {
            member.name: {max(0, min(b, start + numel(member.shape)) - max(a, start)) for a, b in chunks}
            for member, start in zip(members[unit], starts, strict=True)
        }
    gone: set[str] = set()
    known = {name for own in shares.values() for name in own}
    for name, shape in model.own.items():
        own = shares.get(model.unit(name) or "", {})
        if name in known:
            lengths = next(found[name] for found in shares.values() if name in found)
            if len(shape) != 1 or shape[0] not in lengths:
                raise Mismatch(
                    f"{model.path}: '{name}' has a part of {list(shape)} on one rank, and by the shapes that are told "
                    f"a rank has one of {sorted(lengths)} elements; give those of the model that was saved"
                )
            gone.add(name)
        elif len(shape) == 1 and own.keys() & model.own.keys():
            last = name.rpartition(".")[2]
            alike = set().union(*(n for other, n in own.items() if other.rpartition(".")[2] == last))
            if shape[0] == 0 or shape[0] in alike:
                gone.add(name)
    return gone


def _unflatten_states(into: Entries, path: Path, members: Mapping[str, Sequence[FlatMember]]) -> None:
    """The same for the states that an optimizer keeps of flat vectors. Single values are each parameter's."""
    entries, tensors = dict[str, StateEntry](), dict[str, LogicalTensor]()
    for key, entry in into.entries.items():
        where = entry.path.index(STATE) if STATE in entry.path else -1
        unit = unit_of(str(entry.path[where + 1])) if 0 <= where < len(entry.path) - 1 else None
        held = into.tensors.get(key)
        if unit is None or unit not in members:
            entries[key] = _regrouped(entry, members)
            if held is not None:
                tensors[key] = held
            continue
        found: Iterable[tuple[FlatMember, LogicalTensor | None]] = [(member, held) for member in members[unit]]
        if held is not None and numel(held.shape) != 1:
            found = flat.lifted(path, key, held, members[unit])
        for member, tensor in found:
            new = (*entry.path[: where + 1], member.name, *entry.path[where + 2 :])
            entries[_key(new)] = StateEntry(new, None if tensor is None else tensor.shape, entry.value)
            if tensor is not None:
                tensors[_key(new)] = tensor
    into.entries, into.tensors = entries, tensors


def _without_lost_states(into: Entries) -> list[str]:
    """Take out an optimizer's states that still have numbers: each rank had its own part under the same number, and of
    tensors that are no DTensors, DCP keeps one rank's."""
    roots = {
        entry.path[: entry.path.index(STATE)]
        for key, entry in into.entries.items()
        if key in into.tensors and STATE in entry.path[:-1] and _is_number(entry.path[entry.path.index(STATE) + 1])
    }
    for root in roots:
        for key in [key for key, entry in into.entries.items() if entry.path[: len(root)] == root]:
            into.entries.pop(key)
            into.tensors.pop(key, None)
    return [
        f"the optimizer '{_key(root)}' is left out: under FSDP1 it numbers its states, each rank has its own part of "
        "them, and the checkpoint has one rank's; save what FSDP.optim_state_dict returns"
        for root in sorted(roots)
    ]


def _is_number(key: object) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and key.isdecimal())


def _assumed(units: Iterable[Sequence[FlatMember]]) -> list[str]:
    """What to tell of parameters that may have lain in memory in channels_last, which shapes alone don't say."""
    doubtful = [member.name for unit in units for member in unit if member.strides is None and len(member.shape) >= 4]
    if not doubtful:
        return []
    return [
        f"{_some(doubtful)} are read as row-major; if the model that was saved had them in channels_last, their "
        "elements are in another order"
    ]


def _regrouped(entry: StateEntry, members: Mapping[str, Sequence[FlatMember]]) -> StateEntry:
    """A param group's list of parameters, with the parameters in the place of flat vectors."""
    if not (isinstance(entry.value, list) and entry.path[-1] == MEMBERS and GROUPS in entry.path):
        return entry
    names: list[object] = []
    for name in entry.value:
        unit = unit_of(name) if isinstance(name, str) else None
        names += [name] if unit is None or unit not in members else [member.name for member in members[unit]]
    return replace(entry, value=names)
