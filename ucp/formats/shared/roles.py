"""What each entry of a state dict is: a weight, an optimizer's state, a hyperparameter, or something else.

torch.distributed's state dicts are nested or flattened dictionaries whose flat names ("model.up.weight",
"optim.state.up.weight.exp_avg") are all that tells. An optimizer is found by its "param_groups", in both of the forms
that torch.distributed.checkpoint.state_dict makes:

- nested: ``<optimizer>.param_groups.<i>.params`` lists the group's parameters, beside one entry for each option;
- flattened: ``<optimizer>.param_groups.<parameter>.<option>``, as torchtitan saves it.

The model is then where the parameters that the optimizers name are tensors, under one prefix or none; without an
optimizer it is what lies under the key "model". Parameters are called as the module calls them, without that prefix, so
that checkpoints of other frameworks have the same names. Everything else keeps its flat name. The same entries always
get the same roles: those of a state dict to be saved, of a file, and of a state dict to be loaded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from ucp.catalog import ParamGroup
from ucp.errors import Unsupported
from ucp.geometry import Shape, numel
from ucp.storage import plain

PARAM = "param"
# Under this name the entries that belong to no parameter lie in the training state's extra entries.
VALUES = "state_dict"
# Under this one the names of tensors that lie beside the model.
OUTSIDE = "outside_the_model"
# Entries that are fields of a training state, in checkpoints that `write` makes.
TRAINING_STATE = "training_state"
MODEL = "model"
_GROUPS, _STATE, _MEMBERS = "param_groups.", "state.", "params"
# Prefixes that are the model where several would do, such as a moving average of the weights beside them.
_PREFERRED = (f"{MODEL}.", "", "module.")


@dataclass(frozen=True, eq=False, slots=True)
class StateEntry:
    """An entry of a state dict. path: the keys that lead to it. shape: a tensor's; None for any other value."""

    path: tuple[Any, ...]
    shape: Shape | None = None
    value: Any = None


@dataclass(frozen=True, eq=False)
class Roles:
    """The entries of a state dict, by what they are; every one is in exactly one of these.

    tensors: entry -> (name, state) of a logical tensor.
    scalars: entry -> (parameter, name of a single value that an optimizer keeps for it).
    options: entry -> (group, option).
    members: entry -> the group whose parameters it lists.
    values: all other entries, which are not tensors.
    groups: group -> its parameters.
    model: names of the model's tensors.
    trained: names of those that an optimizer updates.
    """

    tensors: dict[str, tuple[str, str]] = field(default_factory=dict)
    scalars: dict[str, tuple[str, str]] = field(default_factory=dict)
    options: dict[str, tuple[str, str]] = field(default_factory=dict)
    members: dict[str, str] = field(default_factory=dict)
    values: list[str] = field(default_factory=list)
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    model: set[str] = field(default_factory=set)
    trained: set[str] = field(default_factory=set)
    entry_of: dict[tuple[str, str], str] = field(default_factory=dict)  # the reverse of tensors

    @property
    def outside(self) -> list[str]:
        """Names of the tensors that lie beside the model; all where no model is told apart."""
        return sorted(name for name, state in self.tensors.values() if state == PARAM and name not in self.model)

    def kind(self, name: str, floating: bool) -> str:
        """The kind of a named tensor, as `ParameterInfo` has it; a state dict does not tell frozen ones from buffers of
        floating point, so these count as frozen parameters."""
        if name in self.trained or not self.trained:
            return "parameter" if floating else "buffer"
        return "frozen" if name in self.model and floating else "buffer"


def assign(entries: Mapping[str, StateEntry], complete: bool = True) -> Roles:
    """The roles of all entries, by their flat names.

    complete: optimizer states count as a parameter's only if its weight is there, too, as a catalog needs it.
    Raises Unsupported where two entries would have the same name.
    """
    roles = Roles()
    optimizers = [o for root in _roots(entries) if (o := _optimizer(root, entries)) is not None]
    trained = [name for o in optimizers for names in o.groups.values() for name in names]
    try:
        prefix = _prefix(entries, optimizers, trained)
    except _Undecided:
        prefix, optimizers, trained = None, [], []
    if prefix is not None:
        _take_weights(roles, entries, prefix, optimizers, trained)
    rest = {key: entry for key, entry in entries.items() if key not in roles.tensors}
    roles.trained.update(trained)
    for optimizer in optimizers:
        own = [name for names in optimizer.groups.values() for name in names]
        shapes = {name: e.shape if (e := entries.get(f"{prefix or ''}{name}")) else None for name in own}
        known = {name: shape for name, shape in shapes.items() if shape is not None or not complete}
        _take(roles, optimizer, rest, known)
    for key, entry in rest.items():
        if entry.shape is None:
            roles.values.append(key)
        else:
            _name(roles, key, (key, PARAM))
    return roles


def _take_weights(
    roles: Roles,
    entries: Mapping[str, StateEntry],
    prefix: str,
    optimizers: Sequence[_OptimizerRoot],
    trained: Sequence[str],
) -> None:
    """Give the model's tensors their roles."""
    flat = not prefix and all(len(entries[n].path) == 1 for n in trained if n in entries)
    weights = [k for k, e in entries.items() if e.shape is not None and k.startswith(prefix)]
    if optimizers or flat:
        # Where the model's names stand alone, what is nested is something else (torchtitan's "train_state").
        weights = [
            k for k in weights if not any(_inside(k, o) for o in optimizers) and not (flat and len(entries[k].path) > 1)
        ]
    names = [key.removeprefix(prefix) for key in weights]
    _name_all(roles, weights, list(zip(names, repeat(PARAM))))
    roles.model.update(names)


