"""Put the parts of a model together: local tensors of all model-parallel ranks as fragments of logical ones.

What several ranks hold is taken from the first of them. The others' copies are kept in the catalog as copies. A few
elements of each are compared at once, since copies that have drifted apart are not copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ucp.catalog import LogicalTensor, ParameterInfo, ParamGroup, TrainingState
from ucp.errors import DamagedCheckpoint
from ucp.formats.deepspeed.experts import group_places, ordered
from ucp.formats.deepspeed.read.mp_rank import LocalModel
from ucp.formats.shared.apart import COMPUTED_ANEW, is_apart
from ucp.geometry import Blocks, compose, concat, numel
from ucp.parallel.mesh import Coordinate
from ucp.spec.places import Placed, Placements, held_first


@dataclass
class _Gathered:
    """A logical tensor's pieces so far: (blocks, bases) of each local tensor."""

    placed: Placed
    dtype: str
    first: list[tuple[Blocks, np.ndarray]] = field(default_factory=list)
    again: list[tuple[Blocks, np.ndarray]] = field(default_factory=list)

    def tensor(self, state: str, pieces: list[tuple[Blocks, np.ndarray]]) -> LogicalTensor:
        blocks = concat((b for b, _ in pieces), len(self.placed.shape))
        bases = pieces[0][1] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.int64), *(b for _, b in pieces)])
        return LogicalTensor(self.placed.name, state, self.placed.shape, self.dtype, blocks, bases)


def assemble(
    parts: Mapping[Coordinate, LocalModel], placements: Placements
) -> tuple[dict[str, ParameterInfo], dict[tuple[str, str], LogicalTensor], tuple[LogicalTensor, ...], TrainingState]:
    """Parameters, tensors, copies and training state of the whole model.

    Raises DamagedCheckpoint if parts disagree about a parameter that they share.
    """
    parameters: dict[str, ParameterInfo] = {}
    gathered: dict[tuple[str, str], _Gathered] = {}
    first = held_first(placements)
    everything = [(at, part, local) for at, part in parts.items() for local in part.parameters.values()]
    everything.sort(key=lambda one: numel(one[2].shape) == 0)  # a shard without elements tells nothing of the parameter
    for at, part, local in everything:
        for placed, mask in zip(placements[at, local.name], first[at, local.name], strict=True):
            if not numel(local.shape) and placed.name in parameters:
                continue
            info = _info(local, placed)
            known = parameters.setdefault(placed.name, info)
            if known is not info:
                parameters[placed.name] = _joined(known, info, part)
            own, again = placed.blocks.take(mask), placed.blocks.take(~mask)
            for state in local.states:
                tensor = part.tensors[local.name, state]
                found = gathered.setdefault((placed.name, state), _Gathered(placed, tensor.dtype))
                if found.dtype != tensor.dtype:
                    raise DamagedCheckpoint(
                        f"{part.model.path}: '{local.name}' ({state}) is {tensor.dtype}, and {found.dtype} on "
                        "another model-parallel rank; files of two runs are mixed"
                    )
                for pieces, outer in ((found.first, own), (found.again, again)):
                    if len(outer):
                        blocks, index = compose(tensor.blocks, outer, tensor.shape, placed.shape)
                        pieces.append((blocks, tensor.bases[index]))
    tensors = {key: found.tensor(key[1], found.first) for key, found in gathered.items()}
    copies = tuple(found.tensor(key[1], found.again) for key, found in gathered.items() if found.again)
    copies += tuple(copy for part in parts.values() for copy in part.copies)
    return parameters, tensors, copies, _state(parts, placements)


def _info(local: ParameterInfo, placed: Placed) -> ParameterInfo:
    kind = "padding" if placed.padding and (local.kind != "buffer" or is_apart(local.name)) else local.kind
    aliases = () if placed.padding else local.aliases
    return replace(local, name=placed.name, shape=placed.shape, kind=kind, aliases=aliases)


def _joined(known: ParameterInfo, other: ParameterInfo, part: LocalModel) -> ParameterInfo:
    """What two ranks say of one parameter; they must agree."""
    for what, a, b in (
        ("kind", known.kind, other.kind),
        ("shape", list(known.shape), list(other.shape)),
        ("optimizer values", _kept(known.scalars), _kept(other.scalars)),
        ("states", sorted(known.states), sorted(other.states)),
    ):
        if a != b:
            raise DamagedCheckpoint(
                f"{part.model.path}: the {what} of '{known.name}' are {b}, and {a} on another model-parallel rank; "
                "files of two runs are mixed"
            )
    return replace(known, aliases=tuple(dict.fromkeys((*known.aliases, *other.aliases))))


def _kept(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in COMPUTED_ANEW}


def _state(parts: Mapping[Coordinate, LocalModel], placements: Placements) -> TrainingState:
    """The first part's training state, with the param groups of all parts, and the scheduler of one that has all."""
    first = parts[min(parts)].training_state
    fullest = max((parts[at].training_state for at in sorted(parts)), key=lambda state: len(state.param_groups))
    every = fullest.param_groups
    names: list[dict[str, None]] = [{} for _ in every]
    for at, part in parts.items():
        groups = part.training_state.param_groups
        places = group_places([*map(_is_of_experts, groups)], [*map(_is_of_experts, every)])
        if places is None:
            raise DamagedCheckpoint(
                f"{part.model.path}: has {len(groups)} param groups, and {len(names)} on another model-parallel "
                "rank; files of two runs are mixed"
            )
        for g, group in zip(places, groups, strict=True):
            _check_options(part, g, group, every[g])
            names[g].update(dict.fromkeys(placed.name for n in group.names for placed in placements[at, n]))
    joined = (ParamGroup(tuple(ordered(n)), g.options) for n, g in zip(names, every, strict=True))
    return replace(first, param_groups=tuple(joined), lr_scheduler=fullest.lr_scheduler)


def _is_of_experts(group: ParamGroup) -> bool:
    return bool((group.options or {}).get("moe"))


def _check_options(part: LocalModel, g: int, group: ParamGroup, first: ParamGroup) -> None:
    """Raise DamagedCheckpoint if a part's param group has other hyperparameters than the first part's."""
    for key, value in (group.options or {}).items():
        other = (first.options or {}).get(key, value)
        if type(value) in (bool, int, float, str) and type(other) in (bool, int, float, str) and value != other:
            raise DamagedCheckpoint(
                f"{part.model.path}: '{key}' of param group {g} is {value!r}, and {other!r} on the first "
                "model-parallel rank; files of two saves are mixed"
            )
