"""What a checkpoint records of its tensors' digests, and how that is added up while the tensors' bytes pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ucp.geometry import Blocks, Ints, Shape, extents, numel
from ucp.logical.digest import Digest, digest_sampling, total
from ucp.logical.runs import LIMIT, Runs, Sample, runs_of, within_buffer

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
class PassingTensors:
    """A file's tensors, digested piece by piece, in any order and by several threads."""

    entries: Sequence[Entry]
    sample: Sample
    _listed: dict[int, list[Runs]] = field(default_factory=dict)
    _bounds: list[tuple[Ints, Ints]] = field(default_factory=list)

    def of(self, offset: int, data: Any) -> list[tuple[int, Recorded]]:
        """What the file's bytes ``data``, from ``offset`` on, add to its tensors: (entry's index, what they add)."""
        flat = np.frombuffer(data, np.uint8)
        first, last = self._extents()
        out = []
        for k in np.flatnonzero((first < offset + len(flat)) & (last > offset)).tolist():
            nbytes = numel(self.entries[k].shape) * self.entries[k].width
            found = [
                digest_sampling(flat, within_buffer(every, offset, offset + len(flat)), self.sample, nbytes)
                for every in self._runs(k)
            ]
            out.append((k, Recorded(total(w for w, _ in found), total(s for _, s in found), self.sample)))
        return out

    def _extents(self) -> tuple[Ints, Ints]:
        """Each tensor's first byte in the file, and the byte after its last."""
        if not self._bounds:
            found = [_extent(entry) for entry in self.entries]
            columns = np.array(found, np.int64).reshape(-1, 2)
            self._bounds.append((columns[:, 0], columns[:, 1]))
        return self._bounds[0]

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
