"""Whether elements that a checkpoint holds twice are the same in both places."""

from __future__ import annotations

from collections.abc import Iterator

from ucp import limits
from ucp.catalog import Catalog, LogicalTensor
from ucp.errors import Mismatch
from ucp.geometry import intersect
from ucp.storage.dtypes import itemsize
from ucp.storage.files import Files


def check_copies(catalog: Catalog, files: Files, why: str) -> None:
    """Compare a few elements of every copy with the tensor that it is a copy of.

    why: for the error, what must be wrong if they differ.

    Raises Mismatch if they differ. It names the tensor and both files.
    """
    for copy in catalog.copies:
        for there, here, count in _places(copy, catalog.tensors[copy.name, copy.state]):
            raw = []
            for index, at in (there, here):
                raw.append(bytearray(count * itemsize(copy.dtype)))
                files.read_into(catalog.files[index].path, at, memoryview(raw[-1]))
            if raw[0] != raw[1]:
                raise Mismatch(
                    f"{catalog.files[here[0]].path}: '{copy.name}' ({copy.state}) is not what "
                    f"'{catalog.files[there[0]].path}' has of the same elements: {why}"
                )


def _places(copy: LogicalTensor, tensor: LogicalTensor) -> Iterator[tuple[tuple[int, int], tuple[int, int], int]]:
    """Some places that both hold: ((file, byte), (file, byte), elements)."""
    found = intersect(tensor.blocks, copy.blocks)
    width = itemsize(copy.dtype)
    step = max(1, len(found) // limits.COPY_PLACES_COUNT)
    for k in range(0, len(found), step):
        i, j = int(found.source[k]), int(found.target[k])
        dense = found.sizes.shape[1] > 0 and found.source_strides[k, -1] == 1 and found.target_strides[k, -1] == 1
        count = min(limits.COPY_ELEMENTS_COUNT, int(found.sizes[k, -1])) if dense else 1
        there = int(tensor.blocks.buffers[i]), int(tensor.bases[i] + found.source_starts[k] * width)
        here = int(copy.blocks.buffers[j]), int(copy.bases[j] + found.target_starts[k] * width)
        yield there, here, count
