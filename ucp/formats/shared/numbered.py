"""The names of parameters that a torch optimizer's state dict knows by numbers alone.

torch numbers parameters through the param groups in turn. These decide, in this order, which parameter a number is:

1. names that the optimizer recorded itself (torch's ``param_names``), else those that the caller gives, if they are as
   many in every group and fit the states' shapes; a group that follows the caller's module is taken in the order of the
   checkpoint's (`ucp.formats.nouns.ModuleOrder`), unless that is the alphabet's, which tools make (`readings`);
2. the module's own order: where all parameters are in one group, they are in that order; else parameters of one shape
   are, if one group has all of them. So decayed matrices and undecayed vectors are told apart, and two groups of
   matrices are not. A shape that one parameter alone has needs no order.

What neither decides is refused: a guess would give a parameter another one's moments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucp.catalog import LogicalTensor, bare
from ucp.errors import DamagedCheckpoint
from ucp.formats.nouns import by_module
from ucp.geometry import Shape, numel
from ucp.storage.torch_pt.values import TensorRef

GROUPS, STATE, MEMBERS, NAMES = "param_groups", "state", "params", "param_names"
# Buffers of torch's own modules: among a module's tensors, and never an optimizer's.
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Unnamed(Exception):
    """Nothing tells which parameter a number is; the text says why."""


@dataclass(frozen=True)
class ModelTensors:
    """The tensors that may be an optimizer's parameters.

    shapes: of all tensors by name, tied ones once.
    order: gives the names as the module lists its parameters, or None if nothing tells. Called only if needed.
    given: each group's names, as the caller gives them.
    """

    shapes: Mapping[str, Shape]
    order: Callable[[], Sequence[str] | None]
    given: Sequence[Sequence[str]] | None = None


def is_optimizer(value: Any) -> bool:
    """Whether it is what an optimizer's ``state_dict()`` returns, by numbers or by names."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get(STATE), Mapping)
        and isinstance(value.get(GROUPS), list)
        and all(isinstance(group, Mapping) and isinstance(group.get(MEMBERS), list) for group in value[GROUPS])
    )


def named(optimizer: Mapping[str, Any], model: ModelTensors, where: str) -> dict[str, Any]:
    """The state dict with names for numbers. One that has names already only loses its ``param_names``.

    Raises Unnamed, and DamagedCheckpoint for numbers that contradict each other. where: the file, for messages.
    """
    groups = optimizer[GROUPS]
    members = [member for group in groups for member in group[MEMBERS]]
    if len(set(map(str, members))) != len(members):
        raise DamagedCheckpoint(f"{where}: a parameter is in two param groups, or twice in one")
    stray = [key for key in optimizer[STATE] if key not in set(members)]
    if stray:
        raise DamagedCheckpoint(f"{where}: the optimizer has a state of {stray[0]!r}, which is in no param group")
    if all(isinstance(member, str) for member in members):
        names = dict(zip(members, members, strict=True))
    elif not all(type(member) is int for member in members):
        raise DamagedCheckpoint(f"{where}: its param groups hold neither numbers nor names")
    else:
        names = _names(optimizer, model)
    return {
        **{key: value for key, value in optimizer.items() if key not in (STATE, GROUPS)},
        STATE: {names[key]: value for key, value in optimizer[STATE].items()},
        GROUPS: [
            {**{k: v for k, v in group.items() if k != NAMES}, MEMBERS: [names[member] for member in group[MEMBERS]]}
            for group in groups
        ],
    }


def _names(optimizer: Mapping[str, Any], model: ModelTensors) -> dict[int, str]:
    groups = [list(group[MEMBERS]) for group in optimizer[GROUPS]]
    shapes = {number: _shape(optimizer[STATE].get(number, {})) for group in groups for number in group}
    recorded = [group.get(NAMES) for group in optimizer[GROUPS]]
    by_optimizer = [_bare(recorded, model.shapes)] if all(recorded) else []
    by_caller = [] if model.given is None else readings(model.given, model.order() or ())
    for given in (by_optimizer, by_caller):
        pairs = only_fitting(groups, given, lambda found: _fit(found, shapes, model.shapes))
        if pairs is not None:
            return pairs
    order = _order(model)
    pool = [name for name in order or model.shapes if name in model.shapes and _may_be_trained(name)]
    if order is not None and len(groups) == 1 and len(groups[0]) == len(pool):
        pairs = dict(zip(groups[0], pool, strict=True))
        if not _fit(pairs, shapes, model.shapes):
            raise Unnamed("its states' shapes are not those of the module's parameters in their order")
        return pairs
    return _by_shape(groups, shapes, pool, model.shapes, ordered=order is not None)


