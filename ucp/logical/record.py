"""What a checkpoint records of its tensors' digests, and how that is added up while the tensors' bytes pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucp.columns import made_of, tuples_of
from ucp.geometry import Blocks, Ints, Shape, extents, numel
from ucp.logical.batch import Batch
from ucp.logical.digest import Bytes, Digest, digest_sampling, total
from ucp.logical.runs import LIMIT, SAMPLE_BLOCK, Runs, Sample, few_runs, runs_of, within_buffer

EVERY = 64
"""Of how many blocks of 64 KiB a sample takes one, and small tensors whole: so many that in host memory the proof takes
less than a twentieth of a load. Checkpoints say of their digests what it was (32 once)."""


def drawn(seed: int) -> Sample:
    """The sample that is recorded from now on. seed: 64 bits."""
    return Sample(seed, EVERY, first=False)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A tensor's digest, and the digest of the blocks that a sample picks. The records of disjoint parts add up."""

    whole: Digest
    sampled: Digest
    sample: Sample

    def __add__(self, other: Recorded) -> Recorded:
        return Recorded(self.whole + other.whole, self.sampled + other.sampled, self.sample)


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor in a file. blocks, bases: as in `LogicalTensor`, all in this file. width: bytes of an element."""

    shape: Shape
    width: int
    blocks: Blocks
    bases: Ints


@dataclass(frozen=True, eq=False)
class _FileRanges:
    """Where a file's tensors lie. first, last: each one's first byte in the file, and the byte after its last. small:
    (n,) whether it has few bytes, in a row, so that it is a sample of itself."""

    first: Ints
    last: Ints
    small: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class PassingTensors:
    """A file's tensors, digested piece by piece, in any order and by several threads."""

    entries: Sequence[Entry]
    sample: Sample
    _listed: dict[int, list[Runs]] = field(default_factory=dict)
    _places: list[_FileRanges] = field(default_factory=list)

    def of(self, offset: int, data: Any) -> list[tuple[int, Recorded]]:
        """What the file's bytes ``data``, from ``offset`` on, add to its tensors: (entry's index, what they add)."""
        flat = np.frombuffer(data, np.uint8)
        places = self._all_places()
        first, last, end = places.first, places.last, offset + len(flat)
        inside = (first < end) & (last > offset)
        together = inside & places.small & (first >= offset) & (last <= end)
        out = self._small(np.flatnonzero(together), first - offset, last - offset, flat)
        for k in np.flatnonzero(inside & ~together).tolist():
            nbytes = numel(self.entries[k].shape) * self.entries[k].width
            found = [
                digest_sampling(flat, within_buffer(every, offset, end), self.sample, nbytes) for every in self._runs(k)
            ]
            out.append((k, Recorded(total(w for w, _ in found), total(s for _, s in found), self.sample)))
        return out

    def _small(self, which: Ints, first: Ints, last: Ints, flat: Bytes) -> list[tuple[int, Recorded]]:
        """What small tensors add that lie in these bytes as a whole: their rows are multiplied together."""
        batch = Batch(len(which))
        for n, (low, high) in enumerate(zip(first[which].tolist(), last[which].tolist(), strict=True)):
            batch.add(n, flat, ((low, 0, high - low),))
        lanes = batch.finish()
        found = tuples_of(Digest, lanes[:, 0].tolist(), lanes[:, 1].tolist())
        return list(zip(which.tolist(), made_of(Recorded, len(found), found, found, repeat(self.sample)), strict=True))

    def _all_places(self) -> _FileRanges:
        if not self._places:
            # What the blocks of tensors say that are cut alike is worked out once.
            known: dict[tuple[int, int, Shape], tuple[int, int, bool]] = {}
            found = []
            for entry in self.entries:
                if len(entry.bases) != 1:
                    found.append((*_extent(entry), False))
                    continue
                kind = id(entry.blocks), entry.width, entry.shape
                if kind not in known:
                    low, high = _extent(replace(entry, bases=np.zeros(1, np.int64)))
                    runs = few_runs(entry.shape, entry.blocks, entry.width)
                    nbytes = numel(entry.shape) * entry.width
                    known[kind] = low, high, runs == [(low, 0, nbytes)] and nbytes <= SAMPLE_BLOCK
                low, high, small = known[kind]
                base = int(entry.bases[0]) if high > low else 0
                found.append((base + low, base + high, small))
            columns = np.array(found, np.int64).reshape(-1, 3)
            self._places.append(_FileRanges(columns[:, 0], columns[:, 1], columns[:, 2].astype(bool)))
        return self._places[0]

    def _runs(self, index: int) -> Any:
        """The tensor's runs. They are kept as a list unless there are too many."""
        if index in self._listed:
            return self._listed[index]
        entry = self.entries[index]
        found = runs_of(entry.shape, entry.blocks, entry.width, entry.bases)
        listed = []
        for part in found:
            listed.append(part)
            if sum(map(len, listed)) >= LIMIT:
                return runs_of(entry.shape, entry.blocks, entry.width, entry.bases)
        # The runs of the next tensors take the place of those of tensors that have passed.
        if len(self._listed) >= 64:
            self._listed.clear()
        self._listed[index] = listed
        return listed


def _extent(entry: Entry) -> tuple[int, int]:
    blocks = entry.blocks
    if not len(blocks) or not int(blocks.counts.sum()):
        return 0, 0
    first, ends = extents(blocks)
    return int((entry.bases + first * entry.width).min()), int((entry.bases + ends * entry.width).max())
