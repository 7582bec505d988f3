"""A checkpoint as a model that was changed on purpose would have saved it: what a load needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass

from ucp.catalog import Catalog


@dataclass(frozen=True)
class Changed:
    """A checkpoint as the changed model would have saved it.

    catalog: what it has. grown: names of parameters of whose weights it has only a part, or none: the live model keeps
    the rest. lines: what was changed, a line each.
    """

    catalog: Catalog
    grown: frozenset[str] = frozenset()
    lines: tuple[str, ...] = ()
