"""A checkpoint of a model that has been changed on purpose since: as the changed model would have saved it.

What changed is declared (`ucp.spec.changes`): a vocabulary of another size, parameters that are trained now or no
longer, adapters, projections that are fused or split, layers that are stacked or listed, other names, other element
types. Declared changes turn a checkpoint's catalog into another one (`applied`), and everything else goes on as with
any checkpoint: loads into live engines, FSDP2 and state dicts, and conversions. What is not declared is refused as
before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ucp.lazy import names_of

if TYPE_CHECKING:
    from ucp.changes.apply import applied
    from ucp.changes.changed import Changed
    from ucp.changes.outline import LiveParameter, Outline, of_all_ranks, outline_of

__all__ = ["Changed", "LiveParameter", "Outline", "applied", "of_all_ranks", "outline_of"]

# Most loads declare no changes, and making them takes the language of specs.
if not TYPE_CHECKING:  # else any name would be there for a type checker, of any type
    __getattr__ = names_of(
        __name__,
        {
            "applied": "ucp.changes.apply",
            "Changed": "ucp.changes.changed",
            "LiveParameter": "ucp.changes.outline",
            "Outline": "ucp.changes.outline",
            "of_all_ranks": "ucp.changes.outline",
            "outline_of": "ucp.changes.outline",
        },
    )
