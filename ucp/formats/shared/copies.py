"""Whether elements that a checkpoint holds twice are the same in both places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ucp import limits
from ucp.catalog import Catalog, LogicalTensor
from ucp.errors import Mismatch
from ucp.geometry import Ints, intersect
from ucp.storage.dtypes import itemsize
from ucp.storage.files import Files

# In one file: its index, the byte from which elements count, and which elements.
_Place = tuple[int, int, Ints]


def check_copies(catalog: Catalog, files: Files, why: str, in_full: Mapping[str, str] | None = None) -> None:
    """Compare a few elements of every copy with the tensor that it is a copy of.

    why: for the error, what must be wrong if they differ.
    in_full: names of those of which every element is compared -> the same for them.

    Raises Mismatch if they differ. It names the tensor and both files.
    """
    for copy in catalog.copies:
        reason = (in_full or {}).get(copy.name)
        for there, here in _places(copy, catalog.tensors[copy.name, copy.state], reason is not None):
            one, other = (_elements(catalog, files, place, itemsize(copy.dtype)) for place in (there, here))
            if one.tobytes() != other.tobytes():
                raise Mismatch(
                    f"{catalog.files[here[0]].path}: '{copy.name}' ({copy.state}) is not what "
                    f"'{catalog.files[there[0]].path}' has of the same elements: {reason or why}"
                )


def _elements(catalog: Catalog, files: Files, place: _Place, width: int) -> NDArray[np.uint8]:
    index, base, which = place
    first, last = int(which.min()), int(which.max())
    raw = np.empty((last + 1 - first) * width, np.uint8)
    files.read_into(catalog.files[index].path, base + first * width, raw)
    return raw.reshape(-1, width)[which - first]


def _places(copy: LogicalTensor, tensor: LogicalTensor, full: bool) -> Iterator[tuple[_Place, _Place]]:
    """Some places that both hold, or all of them."""
    found = intersect(tensor.blocks, copy.blocks)
    step = 1 if full else max(1, len(found) // limits.COPY_PLACES_COUNT)
    for k in range(0, len(found), step):
        i, j = int(found.source[k]), int(found.target[k])
        sizes = found.sizes[k].copy()
        if not full:
            sizes[:-1] = 1
            dense = len(sizes) > 0 and found.source_strides[k, -1] == 1 and found.target_strides[k, -1] == 1
            sizes[-1:] = min(limits.COPY_ELEMENTS_COUNT, int(sizes[-1])) if dense else 1
        index = np.indices(tuple(sizes.tolist())).reshape(len(sizes), -1)
        there = found.source_starts[k] + found.source_strides[k] @ index
        here = found.target_starts[k] + found.target_strides[k] @ index
        yield (
            (int(tensor.blocks.buffers[i]), int(tensor.bases[i]), np.atleast_1d(there)),
            (int(copy.blocks.buffers[j]), int(copy.bases[j]), np.atleast_1d(here)),
        )
