"""Which parameter of a checkpoint is which of a live model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ucp.catalog import Catalog, bare


def match(catalog: Catalog, targets: Iterable[str]) -> dict[str, str]:
    """Target name -> checkpoint name, for every target that the checkpoint has under its own or a tied name.

    Equal names come first; then names that are equal without wrappers' prefixes, where that is unambiguous. No
    checkpoint name is given to two targets.
    """
    targets = list(targets)
    exact: dict[str, str] = {}
    for info in catalog.parameters.values():
        for name in (info.name, *info.aliases):
            exact[name] = info.name
    out: dict[str, str] = {}
    used: set[str] = set()
    by_bare = _unambiguous(exact)
    target_bare = [bare(t) for t in targets]
    for candidates in (exact, by_bare):
        for target, short in zip(targets, target_bare, strict=True):
            key = target if candidates is exact else short
            if target in out or key not in candidates or candidates[key] in used:
                continue
            if candidates is by_bare and target_bare.count(short) > 1:
                continue
            out[target] = candidates[key]
            used.add(candidates[key])
    return out


def _unambiguous(names: Mapping[str, str]) -> dict[str, str]:
    owners: dict[str, set[str]] = {}
    for name, owner in names.items():
        owners.setdefault(bare(name), set()).add(owner)
    return {short: next(iter(found)) for short, found in owners.items() if len(found) == 1}
