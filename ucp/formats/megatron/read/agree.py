"""A spot check that weights and masters are of one iteration: the module's tensors are its masters, rounded."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from ucp import limits
from ucp.catalog import Catalog, LogicalTensor
from ucp.errors import DamagedCheckpoint
from ucp.geometry import box
from ucp.printable import logger
from ucp.storage.dtypes import itemsize
from ucp.storage.files import Files
from ucp.storage.rounding import rounds_to
from ucp.transfer.gather import Want, gather
from ucp.transfer.reader import Reader

log = logger(__name__)


def check(path: object, catalog: Catalog, weights: Iterable[LogicalTensor], files: Files) -> None:
    """Compare a few elements of each weight with the catalog's master of it.

    Raises DamagedCheckpoint for a file most of whose fragments disagree; warns of single parameters.
    """
    verdicts, odd = _compared(catalog, weights, files)
    for file, found in verdicts.items():
        if found[False] >= limits.SAME_RUN_ENOUGH_COUNT and found[False] > found[True]:
            raise DamagedCheckpoint(
                f"{catalog.files[file].path}: {found[False]} of {found.total()} fragments that were compared are not "
                f"their optimizer's masters, rounded ('{odd[0]}', …); files of two runs or of two iterations are mixed"
            )
    if odd:
        log.warning(
            "%s: the weights of %d parameters ('%s', …) are not their rounded masters: they were changed outside the "
            "optimizer, and the masters are what is used",
            path,
            len(odd),
            odd[0],
        )


def odd(catalog: Catalog, weights: Iterable[LogicalTensor], files: Files) -> list[str]:
    """The parameters of which an element that was compared is not its master, rounded."""
    return _compared(catalog, weights, files)[1]


def _compared(
    catalog: Catalog, weights: Iterable[LogicalTensor], files: Files
) -> tuple[Mapping[int, Counter[bool]], list[str]]:
    """By file how many fragments agree and how many don't, and the parameters of those that don't."""
    reader = Reader(catalog, files, False)
    verdicts: dict[int, Counter[bool]] = defaultdict(Counter)
    odd: dict[str, None] = {}
    for weight in weights:
        for places, same in _places(reader, catalog.tensors[weight.name, "param"], weight):
            for file in places:
                verdicts[file][same] += 1
            if not same:
                odd[weight.name] = None
    return verdicts, list(odd)


def _places(reader: Reader, master: LogicalTensor, weight: LogicalTensor) -> Iterator[tuple[set[int], bool]]:
    """For the first elements of a few of the weight's fragments: the files that these and their masters lie in, and
    whether they are the masters, rounded. What tells nothing is left out: elements that are all alike, as norms' are at
    first, and types that are not compared."""
    b, m = weight.blocks, master.blocks
    step = max(1, len(b) // limits.COPY_PLACES_COUNT)
    for k in range(0, len(b), step):
        offsets = b.offsets[k].tolist()
        sizes = [1] * (b.ndim - 1) + [min(limits.SAME_RUN_ELEMENTS_COUNT, int(b.sizes[k, -1]))] if b.ndim else []
        high = _bits(reader, master, offsets, sizes)
        low = _bits(reader, weight, offsets, sizes)
        same = rounds_to(high, master.dtype, low, weight.dtype)
        if same is None or (same and np.all(low == low[0])):
            continue
        there = np.all((m.offsets <= b.offsets[k]) & (b.offsets[k] < m.offsets + m.sizes), axis=1)
        yield {int(b.buffers[k]), *m.buffers[there].tolist()}, same


def _bits(reader: Reader, tensor: LogicalTensor, offsets: list[int], sizes: list[int]) -> np.ndarray:
    width = itemsize(tensor.dtype)
    raw = np.empty(int(np.prod(sizes, dtype=np.int64)) * width, np.uint8)
    gather(reader, [Want(tensor, box(offsets, sizes), tensor.dtype)], [raw])
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[width]
    return raw.view(kind)
