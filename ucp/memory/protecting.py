"""Parity between keepers: each pulls the blocks that its own parity is made of, over its own sockets."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ucp import limits
from ucp.memory import coding
from ucp.memory.asking import Keeper
from ucp.memory.coding import Bytes
from ucp.memory.shelf import Generation, KeptFile
from ucp.memory.stripes import Stripes
from ucp.printable import logger
from ucp.storage.digests import digest_chunks

log = logger(__name__)


class Outdated(Exception):
    """The generation that is worked on no longer exists, or is no longer the newest."""


@dataclass(frozen=True)
class Pace:
    """At most how many bytes per second are taken from the network; None for no bound."""

    most: int | None
    began: float

    def keep(self, taken: int) -> None:
        """Wait until this many bytes since the beginning are not too many."""
        if self.most is not None:
            time.sleep(max(self.began + taken / self.most - time.monotonic(), 0))


def payloads(files: Mapping[str, KeptFile], save: str) -> dict[str, list[KeptFile]]:
    """Node -> the files of a save that it saved, in the order of its payload."""
    out: dict[str, list[KeptFile]] = {}
    for path in sorted(files):
        if files[path].save == save:
            out.setdefault(files[path].origin, []).append(files[path])
    return out


def stripes_of(generation: Generation, node: str, files: Mapping[str, KeptFile]) -> Stripes | None:
    """The stripes of the node's group. None if nothing protects the node."""
    group = next((group for group in generation.groups if node in group), ())
    if not 0 < generation.redundancy < len(group):
        return None
    sizes = {name: sum(file.size for file in held) for name, held in payloads(files, generation.save).items()}
    return Stripes(group, generation.redundancy, max(sizes.get(name, 0) for name in group))


def protect(keeper: Keeper, generation: Generation, network: int | None) -> None:
    """Make this node's parity for a generation, and tell all keepers. Raises OSError if a node cannot be reached,
    Outdated if a newer generation has come."""
    shelf = keeper.shelf
    with shelf.lock:
        stripes = stripes_of(generation, shelf.node, shelf.files)
    if stripes is None:
        return
    block = stripes.block
    number = shelf.take(block * stripes.redundancy)
    try:
        view = np.frombuffer(shelf.memory(number).view, np.uint8)
        pace, taken = Pace(network, time.monotonic()), 0
        for row, stripe in enumerate(stripes.held(shelf.node)):
            for low, high in _steps(block):
                if shelf.generations.get(generation.tag) is None or not shelf.is_newest(generation):
                    raise Outdated
                pieces = [
                    piece(keeper, generation, node, stripes.start(node, stripe) + low, high - low)
                    for node in stripes.givers(stripe)
                ]
                coding.parity(
                    stripes.data, stripes.redundancy, row, pieces, view[row * block + low : row * block + high]
                )
                taken += sum(map(len, pieces))
                pace.keep(taken)
        table = digest_chunks(shelf.memory(number).view)
    except BaseException:
        shelf.free(number)
        raise
    shelf.keep_parity(generation, number, table)
    said: dict[str, Any] = {"tag": generation.tag, "save": generation.save, "whose": shelf.node}
    keeper.peers.tell("protected", **said)
    keeper.ask(shelf.node, "protected", **said)


def piece(keeper: Keeper, generation: Generation, node: str, start: int, size: int) -> Bytes:
    """Bytes of a node's payload, with zeros after its end. Raises OSError."""
    with keeper.shelf.lock:
        files = payloads(keeper.shelf.files, generation.save).get(node, [])
    body = b"".join(_ranges(keeper, files, start, start + size))
    return np.frombuffer(body.ljust(size, b"\0"), np.uint8)


def _ranges(keeper: Keeper, files: list[KeptFile], start: int, stop: int) -> Iterator[bytes | memoryview]:
    """The bytes ``[start, stop)`` of these files, one after the other."""
    at = 0
    for file in files:
        low, high = max(start - at, 0), min(stop - at, file.size)
        if low < high:
            yield keeper.ask(file.holder, "read", path=file.path, start=low, stop=high).body
        at += file.size


def _steps(block: int) -> Iterator[tuple[int, int]]:
    for low in range(0, block, limits.KEEPER_PART_BYTES):
        yield low, min(low + limits.KEEPER_PART_BYTES, block)
