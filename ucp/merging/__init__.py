"""Combining checkpoints: a new one whose tensors are computed from those of several others, of any formats and layouts.

A merged tensor is a tensor of a catalog like any other, except that its bytes lie in no file. They are computed when
they are read (`computed`). So a merge is a conversion of such a catalog, into any format and layout, in bounded memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ucp.lazy import names_of

if TYPE_CHECKING:
    from ucp.merging.coefficients import Barrier, SearchResult, barrier, search
    from ucp.merging.combine import MergeReport, merge
    from ucp.merging.weights import ema, lawa, metric_weights, uniform

__all__ = [
    "merge",
    "MergeReport",
    "search",
    "SearchResult",
    "barrier",
    "Barrier",
    "uniform",
    "ema",
    "lawa",
    "metric_weights",
]

_HOMES = {
    "merge": "ucp.merging.combine",
    "MergeReport": "ucp.merging.combine",
    "search": "ucp.merging.coefficients",
    "SearchResult": "ucp.merging.coefficients",
    "barrier": "ucp.merging.coefficients",
    "Barrier": "ucp.merging.coefficients",
    "uniform": "ucp.merging.weights",
    "ema": "ucp.merging.weights",
    "lawa": "ucp.merging.weights",
    "metric_weights": "ucp.merging.weights",
}


if not TYPE_CHECKING:  # else any name would be there for a type checker, of any type
    __getattr__ = names_of("ucp.merging", _HOMES)
