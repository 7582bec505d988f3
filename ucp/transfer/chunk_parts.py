"""Parts of chunks: ranks that want some of the same chunk need not each read all of it.

A chunk has one digest for all its bytes, so that a rank has to read all of it to verify a part. Where several ranks
want parts of one chunk, the rank that wants most of it does so for all. It digests everybody's parts of what it has
verified. The others read their parts alone and digest them, and in the end all compare. From then on every part has a
digest of its own, and is read alone whenever it is read again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash
from numpy.typing import NDArray

from ucp import limits
from ucp.errors import DigestMismatch
from ucp.geometry import Ints
from ucp.storage.digests import CHUNK, WIDTH

Part = tuple[int, int, int]
"""The file's index, the first byte and the one after the last. It lies in one chunk."""


@dataclass(eq=False)
class ChunkParts:
    """The parts that this rank reads or digests. Thread-safe.

    owned: (file, chunk) -> all ranks' parts of chunks that this rank verifies for them. alone: what it reads without
    the rest of the chunk. known: digests of parts, from chunks that were verified. seen: digests of parts that this
    rank has read, and that are not compared yet.
    """

    owned: Mapping[tuple[int, int], Sequence[Part]]
    alone: frozenset[Part]
    known: dict[Part, bytes] = field(default_factory=dict)
    seen: dict[Part, bytes] = field(default_factory=dict)

    def __contains__(self, part: Part) -> bool:
        """Whether these bytes may be read without the rest of their chunk."""
        return part in self.alone or part in self.known

    def add(self, path: str, part: Part, data: Sequence[NDArray[np.uint8]]) -> None:
        """Take a part that was read, in these pieces. Raises DigestMismatch if it is not what it was."""
        state = xxhash.xxh3_64()
        for piece in data:
            state.update(piece.data)
        found = state.digest()
        if found != (wanted := self.known.get(part) or self.seen.setdefault(part, found)):
            raise _differs(path, part, wanted, found)

    def add_chunk(self, file: int, index: int, chunk: NDArray[np.uint8]) -> None:
        """Take a chunk that was verified."""
        for part in self.owned.get((file, index), ()):
            if part not in self.known:
                self.known[part] = _digest_in(chunk, part)

    def told(self) -> NDArray[np.int64]:
        """(n, 4) What the other ranks need to compare: parts and their digests."""
        rows = [(part, self.known[part]) for parts in self.owned.values() for part in parts if part in self.known]
        digests = np.frombuffer(b"".join(digest for _, digest in rows), np.int64)
        return np.column_stack([np.array([part for part, _ in rows], np.int64).reshape(-1, 3), digests])

    def compare(
        self, told: Iterable[NDArray[np.int64]], paths: Sequence[str], chunk_of: Callable[[int, int], NDArray[np.uint8]]
    ) -> None:
        """Compare what was read by now with what the ranks have told. Raises DigestMismatch.

        chunk_of: the verified bytes of a file's chunk, for a part of which nobody has told. From now on what has no
        digest yet is read with all of its chunk.
        """
        digests = {}
        for table in told:
            raw = np.ascontiguousarray(table[:, 3]).tobytes()
            for k, row in enumerate(table[:, :3].tolist()):
                digests[tuple(row)] = raw[k * WIDTH : (k + 1) * WIDTH]
        while self.seen:
            part, found = self.seen.popitem()
            wanted = digests.get(part) or _digest_in(chunk_of(part[0], part[1] // CHUNK), part)
            if found != wanted:
                raise _differs(paths[part[0]], part, wanted, found)
            self.known[part] = wanted
        self.alone = frozenset()


def _digest_in(chunk: NDArray[np.uint8], part: Part) -> bytes:
    _, low, high = part
    begin = low // CHUNK * CHUNK
    return xxhash.xxh3_64_digest(chunk[low - begin : high - begin].data)


def _differs(path: str, part: Part, wanted: bytes, found: bytes) -> DigestMismatch:
    return DigestMismatch(
        f"{path}: bytes {part[1]} to {part[2]} are not what was verified: their digest was {wanted.hex()} and is "
        f"{found.hex()}; the file was changed meanwhile, or reads differently here: load it once nothing writes to it"
    )


def parts_in(ranges: Mapping[int, Sequence[tuple[int, int]]], sizes: Mapping[int, int]) -> NDArray[np.int64]:
    """(n, 3) The parts of chunks in these byte ranges of files, which are in order and disjoint.

    sizes: the bytes of files that have digests. Chunks that the ranges hold whole are left out, and those of which they
    have many small parts: reading these one by one would take longer than the chunk.
    """
    rows = [(file, low, high) for file, held in ranges.items() if file in sizes for low, high in held if low < high]
    table = np.array(rows, np.int64).reshape(-1, 3)
    file, low, high = table.T
    size = np.array([sizes[one] for one in file.tolist()], np.int64)
    first, last = low // CHUNK * CHUNK, (high - 1) // CHUNK * CHUNK
    one = first == last
    heads = np.column_stack([file, low, np.minimum(high, first + CHUNK)])[
        (low > first) | (one & _ends_early(high, size))
    ]
    tails = np.column_stack([file, last, high])[~one & _ends_early(high, size)]
    parts = np.concatenate([heads, tails])
    _, of, count = np.unique(_chunks(parts), axis=0, return_inverse=True, return_counts=True)
    return parts[(count <= limits.CHUNK_PARTS_COUNT)[of.reshape(-1)]]


def _ends_early(high: Ints, size: Ints) -> NDArray[np.bool_]:
    """Whether a range ends before the chunk does that it ends in."""
    return (high % CHUNK != 0) & (high != size)


def _chunks(parts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.column_stack([parts[:, 0], parts[:, 1] // CHUNK])


def shared_out(tables: Sequence[NDArray[np.int64]], rank: int) -> ChunkParts:
    """Who reads what of the chunks that several ranks want parts of. All ranks come to the same.

    tables: of each rank, as `parts_in` gives them. rank: this one.
    """
    parts = np.concatenate(tables)
    ranks = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    _, chunk = np.unique(_chunks(parts), axis=0, return_inverse=True)
    # What each rank wants of each chunk, those that want most first.
    pairs, of = np.unique(np.column_stack([chunk.reshape(-1), ranks]), axis=0, return_inverse=True)
    wanted = np.bincount(of.reshape(-1), parts[:, 2] - parts[:, 1], len(pairs))
    pairs = pairs[np.lexsort((pairs[:, 1], -wanted, pairs[:, 0]))]
    _, firsts, count = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    owner = np.where(count > 1, pairs[firsts, 1], -1)[chunk.reshape(-1)]
    owned: defaultdict[tuple[int, int], list[Part]] = defaultdict(list)
    for file, low, high in sorted(set(map(tuple, parts[owner == rank].tolist()))):
        owned[file, low // CHUNK].append((file, low, high))
    alone = parts[(ranks == rank) & (owner >= 0) & (owner != rank)]
    return ChunkParts(dict(owned), frozenset((file, low, high) for file, low, high in alone.tolist()))
