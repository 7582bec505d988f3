"""States that an optimizer under FSDP1 keeps by itself: each rank has its own part of them, under the same number.

A number is a unit's flat parameter; with ``use_orig_params`` it is a parameter, and a rank has those elements of it
that lie in its chunk of the flat parameter, or none. Either way, the ranks' parts one after the other are the whole,
with what the last chunks are padded by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ucp.catalog import LogicalTensor
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.accelerate.parts import Parts, model_shapes
from ucp.formats.shared import flat, numbered
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.flat import FlatMember
from ucp.formats.shared.numbered import GROUPS, MEMBERS, STATE
from ucp.formats.shared.roles import MODEL
from ucp.formats.shared.state_dicts import Entries
from ucp.geometry import Blocks, numel
from ucp.storage.torch_pt.values import TensorRef


def in_parts(ranks: Sequence[Mapping[str, Any]], entries: Entries) -> bool:
    """Whether these states of all ranks are parts that FSDP1 has left to them."""
    members = [member for group in ranks[0][GROUPS] for member in group[MEMBERS]]
    if not members or not all(type(member) is int for member in members):
        return False
    tensors = [
        value
        for own in ranks
        for state in own[STATE].values()
        if isinstance(state, Mapping)
        for value in state.values()
        if not isinstance(value, TensorRef) or len(value.shape) != 0
    ]
    if not all(isinstance(value, TensorRef) and len(value.shape) == 1 for value in tensors):
        return False
    model = [entry for key, entry in entries.entries.items() if key in entries.tensors and entry.path[0] == MODEL]
    if any(flat.unit_of(str(entry.path[-1])) is not None for entry in model):
        return True
    return bool(tensors) and any(len(entry.shape or ()) > 1 for entry in model)


def whole_states(ranks: Sequence[Mapping[str, Any]], paths: Sequence[Path], parts: Parts) -> dict[str, Any]:
    """The optimizer's state dict by names, with whole states: of flat parameters, or of parameters.

    Raises DamagedCheckpoint where ranks have other groups or element types, Unsupported where nothing tells the names.
    """
    first = ranks[0]
    for own, path in zip(ranks, paths, strict=True):
        if [group[MEMBERS] for group in own[GROUPS]] != [group[MEMBERS] for group in first[GROUPS]]:
            raise DamagedCheckpoint(f"{path}: has other groups than '{paths[0].name}'; files of two runs are mixed")
    members = [member for group in first[GROUPS] for member in group[MEMBERS]]
    states = {number: _joined(number, ranks, paths, parts.entries.builder) for number in members}
    optimizer = {**first, STATE: {number: state for number, state in states.items() if state}}
    wanted = _wanted(parts, len(members), len(ranks), paths[0])
    lengths = {name: (length,) for name, (length, _) in wanted.items()}
    given = parts.request.options.get("param_names")
    try:
        found = numbered.named(optimizer, numbered.ModelTensors(lengths, lambda: list(lengths), given), str(paths[0]))
    except numbered.Unnamed as reason:
        raise Unsupported(
            f"{parts.folder}: the optimizer numbers what FSDP1 has given its ranks, and nothing tells what the numbers "
            f"are: {reason}; give param_names (--param-names FILE), or save what FSDP.optim_state_dict returns"
        ) from None
    for name, state in found[STATE].items():
        for key, value in state.items():
            if isinstance(value, LogicalTensor):
                state[key] = flat.taken(parts.folder, value, 0, wanted[name][1])
    return found


def _wanted(parts: Parts, count: int, world: int, path: Path) -> dict[str, tuple[int, FlatMember]]:
    """What the numbers may be, in the module's order: name -> the length of all ranks' parts, and what is in them."""
    entries, prefix = parts.entries, f"{MODEL}."
    vectors = {
        key.removeprefix(prefix): tensor
        for key, tensor in entries.tensors.items()
        if key.startswith(prefix) and flat.unit_of(key) is not None
    }
    shapes = parts.request.options.get("param_shapes")
    members = {m.name: m for found in (parts.units if shapes is None else {}).values() for m in found}
    members.update({name: FlatMember(name, tuple(shape)) for name, shape in (shapes or {}).items()})
    plain = [name for name in model_shapes(parts) if name not in vectors]
    by_number = bool(members) and members.keys() <= set(plain)  # use_orig_params: the model has all names, too
    if vectors and count == len(vectors) and not by_number:
        return {
            name: (max(b - a for a, b in flat.chunks_of(vector)) * world, FlatMember(name, vector.shape))
            for name, vector in vectors.items()
        }
    if vectors and not members:
        flat.refuse(path, vectors)
    if not members:
        members = {name: FlatMember(name, shape) for name, shape in model_shapes(parts).items()}
    order = [name for name in plain if name in members]
    return {name: (numel(members[name].shape), members[name]) for name in dict.fromkeys([*order, *members])}


def _joined(number: int, ranks: Sequence[Mapping[str, Any]], paths: Sequence[Path], builder: Builder) -> dict[str, Any]:
    """The states of one number: vectors of all ranks' parts, and single values, which all ranks have alike."""
    held = [own[STATE].get(number, {}) for own in ranks]
    keys = dict.fromkeys(key for state in held for key in state)
    return {key: _of_key(f"{number}.{key}", [state.get(key) for state in held], paths, builder) for key in keys}


def _of_key(name: str, values: Sequence[Any], paths: Sequence[Path], builder: Builder) -> Any:
    refs = [value for value in values if value is not None]
    if not isinstance(refs[0], TensorRef):
        if any(value != refs[0] for value in refs):
            raise DamagedCheckpoint(f"{paths[0].parent}: ranks have different values of '{name}'; two steps are mixed")
        return refs[0]
    if not all(
        isinstance(ref, TensorRef) and (ref.dtype, len(ref.shape)) == (refs[0].dtype, len(refs[0].shape))
        for ref in refs
    ):
        raise DamagedCheckpoint(f"{paths[0].parent}: '{name}' has another element type on different ranks")
    if not refs[0].shape:
        if len({builder.scalar(ref) for ref in refs}) != 1:
            raise DamagedCheckpoint(f"{paths[0].parent}: ranks have different values of '{name}'; two steps are mixed")
        return refs[0]
    full = [ref for ref in refs if ref.numel]
    sizes = np.array([ref.numel for ref in full], np.int64).reshape(-1, 1)
    offsets = np.cumsum(sizes, axis=0) - sizes
    strides = np.array([ref.strides for ref in full], np.int64).reshape(-1, 1)
    buffers = np.array([builder.file(ref) for ref in full], np.int64)
    blocks = Blocks(offsets, sizes, np.zeros(len(full), np.int64), strides, buffers)
    bases = np.array([ref.offset for ref in full], np.int64)
    return LogicalTensor("", "", (int(sizes.sum()),), refs[0].dtype, blocks, bases)
