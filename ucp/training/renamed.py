"""A checkpoint under a live model's names, where a spec says what either side calls the same parameters."""

from __future__ import annotations

from collections.abc import Collection

from ucp.catalog import Catalog, bare
from ucp.errors import UcpError
from ucp.formats.rename import rename
from ucp.spec.bound import Bound
from ucp.spec.names import moves


def in_names_of(catalog: Catalog, live: Collection[str], bound: Bound | None) -> Catalog:
    """The catalog by the lines under the spec's ``names:``, of whichever framework and in whichever direction gives the
    most of the live names; as it is, where it has no fewer of them already, or without a spec.

    Raises what `ucp.formats.rename.rename` raises, for parameters that don't fit the spec.
    """
    if bound is None:
        return catalog
    held = [name for info in catalog.parameters.values() for name in (info.name, *info.aliases)]
    best, most = None, _common(held, live)
    for framework in bound.spec.names:
        for to_framework in (True, False):
            count = _common(_moved(held, bound, framework, to_framework), live)
            if count > most:
                best, most = (framework, to_framework), count
    return catalog if best is None else rename(catalog, bound, best[0], to_framework=best[1], keep=True)


def _moved(held: Collection[str], bound: Bound, framework: str, to_framework: bool) -> list[str]:
    """What the names become; [] where they can't be those of this side."""
    try:
        found = moves(bound, framework, held, to_framework=to_framework)
    except UcpError:
        return []
    kept = [found.plain.get(name, name) for name in held if name not in found.split]
    return [*kept, *found.joined, *(part.source for made in found.split.values() for part in made.parts)]


def _common(names: Collection[str], live: Collection[str]) -> int:
    return len(set(map(bare, names)) & set(map(bare, live)))
