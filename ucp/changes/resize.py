"""A parameter with more rows or columns than it had, or with fewer: what both sizes have keeps its place.

Rows beyond the old size are zero in an optimizer's states. Their weights are the live model's, or come from zeros or
another checkpoint, as is declared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ucp.catalog import Catalog, LogicalTensor, ParameterInfo, SourceFile
from ucp.changes.build import PARAM, Build
from ucp.errors import BadArgument, Mismatch, Unsupported
from ucp.geometry import Blocks, Shape, box, concat, empty, numel, restrict


@dataclass(frozen=True)
class NewRows:
    """Where the weights of new rows come from. kind: 'live' (the model keeps its own), 'zeros' or 'checkpoint'.

    catalog: that checkpoint's. path: its path.
    """

    kind: str
    catalog: Catalog | None = None
    path: str = ""

    def __str__(self) -> str:
        return {"live": "as the model made them", "zeros": "zero"}.get(self.kind, f"from {self.path}")


def resized(build: Build, info: ParameterInfo, shape: Shape, rows: NewRows) -> str:
    """Give a parameter another shape. Returns what was changed, for people.

    Raises Mismatch for another number of dimensions, Unsupported for states that don't follow their parameter's shape,
    and BadArgument where the checkpoint of the new rows lacks them.
    """
    old = info.shape
    if len(old) != len(shape):
        raise Mismatch(
            f"'{info.name}' is {list(old)} in the checkpoint and {list(shape)} here; a size may change, not the number "
            "of dimensions: declare under names: how it is rearranged"
        )
    grows = any(new > there for new, there in zip(shape, old, strict=True))
    if grows and rows.kind == "none":
        raise BadArgument(
            f"'{info.name}' grows from {list(old)} to {list(shape)}, and nothing says what its new rows are: write "
            "new_rows: zeros, or new_rows: the path of a checkpoint of the changed model"
        )
    tensors = []
    for tensor in build.tensors_of(info):
        new = _followed(tensor, old, shape)
        if not grows:
            tensors.append(cropped(tensor, new))
        elif tensor.state == PARAM and rows.kind == "live":
            tensors.append(cropped(tensor, _common(tensor.shape, new)))
            build.grown.add(info.name)
        else:
            tensors.append(_grown(build, tensor, new, rows if tensor.state == PARAM else NewRows("zeros")))
    build.put([(replace(info, shape=shape), tensors)])
    states = len(tensors) > 1
    added = f", new ones {rows}" + (" and their optimizer states zero" if states else "") if grows else ""
    return f"resized: '{info.name}' from {list(old)} to {list(shape)}{added}"


def _common(one: Shape, other: Shape) -> Shape:
    return tuple(map(min, one, other))


def _followed(tensor: LogicalTensor, old: Shape, new: Shape) -> Shape:
    """The new shape of a state: where its size is the parameter's, the parameter's new one; where it is 1, 1."""
    if len(tensor.shape) == len(old) and all(size in (there, 1) for size, there in zip(tensor.shape, old, strict=True)):
        return tuple(n if size == there else 1 for size, there, n in zip(tensor.shape, old, new, strict=True))
    raise Unsupported(
        f"state '{tensor.state}' of '{tensor.name}' is {list(tensor.shape)}, which does not follow the parameter's "
        f"shape {list(old)}, so it cannot be resized with it"
    )


def cropped(tensor: LogicalTensor, shape: Shape) -> LogicalTensor:
    """The first rows and columns of a tensor, as many as ``shape`` has."""
    if shape == tensor.shape:
        return tensor
    if not numel(shape):
        return replace(tensor, shape=shape, blocks=empty(len(shape)), bases=np.zeros(0, np.int64), digest=None)
    blocks, which = restrict(tensor.blocks, box([0] * len(shape), shape), shape)
    return replace(tensor, shape=shape, blocks=blocks, bases=tensor.bases[which], digest=None)


def _beyond(kept: Shape, shape: Shape) -> Iterator[tuple[Shape, Shape]]:
    """(offsets, sizes) of boxes that hold everything of ``shape`` outside the box ``kept`` at its beginning, once."""
    for k, (have, want) in enumerate(zip(kept, shape, strict=True)):
        sizes = (*kept[:k], want - have, *shape[k + 1 :])
        if numel(sizes):
            yield tuple(have if j == k else 0 for j in range(len(shape))), sizes


def _grown(build: Build, tensor: LogicalTensor, shape: Shape, rows: NewRows) -> LogicalTensor:
    """A tensor with new rows and columns after those that it keeps."""
    kept = cropped(tensor, _common(tensor.shape, shape))
    boxes = list(_beyond(kept.shape, shape))
    if not boxes:  # one of the sizes is 0
        return replace(kept, shape=shape, digest=None)
    if rows.catalog is None:
        index = build.zeros_file(max((sizes for _, sizes in boxes), key=numel), tensor.dtype)
        parts = [box(offsets, sizes, buffer=index) for offsets, sizes in boxes]
        bases = [np.zeros(len(part), np.int64) for part in parts]
    else:
        parts, bases = _of_checkpoint(build, tensor, shape, boxes, rows)
    return replace(
        kept,
        shape=shape,
        blocks=concat([kept.blocks, *parts], len(shape)),
        bases=np.concatenate([kept.bases, *bases]),
        digest=None,
    )


def _of_checkpoint(
    build: Build, tensor: LogicalTensor, shape: Shape, boxes: Sequence[tuple[Shape, Shape]], rows: NewRows
) -> tuple[list[Blocks], list[np.ndarray]]:
    """New rows where another checkpoint has them."""
    if rows.catalog is None:
        raise ValueError("no checkpoint of the new rows")
    found = rows.catalog.tensors.get((_known(rows.catalog, tensor.name), PARAM))
    if found is None or (found.shape, found.dtype) != (shape, tensor.dtype):
        has = "has none" if found is None else f"has {found.dtype} {list(found.shape)}"
        raise BadArgument(
            f"new_rows: {rows.path}: '{tensor.name}' is to be {tensor.dtype} {list(shape)}, and it {has}; give a "
            "checkpoint of the changed model"
        )
    if rows.catalog.computed:
        raise Unsupported(f"new_rows: {rows.path}: it has averages, so its rows are in no file; convert it first")
    first = len(build.catalog.files)
    build.catalog = replace(
        build.catalog,
        files=(*build.catalog.files, *(SourceFile(f.path, f.size, f.mtime_ns) for f in rows.catalog.files)),
        chunk_digests={
            **build.catalog.chunk_digests,
            **{first + k: table for k, table in rows.catalog.chunk_digests.items()},
        },
    )
    parts, bases = [], []
    for offsets, sizes in boxes:
        blocks, which = restrict(found.blocks, box(offsets, sizes), sizes)
        moved = replace(blocks, offsets=blocks.offsets + np.array(offsets), buffers=blocks.buffers + first)
        parts.append(moved)
        bases.append(found.bases[which])
    return parts, bases


def _known(catalog: Catalog, name: str) -> str:
    try:
        return catalog.resolve(name)
    except KeyError:
        return name
