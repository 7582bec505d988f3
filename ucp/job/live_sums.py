"""The digests of what all ranks of a job hold of their tensors, added up. Replicas are compared, and counted once.

Each rank tells the others, in 41 bytes for each tensor, which elements it holds and their digest. Ranks with the same
elements hold replicas, which have to agree. Different elements add up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray

from ucp.columns import different
from ucp.geometry import Blocks
from ucp.job import ranks
from ucp.logical.batch import lanes_of
from ucp.logical.digest import Digest

Key = tuple[str, ...]
"""A tensor's name and state, and what else tells it from others; the same on all ranks."""

_ROW = np.dtype(
    [("key", "<i8"), ("region", "<u8"), ("first", "<u8"), ("second", "<u8"), ("elements", "<i8"), ("flawed", "?")]
)


@dataclass(frozen=True, eq=False)
class RankParts:
    """What this rank holds of tensors, as columns. keys: whose part it is; there may be several of one tensor. digests:
    (n, 2) both lanes. elements: (n,) of the part. regions: (n,) `region_of` its blocks. flawed: (n,) whether it is
    wrong in a way that its digest does not show."""

    keys: Sequence[Key]
    digests: NDArray[np.uint64]
    elements: NDArray[np.int64]
    regions: NDArray[np.uint64]
    flawed: NDArray[np.bool_]

    @classmethod
    def of(
        cls, keys: Sequence[Key], digests: NDArray[np.uint64], blocks: Sequence[Blocks], flawed: Collection[int] = ()
    ) -> RankParts:
        """Parts that hold these blocks, which tensors that are cut alike may share. flawed: the numbers of those."""
        cuts, which = different(blocks)
        odd = np.zeros(len(blocks), bool)
        odd[list(flawed)] = True
        elements = np.array([found.elements for found in cuts], np.int64)
        regions = np.array([region_of(found) for found in cuts], np.uint64)
        return cls(keys, digests, elements[which], regions[which], odd)

    @classmethod
    def of_region(cls, keys: Sequence[Key], digests: Sequence[Digest], region: int) -> RankParts:
        """Parts of one region, of which nobody asks how many elements they have."""
        n = len(keys)
        return cls(keys, lanes_of(digests), np.zeros(n, np.int64), np.full(n, region, np.uint64), np.zeros(n, bool))


@dataclass(frozen=True, slots=True)
class SumOverRanks:
    """A tensor on all ranks together. digest, elements: of what the ranks hold, with replicas counted once. differ: two
    ranks hold the same elements with different values. flawed: a rank's part is flawed. every, held: the digest and the
    elements of all parts, with every replica counted. If ranks cut their replicas differently, parts overlap, and only
    these sums come out even."""

    digest: Digest
    elements: int
    differ: bool
    flawed: bool
    every: Digest
    held: int


def region_of(blocks: Blocks) -> int:
    """A number for the elements that blocks hold. It does not depend on where they lie in memory."""
    if len(blocks) == 1:
        return xxhash.xxh3_64_intdigest(blocks.offsets.tobytes() + b"/" + blocks.sizes.tobytes())
    order = np.lexsort(blocks.offsets.T) if blocks.ndim else np.arange(len(blocks))
    return xxhash.xxh3_64_intdigest(blocks.offsets[order].tobytes() + b"/" + blocks.sizes[order].tobytes())


@dataclass(frozen=True, eq=False)
class Sums(Mapping[Key, SumOverRanks]):
    """The sums of all tensors that any rank has parts of, as columns in the order of the keys.

    The columns are those of `SumOverRanks`: (n, 2) both lanes of digests, and (n,) of the rest.
    """

    keys_in_order: Sequence[Key]
    digests: NDArray[np.uint64]
    elements: NDArray[np.int64]
    differ: NDArray[np.bool_]
    flawed: NDArray[np.bool_]
    every: NDArray[np.uint64]
    held: NDArray[np.int64]

    @cached_property
    def _numbers(self) -> Mapping[Key, int]:
        return {key: k for k, key in enumerate(self.keys_in_order)}

    def __getitem__(self, key: Key) -> SumOverRanks:
        k = self._numbers[key]
        digest, every = (Digest(*lanes[k].tolist()) for lanes in (self.digests, self.every))
        differ, flawed = bool(self.differ[k]), bool(self.flawed[k])
        return SumOverRanks(digest, int(self.elements[k]), differ, flawed, every, int(self.held[k]))

    def updated(self, others: Sums) -> Sums:
        """The same, with the others' sums of the keys that they have."""
        rest = self.without(others)
        keys = [*rest.keys_in_order, *others.keys_in_order]
        return Sums(keys, *map(np.concatenate, zip(rest._columns, others._columns, strict=True)))

    def without(self, keys: Collection[Key]) -> Sums:
        """The same, without the sums of these keys."""
        if not keys:
            return self
        kept = [k for k, key in enumerate(self.keys_in_order) if key not in keys]
        return Sums([self.keys_in_order[k] for k in kept], *(column[kept] for column in self._columns))

    @property
    def _columns(self) -> tuple[NDArray[Any], ...]:
        return self.digests, self.elements, self.differ, self.flawed, self.every, self.held

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys_in_order)

    def __len__(self) -> int:
        return len(self.keys_in_order)


def add_up(parts: RankParts) -> Sums:
    """The sums of all tensors that any rank has parts of, the same on every rank. Collective."""
    named, _ = ranks.distinct(list(dict.fromkeys(parts.keys)))
    keys = named[0] if len(named) == 1 else sorted({key for found in named for key in found})
    numbers = {key: k for k, key in enumerate(keys)}
    rows = np.empty(len(parts.keys), _ROW)
    rows["key"] = list(map(numbers.__getitem__, parts.keys))
    rows["first"], rows["second"] = parts.digests.T
    rows["region"], rows["elements"], rows["flawed"] = parts.regions, parts.elements, parts.flawed
    told: list[bytes] = [rows.tobytes()] * ranks.world_size()
    if ranks.world_size() > 1:
        dist.all_gather_object(told, rows.tobytes())
    every = np.frombuffer(b"".join(told), _ROW)
    every = every[np.lexsort((every["region"], every["key"]))]
    begins = np.ones(len(every), bool)
    begins[1:] = (every["key"][1:] != every["key"][:-1]) | (every["region"][1:] != every["region"][:-1])
    held, of = every[begins], np.cumsum(begins) - 1
    differ = (every["first"] != held["first"][of]) | (every["second"] != held["second"][of])
    odd, flawed = (np.bincount(every["key"][found], minlength=len(keys)) > 0 for found in (differ, every["flawed"]))
    digests, elements = _by_key(held, len(keys))
    whole, count = (digests, elements) if len(held) == len(every) else _by_key(every, len(keys))
    return Sums(keys, digests, elements, odd, flawed, whole, count)


def _by_key(rows: NDArray[Any], keys: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The digest and the elements of all rows of a key together. The rows are in the order of the keys, which all have
    some."""
    begins = np.searchsorted(rows["key"], np.arange(keys))
    lanes = [np.add.reduceat(rows[column], begins) if keys else rows[column] for column in ("first", "second")]
    elements = np.add.reduceat(rows["elements"], begins) if keys else rows["elements"]
    return np.stack(lanes, axis=1), elements