def readings(given: Sequence[Sequence[str]], module: Sequence[str]) -> list[list[Sequence[str]]]:
    """The orders in which an optimizer may have numbered the parameters of the caller's groups.

    module: the names of the checkpoint's model in the order of its file. Modules seldom have their parameters in
    alphabetical order, and tools that sort a state dict by name always do. So a file in that order proves nothing, and
    the caller's own order is possible, too.
    """
    here = [by_module(names, module) for names in given]
    same = all(list(own) == list(names) for own, names in zip(here, given, strict=True))
    return [here] if same or list(module) != sorted(module) else [here, [list(names) for names in given]]


def only_fitting(
    groups: Sequence[Sequence[int]],
    possible: Sequence[Sequence[Sequence[str]]],
    fits: Callable[[Mapping[int, str]], bool],
) -> dict[int, str] | None:
    """Which name each number has, by the only order that fits; None if none does. Raises Unnamed if several do."""
    found = []
    for names in possible:
        if [len(own) for own in names] == [len(group) for group in groups]:
            pairs = dict(zip((n for g in groups for n in g), (name for own in names for name in own), strict=True))
            if fits(pairs):
                found.append(pairs)
    if len(found) > 1:
        raise Unnamed(
            "the checkpoint has the model's names in alphabetical order, as tools sort them, and the run's module has "
            "another, and both fit the states' shapes"
        )
    return found[0] if found else None


def _bare(recorded: Sequence[Any], known: Mapping[str, Shape]) -> list[list[str]]:
    """Recorded names without what wrappers put before them, where the model's are known so only."""
    return [[name if name in known else bare(str(name)) for name in names] for names in recorded]


def _may_be_trained(name: str) -> bool:
    return name.rpartition(".")[2] not in BUFFERS


def _order(model: ModelTensors) -> Sequence[str] | None:
    """The module's order: that of the names that the caller gives as one group, else what the checkpoint tells."""
    if model.given is not None and len(model.given) == 1 and set(model.given[0]) <= model.shapes.keys():
        return by_module(model.given[0], model.order() or ())
    return model.order()


def _shape(state: Mapping[str, Any]) -> Shape | None:
    """A parameter's shape, as its states have it; None if no state tells it. Step counts are single values."""
    tensors = (TensorRef, LogicalTensor)
    found = {value.shape for key, value in state.items() if isinstance(value, tensors) and key != "step"}
    several = {shape for shape in found if numel(shape) != 1} or found
    return next(iter(several)) if len(several) == 1 else None


def _fit(pairs: Mapping[int, str], shapes: Mapping[int, Shape | None], weights: Mapping[str, Shape]) -> bool:
    """Whether every name is that of a weight, appears once, and has the shape of its states, if that is known."""
    return len(set(pairs.values())) == len(pairs) and all(
        name in weights and shapes[number] in (None, weights[name]) for number, name in pairs.items()
    )


def _by_shape(
    groups: Sequence[Sequence[int]],
    shapes: Mapping[int, Shape | None],
    pool: Sequence[str],
    weights: Mapping[str, Shape],
    ordered: bool,
) -> dict[int, str]:
    slots: dict[Shape, list[tuple[int, int]]] = defaultdict(list)
    for index, group in enumerate(groups):
        for number in group:
            shape = shapes[number]
            if shape is None:
                raise Unnamed(f"parameter {number} has no state that tells its shape")
            slots[shape].append((index, number))
    out: dict[int, str] = {}
    for shape, members in slots.items():
        names = [name for name in pool if weights[name] == shape]
        if len(names) != len(members):
            raise Unnamed(f"it has {len(members)} parameters of shape {list(shape)}, and the model {len(names)}")
        if len({index for index, _ in members}) > 1:
            shown = ", ".join(map(repr, names[:3]))
            raise Unnamed(f"several param groups have parameters of shape {list(shape)} ({shown}, …)")
        if len(members) > 1 and not ordered:
            shown = ", ".join(map(repr, names[:3]))
            raise Unnamed(
                f"{shown} have one shape, their names come in another order than the module's, and no config "
                "of a known model tells that"
            )
        out.update({number: name for (_, number), name in zip(members, names, strict=True)})
    return out
