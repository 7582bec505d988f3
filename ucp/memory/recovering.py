"""Which generation can be had whole from the keepers that there are, and making it so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ucp.errors import DamagedCheckpoint
from ucp.formats.universal import manifest
from ucp.memory.peers import Peers
from ucp.memory.shelf import Generation, KeptFile, Shelf
from ucp.printable import logger
from ucp.storage.digests import CHUNK, ChunkDigests, digest_chunks
from ucp.storage.kept.wire import Frame

log = logger(__name__)


class Keeper(Protocol):
    """What recovery needs of the keeper that it runs in."""

    shelf: Shelf
    peers: Peers

    def ask(self, node: str, op: str, body: Any = b"", **fields: Any) -> Frame: ...


@dataclass(frozen=True)
class Candidate:
    """A generation, and who has what of it. entries: by path; nodes: those that have its manifest."""

    generation: Generation
    entries: dict[str, KeptFile] = field(default_factory=dict)
    nodes: list[str] = field(default_factory=list)


class Unrecoverable(Exception):
    """Why a generation cannot be had."""


def recover(keeper: Keeper) -> dict[str, Any]:
    """Have the newest generation that can be made whole on all keepers. On the keeper that is asked.

    Returns its tag, or None for it; and for every newer one why it could not be had.
    """
    refused = []
    for one in candidates(keeper):
        try:
            done = _make_whole(keeper, one)
        except (Unrecoverable, DamagedCheckpoint, OSError) as error:
            refused.append({"tag": one.generation.tag, "why": str(error)})
            continue
        return {"tag": one.generation.tag, "when": one.generation.when, "refused": refused, **done}
    return {"tag": None, "when": 0, "refused": refused}


def candidates(keeper: Keeper) -> list[Candidate]:
    """What the keepers that answer have, newest first."""
    found: dict[tuple[str, str], Candidate] = {}
    left = [keeper.shelf.node, *keeper.peers.nodes, *(one.node for one in keeper.peers.former)]
    while left:
        node = left.pop(0)
        try:
            told = keeper.ask(node, "inventory").header
        except OSError as error:
            log.warning("node '%s' has no part in the recovery: %s", node, error.strerror or error)
            continue
        left += keeper.peers.learn(told["known"])
        for raw in told["generations"]:
            made = generation_of(raw)
            one = found.setdefault((made.tag, made.save), Candidate(made))
            one.nodes.append(node)
            found[made.tag, made.save] = Candidate(_joined(one.generation, made), one.entries, one.nodes)
        for entry in (KeptFile(**raw) for raw in told["entries"]):
            known = found[entry.tag, entry.save].entries
            # Who has a file knows best; of one that is lost, all know whose it was.
            if entry.holder == node or entry.path not in known:
                known[entry.path] = entry
    return sorted(found.values(), key=lambda one: one.generation.when, reverse=True)


def _make_whole(keeper: Keeper, one: Candidate) -> dict[str, Any]:
    body = _manifest(keeper, one)
    files = digests_of(one.generation.tag, body)
    there = {keeper.shelf.node, *(one["node"] for one in keeper.peers.known)} - set(keeper.peers.lost)
    unknown = sorted(set(files) - set(one.entries))
    if unknown:
        raise Unrecoverable(f"nobody knows of {unknown[0]} and {len(unknown) - 1} more of its files")
    lost = sorted({e.origin for path, e in one.entries.items() if path in files and not _held(keeper, e, there)})
    if lost:
        raise Unrecoverable(f"it needs node '{lost[0]}', whose keeper is gone, and {len(lost) - 1} more")
    for node in sorted({one.entries[path].holder for path in files}):
        mine = {path: digests.text for path, digests in files.items() if one.entries[path].holder == node}
        bad = keeper.ask(node, "scrub", tag=one.generation.tag, files=mine).header["bad"]
        if bad:
            path, chunks = next(iter(bad.items()))
            raise Unrecoverable(f"chunk {chunks[0]} of {path} is damaged on node '{node}', and nothing protects it")
    settle(keeper, one, body)
    return {"rebuilt": [], "repaired": 0}


def settle(keeper: Keeper, one: Candidate, body: bytes) -> None:
    """Have every keeper know of the generation, and of none newer."""
    said = {**vars(one.generation), "protected": sorted(one.generation.protected)}
    entries = [vars(entry) for entry in one.entries.values()]
    for node in sorted({keeper.shelf.node, *(one["node"] for one in keeper.peers.known)}):
        if node not in keeper.peers.lost:
            keeper.ask(node, "settle", body, generation=said, entries=entries, known=keeper.peers.known)


def scrub(shelf: Shelf, files: Mapping[str, str]) -> dict[str, list[int]]:
    """The damaged chunks of files that are here. files: their digests' tables, in text."""
    bad = {}
    for path, text in files.items():
        with shelf.lock:
            entry = shelf.entries[path]
            memory = shelf.memory(entry.memory)
        wanted = ChunkDigests.from_text(entry.size, text)
        found = digest_chunks(memory.view[: entry.size])
        if found != wanted.table:
            there = ChunkDigests(entry.size, found)
            bad[path] = [k for k in range(-(-entry.size // CHUNK)) if there[k] != wanted[k]]
    return bad


def digests_of(tag: str, body: bytes) -> dict[str, ChunkDigests]:
    """The files that a manifest names, by their paths in the run's memory, with their digests.

    Raises DamagedCheckpoint where the manifest is not what was written.
    """
    path = f"{tag}/{manifest.NAME}"
    files = manifest.parse(path, body).get("files")
    try:
        columns = zip(files["path"], files["size"], files["digests"], strict=True)  # type: ignore[index]
        return {f"{tag}/{name}": ChunkDigests.from_text(size, text) for name, size, text in columns}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path}: its table of files is none: {error}") from error


def generation_of(raw: Mapping[str, Any]) -> Generation:
    """A generation from what another keeper says of it."""
    groups = tuple(tuple(map(str, group)) for group in raw["groups"])
    return Generation(raw["tag"], raw["save"], raw["when"], groups, raw["redundancy"], frozenset(raw["protected"]))


def _joined(one: Generation, other: Generation) -> Generation:
    return Generation(one.tag, one.save, one.when, one.groups, one.redundancy, one.protected | other.protected)


def _held(keeper: Keeper, entry: KeptFile, there: set[str]) -> bool:
    return entry.holder in there


def _manifest(keeper: Keeper, one: Candidate) -> bytes:
    path = f"{one.generation.tag}/{manifest.NAME}"
    node = one.nodes[0]
    size = keeper.ask(node, "stat", path=path).header["found"]["size"]
    return bytes(keeper.ask(node, "read", path=path, start=0, stop=size).body)