def param_groups(
    roles: Roles, options: Mapping[str, Mapping[str, Any]], number: Callable[[Any], Any]
) -> list[ParamGroup]:
    """The param groups, in order. In a flattened optimizer, the parameters with the same options are one group.

    options: of each group by name. number: a JSON-able value that tells tensors among them apart.
    """
    numbered = set(roles.members.values())
    out: dict[str, ParamGroup] = {}
    for group, names in roles.groups.items():
        own = dict(options.get(group, {}))
        same = group if group in numbered else json.dumps(plain.encode(dict(sorted(own.items())), number))
        before = out.get(same, ParamGroup((), own))
        out[same] = ParamGroup((*before.names, *names), before.options)
    return list(out.values())


@dataclass(frozen=True)
class _OptimizerRoot:
    """root: of its entries' names, with the dot. nested: its groups are numbered. groups: by name."""

    root: str
    nested: bool
    groups: Mapping[str, tuple[str, ...]]


def _roots(entries: Mapping[str, StateEntry]) -> Iterator[str]:
    seen: dict[str, None] = {}
    for key in entries:
        at = key.find(_GROUPS)
        while at > 0 and key[at - 1] != ".":
            at = key.find(_GROUPS, at + 1)
        if at >= 0:
            seen[key[:at]] = None
    yield from seen


def _optimizer(root: str, entries: Mapping[str, StateEntry]) -> _OptimizerRoot | None:
    """The optimizer whose entries begin with ``root``; None if it does not name its parameters."""
    start = root + _GROUPS
    inside = [key for key in entries if key.startswith(start)]
    listed = [key for key in inside if _is_members(key.removeprefix(start))]
    if listed:
        groups: dict[str, tuple[str, ...]] = {}
        for key in sorted(listed, key=lambda k: int(k.removeprefix(start).partition(".")[0])):
            names = entries[key].value
            if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
                return None
            groups[key.removesuffix(f".{_MEMBERS}")] = tuple(names)
        return _OptimizerRoot(root, True, groups)
    named = dict.fromkeys(key.removeprefix(start).rpartition(".")[0] for key in inside)
    if "" in named:
        return None
    return _OptimizerRoot(root, False, {start + name: (name,) for name in named})


def _is_members(text: str) -> bool:
    """Whether it is ``<i>.params``."""
    number, _, last = text.partition(".")
    return last == _MEMBERS and number.isdecimal()


def _prefix(entries: Mapping[str, StateEntry], optimizers: Sequence[_OptimizerRoot], trained: list[str]) -> str | None:
    """Where the model's tensors lie; None where the state dict has no model. Raises _Open where that is open."""
    tensors = [key for key, entry in entries.items() if entry.shape is not None]
    names, counts = set(trained), Counter[str]()
    for key in tensors if names else ():
        if any(_inside(key, optimizer) for optimizer in optimizers):
            continue
        at = -1
        while True:
            if key[at + 1 :] in names:
                counts[key[: at + 1]] += 1
            at = key.find(".", at + 1)
            if at < 0:
                break
    whole = [prefix for prefix, count in counts.items() if count == len(names)]
    for prefix in _PREFERRED:
        if prefix in (whole or counts):
            return prefix
    if len(whole) > 1:
        raise _Undecided
    if whole:
        return whole[0]
    nested = any(key.startswith(f"{MODEL}.") and entries[key].path[0] == MODEL for key in tensors)
    return f"{MODEL}." if nested else None


class _Undecided(Exception):
    """Several entries might be the model."""


def _inside(key: str, optimizer: _OptimizerRoot) -> bool:
    return key.startswith((optimizer.root + _GROUPS, optimizer.root + _STATE))


def _take(
    roles: Roles, optimizer: _OptimizerRoot, rest: dict[str, StateEntry], weights: Mapping[str, Shape | None]
) -> None:
    """Give an optimizer's entries their roles, and remove them from ``rest``."""
    start, states = optimizer.root + _GROUPS, optimizer.root + _STATE
    roles.groups.update(optimizer.groups)
    for key in list(rest):
        if key.startswith(start):
            group, _, option = (
                _numbered(key, start) if optimizer.nested else key.rpartition(".")  # options have no dots, names do
            )
            if optimizer.nested and option == _MEMBERS:
                roles.members[key] = group
            else:
                roles.options[key] = (group, option)
            del rest[key]
        elif key.startswith(states):
            name, _, state = key.removeprefix(states).rpartition(".")
            if name not in weights:
                continue
            shape, wanted = rest[key].shape, weights[name]
            if shape is not None and state != "step" and (shape == wanted or (wanted is None and numel(shape) != 1)):
                _name(roles, key, (name, state))
            elif shape is None or numel(shape) == 1:
                roles.scalars[key] = (name, state)
            else:
                continue  # a state of another shape than its parameter's is a tensor by itself
            del rest[key]


def _numbered(key: str, start: str) -> tuple[str, str, str]:
    number, dot, option = key.removeprefix(start).partition(".")
    return start + number, dot, option


def _name_all(roles: Roles, keys: Sequence[str], whats: Sequence[tuple[str, str]]) -> None:
    """`_name`, of many at once."""
    found = dict(zip(whats, keys, strict=True))
    if len(found) == len(keys) and roles.entry_of.keys().isdisjoint(found):
        roles.entry_of.update(found)
        roles.tensors.update(zip(keys, whats, strict=True))
        return
    for key, what in zip(keys, whats, strict=True):
        _name(roles, key, what)


def _name(roles: Roles, key: str, what: tuple[str, str]) -> None:
    other = roles.entry_of.setdefault(what, key)
    if other != key:
        raise Unsupported(f"'{other}' and '{key}' of the state dict would both be called '{what[0]}'; rename one")
    roles.tensors[key] = what
