"""Entries of an optimizer that numbers its parameters, in a state dict that is flat: named as a run's own groups say.

Without a run that says so, they stay what they are, and load only into entries that are numbered alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ucp.catalog import LogicalTensor
from ucp.formats.shared.numbered import GROUPS, MEMBERS, STATE
from ucp.formats.shared.roles import MODEL, StateEntry
from ucp.formats.shared.state_dicts import Entries
from ucp.geometry import numel

_MEMBERS = re.compile(rf"((?:.+\.)?){GROUPS}\.(\d+)\.{MEMBERS}")


def name_numbers(found: Entries, given: Sequence[Sequence[str]]) -> None:
    """Name the numbers of every optimizer whose groups are as many and as large as the given ones, if all states have
    the shapes of the parameters that they would get. Other optimizers are left alone."""
    groups: dict[str, dict[int, list[int]]] = {}
    for key, entry in found.entries.items():
        match = _MEMBERS.fullmatch(key)
        if match is not None and isinstance(entry.value, list) and all(type(n) is int for n in entry.value):
            groups.setdefault(match[1], {})[int(match[2])] = entry.value
    for root, numbered in groups.items():
        ordered = [numbered[index] for index in sorted(numbered)]
        if [len(group) for group in ordered] != [len(names) for names in given]:
            continue
        pairs = zip((n for group in ordered for n in group), (name for names in given for name in names), strict=True)
        names = dict(pairs)
        if len(names) == sum(map(len, ordered)) and _fit(found, root, names):
            _rename(found, root, names)


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
