"""What FSDP1 says of the shards of its flat parameters, as a program saved it: a unit's ``FlatParamShardMetadata``.

Each rank's has the names, shapes, strides and numbers of elements of the parameters of which that rank has elements,
and which of each they are (torch distributed/fsdp/_flat_param.py: shard_metadata). So those of all ranks have all
parameters of a unit, in the order of its vector. A program keeps one for each unit, by the unit's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ucp.errors import DamagedCheckpoint
from ucp.formats.shared.flat import FlatMember, chunks_of, starts_of, unit_of, unwrapped
from ucp.formats.shared.numbered import STATE
from ucp.formats.shared.state_dicts import Entries
from ucp.geometry import numel
from ucp.printable import short
from ucp.storage.torch_pt.values import Standin

_FIELDS = ("param_names", "param_shapes", "param_strides", "param_contiguities", "param_numels", "param_offsets")
_CLASS = "FlatParamShardMetadata"


def is_metadata(value: Any) -> bool:
    """Whether it is a unit's metadata, or that of several units by name."""
    return _is_one(value) or (isinstance(value, Mapping) and bool(value) and all(map(_is_one, value.values())))


def _is_one(value: Any) -> bool:
    if isinstance(value, Standin):
        return value.class_name == _CLASS
    return isinstance(value, Mapping) and {"param_names", "param_shapes", "param_offsets"} <= value.keys()


def units_of(graphs: Sequence[Any], paths: Sequence[Path], entries: Entries) -> dict[str, Sequence[FlatMember]]:
    """The parameters of each unit that the files tell, in the order of its vector.

    Raises DamagedCheckpoint where ranks contradict each other, or a vector among the entries.
    """
    told: dict[str, list[dict[str, Any]]] = {}
    for graph, path in zip(graphs, paths, strict=True):
        for value in graph.values() if isinstance(graph, Mapping) else ():
            if is_metadata(value):
                for name, one in ({"": value} if _is_one(value) else value).items():
                    told.setdefault(_unit(str(name)), []).append(_fields(one, path))
    found: dict[str, Sequence[FlatMember]] = {
        unit: _merged(unit, ranks, paths[0].parent) for unit, ranks in told.items()
    }
    for key, entry in entries.entries.items():
        unit = unit_of(str(entry.path[-1])) if STATE not in entry.path else None
        if unit is not None and unit in told:
            _check(paths, key, entries, found[unit], told[unit])
    return found


def _unit(name: str) -> str:
    """The unit that a program's name for it means: a module's name, or that of its flat parameter."""
    inner = unit_of(name)
    return unwrapped(f"{name}.").lstrip(".") if inner is None else inner


def _fields(one: Any, path: Path) -> dict[str, Any]:
    found = dict(zip(_FIELDS, one.class_args, strict=False)) if isinstance(one, Standin) else dict(one)
    names, shapes = found.get("param_names"), found.get("param_shapes")
    offsets, strides = found.get("param_offsets"), found.get("param_strides")
    if strides is None:
        strides = [None for _ in shapes or ()]
    lists = (names, shapes, offsets, strides)
    if not all(isinstance(each, (list, tuple)) and len(each) == len(names or ()) for each in lists):
        raise DamagedCheckpoint(f"{path}: FSDP1's shard metadata {short(found)} has not as many shapes as names")
    numbers = [n for row in (*(shapes or ()), *(offsets or ()), *(s for s in strides if s is not None)) for n in row]
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers) or any(len(pair) != 2 for pair in offsets or ()):
        raise DamagedCheckpoint(f"{path}: FSDP1's shard metadata {short(found)} has impossible numbers")
    return {"names": names, "shapes": shapes, "offsets": offsets, "strides": strides}


def _merged(unit: str, ranks: Sequence[Mapping[str, Any]], folder: Path) -> list[FlatMember]:
    members: dict[str, FlatMember] = {}
    for own in ranks:
        for name, shape, strides in zip(own["names"], own["shapes"], own["strides"], strict=True):
            whole = f"{unit}{unwrapped(str(name))}"
            member = FlatMember(whole, tuple(shape), None if strides is None else tuple(strides))
            if members.setdefault(whole, member) != member:
                raise DamagedCheckpoint(f"{folder}: ranks have other shapes of '{whole}'; files of two runs are mixed")
    return list(members.values())


def _check(
    paths: Sequence[Path], key: str, entries: Entries, members: Sequence[FlatMember], ranks: Sequence[Mapping[str, Any]]
) -> None:
    """Raise DamagedCheckpoint where a rank's elements of a parameter are not those that the vector's chunks mean."""
    vector = entries.tensors[key]
    starts, chunks = starts_of(members, vector), chunks_of(vector)
    if starts is None or len(ranks) != len(paths):
        return  # what is in it is told otherwise, or not at all
    unit = unit_of(str(entries.entries[key].path[-1])) or ""
    place = {m.name: (start, numel(m.shape)) for m, start in zip(members, starts, strict=True)}
    for own, path in zip(ranks, paths, strict=True):
        said = {f"{unit}{unwrapped(str(n))}": tuple(pair) for n, pair in zip(own["names"], own["offsets"], strict=True)}
        fits = any(
            said
            == {
                name: (max(a, start) - start, min(b, start + count) - start - 1)
                for name, (start, count) in place.items()
                if max(a, start) < min(b, start + count)
            }
            for a, b in [*chunks, (0, 0)]
        )
        if not fits:
            raise DamagedCheckpoint(
                f"{path}: FSDP1's shard metadata of '{key}' says that the rank has {short(said)}, and none of the "
                "vector's chunks has these; files of two runs are mixed"
            )
