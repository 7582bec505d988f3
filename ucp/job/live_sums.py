"""The digests of what all ranks of a job hold of their tensors, added up. Replicas are compared, and counted once.

Each rank tells the others, in 41 bytes for each tensor, which elements it holds and their digest. Ranks with the same
elements hold replicas, which have to agree. Different elements add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray

from ucp.geometry import Blocks
from ucp.job import ranks
from ucp.logical.digest import Digest

Key = tuple[str, ...]
"""A tensor's name and state, and what else tells it from others; the same on all ranks."""

_ROW = np.dtype(
    [("key", "<u8"), ("region", "<u8"), ("first", "<u8"), ("second", "<u8"), ("elements", "<i8"), ("flawed", "?")]
)


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank holds of a tensor. region: `region_of` its blocks. flawed: it is wrong in a way that its digest
    does not show."""

    digest: Digest
    elements: int
    region: int
    flawed: bool = False


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


def add_up(parts: Mapping[Key, Sequence[Part]]) -> dict[Key, SumOverRanks]:
    """The sums of all tensors that any rank has parts of, the same on every rank. Collective."""
    named, _ = ranks.distinct(sorted(key for key, held in parts.items() if held))
    numbers = {key: _hash(key) for found in named for key in found}
    keys = {number: key for key, number in numbers.items()}
    rows = np.array(
        [
            (numbers[key], part.region, part.digest.first, part.digest.second, part.elements, part.flawed)
            for key, held in parts.items()
            for part in held
        ],
        _ROW,
    )
    told: list[bytes] = [rows.tobytes()] * ranks.world_size()
    if ranks.world_size() > 1:
        dist.all_gather_object(told, rows.tobytes())
    every = np.frombuffer(b"".join(told), _ROW)
    _, first, of = np.unique(every[["key", "region"]], return_index=True, return_inverse=True)
    held = every[first]
    differ = (every["first"] != held["first"][of]) | (every["second"] != held["second"][of])
    odd = set(every["key"][differ].tolist())
    flawed = set(every["key"][every["flawed"]].tolist())
    once = _by_key(held)
    uneven = once if len(held) == len(every) else _by_key(every)
    return {keys[key]: SumOverRanks(*found, key in odd, key in flawed, *uneven[key]) for key, found in once.items()}


def _by_key(rows: NDArray[Any]) -> dict[int, tuple[Digest, int]]:
    """The digest and the elements of all rows of a key together."""
    found, of = np.unique(rows["key"], return_inverse=True)
    sums = np.zeros((3, len(found)), np.uint64)
    for total, column in zip(sums, ("first", "second", "elements"), strict=True):
        np.add.at(total, of, rows[column].astype(np.uint64))
    return {
        key: (Digest(first, second), count)
        for key, first, second, count in zip(found.tolist(), *sums.tolist(), strict=True)
    }


def _hash(key: Key) -> int:
    return xxhash.xxh3_64_intdigest("\0".join(key).encode("utf-8", "surrogatepass"))
