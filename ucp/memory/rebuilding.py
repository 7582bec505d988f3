"""Making again what was lost or damaged of a generation, from the blocks and the parity that are left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ucp import limits
from ucp.memory import coding
from ucp.memory.asking import Keeper
from ucp.memory.coding import Bytes
from ucp.memory.protecting import payloads, piece, stripes_of
from ucp.memory.shelf import Generation, KeptFile
from ucp.memory.stripes import Stripes, overlaps
from ucp.storage.digests import CHUNK, ChunkDigests, digest_chunks

Ranges = list[tuple[int, int]]


class Unrecoverable(Exception):
    """A generation cannot be made whole. The message says why."""


@dataclass(frozen=True)
class Damage:
    """lost: paths of files whose holder is gone. bad: path -> damaged chunks. parity: node -> damaged chunks of its
    parity, or None if it has no parity. A node that is not in it is gone."""

    lost: list[str] = field(default_factory=list)
    bad: dict[str, list[int]] = field(default_factory=dict)
    parity: dict[str, list[int] | None] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Rebuilding:
    """bad: node -> ranges of its payload that cannot be used. parity: node -> ranges of its parity that cannot."""

    keeper: Keeper
    generation: Generation
    stripes: Stripes
    bad: Mapping[str, Ranges]
    parity: Mapping[str, Ranges]

    def payload(self, node: str, start: int, stop: int) -> bytes:
        """Bytes of a node's payload, computed from what the other nodes have. Raises Unrecoverable."""
        out = bytearray()
        at, block = start, self.stripes.block
        while at < stop:
            stripe = self.stripes.given(node)[at // block]
            end = min(stop, (at // block + 1) * block, at + limits.KEEPER_PART_BYTES)
            out += self._block(node, stripe, at % block, at % block + end - at).tobytes()
            at = end
        return bytes(out)

    def _block(self, node: str, stripe: int, low: int, high: int) -> Bytes:
        stripes, have = self.stripes, dict[int, Bytes]()
        givers = stripes.givers(stripe)
        for column, other in enumerate(givers):
            start = stripes.start(other, stripe)
            if other != node and not overlaps(self.bad.get(other, []), start + low, start + high):
                have[column] = piece(self.keeper, self.generation, other, start + low, high - low)
        for row, holder in enumerate(stripes.holders(stripe)):
            start = row * stripes.block
            if len(have) < stripes.data and not overlaps(self.parity[holder], start + low, start + high):
                said = {"save": self.generation.save, "start": start + low, "stop": start + high}
                body = self.keeper.ask(holder, "parity", **said).body
                have[stripes.data + row] = np.frombuffer(body, np.uint8)
        if len(have) < stripes.data:
            raise Unrecoverable(self._why())
        return coding.restored(stripes.data, stripes.redundancy, have, givers.index(node))

    def _why(self) -> str:
        whole = sorted(
            n for n in self.stripes.nodes if any(low == 0 and high >= _ALL for low, high in self.bad.get(n, []))
        )
        torn = sorted(n for n in self.stripes.nodes if n in self.bad and n not in whole)
        parts = []
        if whole:
            parts.append(f"{len(whole)} lost node{'s' if len(whole) > 1 else ''} ({', '.join(whole)})")
        if torn:
            parts.append(f"damaged memory of {', '.join(torn)}")
        unprotected = [n for n in self.stripes.nodes if n not in whole and self.parity[n][:1] == [(0, _ALL)]]
        more = f", and the parity of {', '.join(unprotected)} was not in" if unprotected else ""
        return f"it needs {' and '.join(parts)}; redundancy is {self.stripes.redundancy}{more}"


_ALL = 1 << 62


def rebuild(
    keeper: Keeper,
    generation: Generation,
    files: Mapping[str, KeptFile],
    digests: Mapping[str, ChunkDigests],
    damage: Damage,
) -> list[KeptFile]:
    """Rebuild lost files on nodes of the job, and repair damaged ones in place. Returns the files that have moved.

    Raises Unrecoverable, and OSError if a node is lost meanwhile.
    """
    moved = []
    job = sorted({keeper.shelf.node, *keeper.peers.nodes} - set(keeper.peers.lost))
    for k, path in enumerate(sorted(damage.lost)):
        file = files[path]
        made = _work(keeper, generation, files, damage, file.origin)
        start = _start(files, file)
        body = made.payload(file.origin, start, start + file.size)
        _check(path, body, digests[path].table)
        holder = file.origin if file.origin in job else job[k % len(job)]
        answer = keeper.ask(holder, "adopt", body, path=path, origin=file.origin).header
        moved.append(replace(file, holder=holder, memory=int(answer["memory"])))
    for path, chunks in sorted(damage.bad.items()):
        file = files[path]
        made = _work(keeper, generation, files, damage, file.origin)
        for chunk in chunks:
            low, high = chunk * CHUNK, min((chunk + 1) * CHUNK, file.size)
            start = _start(files, file)
            body = made.payload(file.origin, start + low, start + high)
            _check(path, body, digests[path][chunk])
            keeper.ask(file.holder, "repair", body, path=path, at=low)
    return moved


def _work(
    keeper: Keeper, generation: Generation, files: Mapping[str, KeptFile], damage: Damage, node: str
) -> Rebuilding:
    stripes = stripes_of(generation, node, files)
    if stripes is None:
        lost = sorted({files[path].origin for path in damage.lost})
        what = f"{len(lost)} lost node{'s' if len(lost) > 1 else ''} ({', '.join(lost)})" if lost else "damaged memory"
        raise Unrecoverable(f"it needs {what}; redundancy is {generation.redundancy if generation.groups else 0}")
    bad: dict[str, Ranges] = {}
    for path in damage.lost:
        bad[files[path].origin] = [(0, _ALL)]
    for path, chunks in damage.bad.items():
        start = _start(files, files[path])
        bad.setdefault(files[path].origin, []).extend((start + k * CHUNK, start + (k + 1) * CHUNK) for k in chunks)
    return Rebuilding(keeper, generation, stripes, bad, {n: _parity(damage.parity.get(n)) for n in stripes.nodes})


def _parity(chunks: list[int] | None) -> Ranges:
    return [(0, _ALL)] if chunks is None else [(k * CHUNK, (k + 1) * CHUNK) for k in chunks]


def _start(files: Mapping[str, KeptFile], file: KeptFile) -> int:
    """Where a file begins in its node's payload."""
    return sum(_before(payloads(files, file.save)[file.origin], file.path))


def _before(files: list[KeptFile], path: str) -> Iterator[int]:
    for file in files:
        if file.path == path:
            return
        yield file.size


def _check(path: str, body: Any, wanted: bytes) -> None:
    if digest_chunks(body) != wanted:
        raise Unrecoverable(f"what the others give of {path} is not what its digest says")
