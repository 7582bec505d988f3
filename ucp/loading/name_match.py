"""Which parameter of a checkpoint belongs to which parameter of a live model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from operator import attrgetter

from ucp.catalog import Catalog, bare


def match(catalog: Catalog, targets: Iterable[str], copies: bool = False) -> dict[str, str]:
    """Target name -> checkpoint name, for every target that the checkpoint has under its own or a tied name.

    Equal names come first. Then come names that are equal without the prefixes of wrappers, if that is unambiguous. No
    checkpoint name is given to two targets, except with ``copies``: then an equal name is given to all that ask.
    """
    targets = list(dict.fromkeys(targets))
    if not targets:
        return {}
    exact: dict[str, str] = {}
    out: dict[str, str] = {}
    if any(map(attrgetter("aliases"), catalog.parameters.values())):
        exact = {n: info.name for info in catalog.parameters.values() for n in (info.name, *info.aliases)}
        used: set[str] = set()
        for target in targets:
            if target in exact and (copies or exact[target] not in used):
                out[target] = exact[target]
                used.add(exact[target])
    else:
        out = {target: target for target in targets if target in catalog.parameters}
        used = set(out.values())
    if len(out) == len(targets):
        return out
    rest = [target for target in targets if target not in out]
    by_bare = _unambiguous(exact or {name: name for name in catalog.parameters})
    short = {target: bare(target) for target in targets}
    asked = Counter(short.values())
    for target in rest:
        found = by_bare.get(short[target])
        if found is not None and found not in used and asked[short[target]] == 1:
            out[target] = found
            used.add(found)
    return out


def _unambiguous(names: Mapping[str, str]) -> dict[str, str]:
    owners: dict[str, set[str]] = {}
    for name, owner in names.items():
        owners.setdefault(bare(name), set()).add(owner)
    return {short: next(iter(found)) for short, found in owners.items() if len(found) == 1}
