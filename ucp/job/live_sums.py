"""What all ranks of a job hold of their tensors, added up: parts once, and replicas compared.

Each rank tells, in 41 bytes for each tensor, which elements it holds and their digest. Ranks that tell of the same
elements hold replicas, which have to agree; different elements add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
import xxhash

from ucp.geometry import Blocks
from ucp.job import ranks
from ucp.logical.digest import Digest

Key = tuple[str, ...]
"""A tensor's name and state, and what else tells it from others; the same on all ranks."""

_ROW = np.dtype(
    [("key", "<u8"), ("region", "<u8"), ("first", "<u8"), ("second", "<u8"), ("elements", "<i8"), ("flawed", "?")]
)


@dataclass(frozen=True)
class Part:
    """What this rank holds of a tensor. region: `region_of` its blocks. flawed: it is not what its digest says, for
    another reason than its digest shows."""

    digest: Digest
    elements: int
    region: int
    flawed: bool = False


@dataclass(frozen=True)
class SumOverRanks:
    """A tensor on all ranks together. elements: held, replicas once. differ: two ranks hold the same elements with
    different values. flawed: a rank's part is. every, held: the digest and the elements of all parts, replicas counted
    as often as there are: where ranks cut their replicas differently, parts overlap, and only these add up evenly."""

    digest: Digest
    elements: int
    differ: bool
    flawed: bool
    every: Digest
    held: int


def region_of(blocks: Blocks) -> int:
    """A number for the elements that blocks hold, wherever they lie."""
    order = np.lexsort(blocks.offsets.T) if blocks.ndim else np.arange(len(blocks))
    return xxhash.xxh3_64_intdigest(blocks.offsets[order].tobytes() + b"/" + blocks.sizes[order].tobytes())


def add_up(parts: Mapping[Key, Sequence[Part]]) -> dict[Key, SumOverRanks]:
    """The sums of all tensors that any rank has parts of, the same on every rank. Collective."""
    named, _ = ranks.distinct(sorted(key for key, held in parts.items() if held))
    keys = {_hash(key): key for found in named for key in found}
    rows = np.array(
        [
            (_hash(key), part.region, part.digest.first, part.digest.second, part.elements, part.flawed)
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
    sums: dict[int, tuple[Digest, int]] = {}
    for key, _, a, b, elements, _ in held.tolist():
        digest, count = sums.get(key, (Digest(), 0))
        sums[key] = digest + Digest(a, b), count + elements
    uneven: dict[int, tuple[Digest, int]] = {}
    for key, _, a, b, elements, _ in every.tolist():
        digest, count = uneven.get(key, (Digest(), 0))
        uneven[key] = digest + Digest(a, b), count + elements
    return {keys[key]: SumOverRanks(*found, key in odd, key in flawed, *uneven[key]) for key, found in sums.items()}


def _hash(key: Key) -> int:
    return xxhash.xxh3_64_intdigest("\0".join(key).encode("utf-8", "surrogatepass"))
