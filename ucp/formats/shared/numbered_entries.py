"""Entries of an optimizer that numbers its parameters, in a state dict that is flat: named as a run's own groups say.

Without a run that says so, they stay what they are, and load only into entries that are numbered alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial

from ucp.catalog import LogicalTensor
from ucp.formats.shared.numbered import GROUPS, MEMBERS, STATE, Unnamed, only_fitting, readings
from ucp.formats.shared.roles import MODEL, StateEntry
from ucp.formats.shared.state_dicts import Entries
from ucp.geometry import numel

_MEMBERS = re.compile(rf"((?:.+\.)?){GROUPS}\.(\d+)\.{MEMBERS}")


def name_numbers(found: Entries, given: Sequence[Sequence[str]] | None) -> list[str]:
    """Name the numbers of every optimizer whose groups are as many and as large as the given ones, if all states have
    the shapes of the parameters that they would get. Other optimizers are left alone.

    The entries are in the order in which they were saved. Returns what to tell of optimizers whose order is open, and
    of all if nothing is given.
    """
    groups: dict[str, dict[int, list[int]]] = {}
    for key, entry in found.entries.items():
        match = _MEMBERS.fullmatch(key)
        if match is not None and isinstance(entry.value, list) and all(type(n) is int for n in entry.value):
            groups.setdefault(match[1], {})[int(match[2])] = entry.value
    notes = []
    for root, numbered in groups.items():
        if given is None:
            notes.append(
                f"the optimizer '{root.rstrip('.')}' numbers its parameters, so its states keep their numbers, and "
                "load only into one that is numbered alike; give param_names (--param-names FILE), each group's "
                "parameters in the order that it had"
            )
            continue
        ordered = [numbered[index] for index in sorted(numbered)]
        known = {name for names in given for name in names}
        module = [name for key in found.tensors if (name := key.removeprefix(f"{MODEL}.")) in known]
        try:
            names = only_fitting(ordered, readings(given, module), partial(_fit, found, root))
        except Unnamed as reason:
            notes.append(
                f"the optimizer '{root.rstrip('.')}' numbers its parameters, and nothing tells which they are, since "
                f"{reason}; give param_names (--param-names FILE), each group's parameters in the order that it had"
            )
            continue
        if names is not None and len(names) == sum(map(len, ordered)):
            _rename(found, root, names)
    return notes


def _fit(found: Entries, root: str, names: Mapping[int, str]) -> bool:
    for number, name in names.items():
        weight = found.tensors.get(f"{MODEL}.{name}") or found.tensors.get(name)
        if weight is None:
            return False
        start = f"{root}{STATE}.{number}."
        states = [tensor for key, tensor in found.tensors.items() if key.startswith(start)]
        if any(numel(tensor.shape) != 1 and tensor.shape != weight.shape for tensor in states):
            return False
    return True


def _rename(found: Entries, root: str, names: Mapping[int, str]) -> None:
    state = re.compile(rf"{re.escape(root)}{STATE}\.(\d+)\.(.+)")
    entries: dict[str, StateEntry] = {}
    tensors: dict[str, LogicalTensor] = {}
    for key, entry in found.entries.items():
        match, new = state.fullmatch(key), key
        if match is not None and int(match[1]) in names:
            name = names[int(match[1])]
            new = f"{root}{STATE}.{name}.{match[2]}"
            entry = StateEntry(
                tuple(name if part in (int(match[1]), match[1]) else part for part in entry.path),
                entry.shape,
                entry.value,
            )
        elif key.startswith(f"{root}{GROUPS}.") and _MEMBERS.fullmatch(key):
            entry = StateEntry(entry.path, None, [names[number] for number in entry.value])
        entries[new] = entry
        if key in found.tensors:
            tensors[new] = found.tensors[key]
    found.entries, found.tensors = entries, tensors
