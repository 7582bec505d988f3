"""The logical digests of a checkpoint's tensors, from its files, by several threads; no tensor is held whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ucp.catalog import LogicalTensor
from ucp.geometry import flat_ranges, numel
from ucp.logical.digest import Digest, digest_bytes, total
from ucp.logical.runs import SAMPLE_BLOCK, Runs, Sample
from ucp.storage.dtypes import itemsize
from ucp.transfer.gather import Want, gather
from ucp.transfer.reader import Reader

PIECE = 8 << 20
"""Bytes that a thread reads and digests at once."""

Advance = Callable[[int], None]
"""Told the bytes that were digested, in the calling thread."""

# (tensor's index, places of ranges in its row of bytes, their sizes)
_Job = tuple[int, list[int], list[int]]


def digest_files(
    reader: Reader,
    tensors: Sequence[LogicalTensor],
    *,
    sample: Sample | None = None,
    share: int = 0,
    shares: int = 1,
    threads: int = 1,
    advance: Advance = lambda nbytes: None,
) -> list[Digest]:
    """The digest of each tensor, or of what a sample picks of it.

    share, shares: do only part number ``share`` of ``shares`` parts of the work. The digests of all parts add up.
    advance: told the bytes that were digested.

    Memory: `PIECE` for each thread. Raises what reading raises.
    """

    def work(job: _Job) -> tuple[int, Digest, int]:
        index, places, sizes = job
        tensor, width = tensors[index], itemsize(tensors[index].dtype)
        starts = (np.cumsum([0, *sizes[:-1]]) // width).tolist()
        blocks = flat_ranges(
            tensor.shape,
            [at // width for at in places],
            [(at + n) // width for at, n in zip(places, sizes, strict=True)],
            starts,
        )
        raw = np.empty(sum(sizes), np.uint8)
        gather(reader, [Want(tensor, blocks, tensor.dtype)], [raw], 1)
        runs = Runs(np.array(starts, np.int64) * width, np.array(places, np.int64), np.array(sizes, np.int64))
        return index, digest_bytes(raw, runs), len(raw)

    jobs = [job for k, job in enumerate(_jobs(tensors, sample)) if k % shares == share]
    found: list[list[Digest]] = [[] for _ in tensors]
    with ThreadPoolExecutor(threads, "ucp-digest") as pool:
        for index, digest, nbytes in pool.map(work, jobs):
            found[index].append(digest)
            advance(nbytes)
    return [total(parts) for parts in found]


def nbytes_of(tensors: Sequence[LogicalTensor], sample: Sample | None = None) -> int:
    """Bytes that `digest_files` reads of these tensors."""
    return sum(sum(sizes) for _, _, sizes in _jobs(tensors, sample))


def _jobs(tensors: Sequence[LogicalTensor], sample: Sample | None) -> Iterator[_Job]:
    """Ranges of about `PIECE` bytes of each tensor, at whole elements."""
    for index, tensor in enumerate(tensors):
        nbytes = numel(tensor.shape) * itemsize(tensor.dtype)
        if sample is None:
            for at in range(0, nbytes, PIECE):
                yield index, [at], [min(PIECE, nbytes - at)]
            continue
        starts = (sample.picks(nbytes) * SAMPLE_BLOCK).tolist()
        together = PIECE // SAMPLE_BLOCK
        for k in range(0, len(starts), together):
            places = starts[k : k + together]
            yield index, places, [min(SAMPLE_BLOCK, nbytes - at) for at in places]
