"""Patterns of ``allow_missing`` and ``allow_unused`` that match nothing, which are most likely misspelt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from ucp.catalog import Catalog
from ucp.loading.nouns import Wish
from ucp.loading.options import own_values, shared_values
from ucp.loading.refusals import PARAM, VALUE, Words, allowed
from ucp.loading.target import Target, kept_for


def unmatched(catalog: Catalog, target: Target, wish: Wish, *, is_changed: bool = False) -> list[str]:
    """One warning, if any pattern of the wish matches no name: of this model for ``allow_missing``, of either side for
    ``allow_unused``. is_changed: the catalog is not as it lies on disk, and so does not have all names."""
    if not wish.allow_missing and not wish.allow_unused:
        return []
    live = [
        *(m.name for s in target.slots for m in s.members),
        *target.elsewhere,
        *(n for g in target.groups for n in g.names),
    ]
    saved = [name for info in catalog.parameters.values() for name in (info.name, *info.aliases)]
    scalars = {value for info in catalog.parameters.values() for value in info.scalars}
    kept = scalars.union(state for _, state in catalog.tensors)
    here = _states(target, scalars)
    told = []
    names, values = list(dict.fromkeys(live)), list(target.named or ())
    odd = _odd(target.words, wish.allow_missing, names, values, here)
    if odd:
        told.append(f"no name here matches {odd} of allow_missing")
    every = None if here is None else here | kept
    names, values = list(dict.fromkeys(saved + live)), [*shared_values(catalog), *own_values(catalog)]
    odd = "" if is_changed else _odd(target.words, wish.allow_unused, names, values, every)
    if odd:
        told.append(f"no name in the checkpoint matches {odd} of allow_unused")
    return ["; ".join(told)] if told else []


def _states(target: Target, scalars: set[str]) -> set[str] | None:
    """The states and single values that are kept here; None if states are unknown. scalars: the checkpoint's values,
    where those of the optimizer are unknown."""
    out: set[str] = set()
    for slot in target.slots:
        if slot.asked is not None:
            out.update(slot.asked.states, slot.asked.values)
            continue
        tensors, values = kept_for(slot, target.groups)
        if slot.kind == "parameter" and tensors is None:
            return None
        out.update(tensors or (), scalars if values is None else values)
    return out


def _odd(
    words: Words, given: Iterable[str], names: Sequence[str], values: Sequence[str], states: set[str] | None
) -> str:
    """Those of the patterns that match nothing, in words."""
    return " and ".join(f"'{p}'" for p in dict.fromkeys(given) if not _fits(words, p, names, values, states))


def _fits(words: Words, pattern: str, names: Sequence[str], values: Sequence[str], states: set[str] | None) -> bool:
    alone = (pattern,)
    if any(allowed(words.spellings(key, VALUE), alone) for key in values):
        return True
    name_part, colon, state = pattern.rpartition(":")
    known = states is None or "*" in state or any(fnmatchcase(one, state) for one in states)
    if colon and known and any(allowed(words.spellings(name, PARAM), (name_part,)) for name in names):
        return True
    every = (PARAM, *(states or ()))
    return any(allowed(words.spellings(name, one), alone) for name in names for one in every)
