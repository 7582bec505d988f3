"""Vocabularies of different widths. Some runs pad theirs, so the same model may have embeddings with more rows in one
checkpoint than in another. Cut to the smallest, they can be merged. The rows that are cut off belong to no token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ucp.catalog import Catalog, LogicalTensor
from ucp.errors import BadArgument, Mismatch
from ucp.geometry import Shape
from ucp.merging.plan import MergeSource
from ucp.printable import logger

log = logger(__name__)

CUT = "cut"


def check_choice(choice: str | None) -> None:
    """Raise BadArgument for an unknown choice."""
    if choice not in (None, CUT):
        raise BadArgument(f"vocabularies of different widths are refused, or '{CUT}' to the smallest, found '{choice}'")


def with_cut_vocabularies(sources: Sequence[MergeSource]) -> list[MergeSource]:
    """The sources, with the embeddings of each cut to the number of rows of the smallest.

    Raises Mismatch if parameters differ in more than their rows, or do not all have the same numbers of rows.
    """
    widths: dict[str, list[int]] = {}
    for name, info in sources[0].catalog.parameters.items():
        found = [s.catalog.parameters[name].shape for s in sources if name in s.catalog.parameters]
        if info.kind != "padding" and len(found) == len(sources) and len(set(found)) > 1:
            widths[name] = _rows(name, found, sources)
    if not widths:
        return list(sources)
    first, rows = next(iter(widths.items()))
    other = next((name for name, found in widths.items() if found != rows), None)
    if other is not None:
        raise Mismatch(
            f"'{first}' has {rows} rows in the sources and '{other}' {widths[other]}; a vocabulary is of one width in "
            "a model, so nothing is cut"
        )
    log.warning(
        "%d parameters ('%s', ...) have %s rows: all are cut to %d",
        len(widths),
        first,
        ", ".join(map(str, rows)),
        min(rows),
    )
    return [
        dataclasses.replace(source, shown=_cut_catalog(source.catalog, set(widths), min(rows))) for source in sources
    ]


def _rows(name: str, shapes: Sequence[Shape], sources: Sequence[MergeSource]) -> list[int]:
    for source, shape in zip(sources, shapes, strict=True):
        if not shape or shape[1:] != shapes[0][1:]:
            raise Mismatch(
                f"'{name}' is {list(shapes[0])} in '{sources[0].name}' and {list(shape)} in '{source.name}', which is "
                "no other width of a vocabulary; merge checkpoints of one shape"
            )
    return [shape[0] for shape in shapes]


def _cut_catalog(catalog: Catalog, names: set[str], rows: int) -> Catalog:
    parameters = {
        name: dataclasses.replace(info, shape=(rows, *info.shape[1:])) if name in names else info
        for name, info in catalog.parameters.items()
    }
    tensors = {key: _cut(tensor, rows) if key[0] in names else tensor for key, tensor in catalog.tensors.items()}
    return dataclasses.replace(catalog, parameters=parameters, tensors=tensors)


def _cut(tensor: LogicalTensor, rows: int) -> LogicalTensor:
    """The first rows of a tensor."""
    if tensor.shape[0] == rows:
        return tensor
    kept = np.flatnonzero(tensor.blocks.offsets[:, 0] < rows)
    blocks = tensor.blocks.take(kept)
    sizes = blocks.sizes.copy()
    sizes[:, 0] = np.minimum(sizes[:, 0], rows - blocks.offsets[:, 0])
    return dataclasses.replace(
        tensor,
        shape=(rows, *tensor.shape[1:]),
        blocks=dataclasses.replace(blocks, sizes=sizes),
        bases=tensor.bases[kept],
        digest=None,
    )
