"""Finding a generation that the keepers can make whole together, and making it whole."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ucp import limits
from ucp.errors import DamagedCheckpoint
from ucp.formats.universal import manifest
from ucp.memory.asking import Keeper
from ucp.memory.rebuilding import Damage, Unrecoverable, rebuild
from ucp.memory.shelf import Generation, KeptFile, Shelf
from ucp.printable import logger
from ucp.storage.digests import CHUNK, ChunkDigests, digest_chunks

log = logger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A generation, and who has what of it. files: path -> file. nodes: those that have its manifest."""

    generation: Generation
    files: dict[str, KeptFile] = field(default_factory=dict)
    nodes: list[str] = field(default_factory=list)


def recover(keeper: Keeper) -> dict[str, Any]:
    """Make the newest generation whole for which that is possible, on all keepers. Runs on the keeper that is asked.

    Returns its tag, or None, and for every newer one the reason why it could not be made whole.
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
    """The generations of all keepers that answer, newest first."""
    found: dict[tuple[str, str], Candidate] = {}
    files: dict[str, KeptFile] = {}
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
            found[made.tag, made.save] = Candidate(_joined(one.generation, made), one.files, one.nodes)
        for file in (KeptFile(**raw) for raw in told["files"]):
            # The holder of a file knows it best. If the holder is lost, all know whose file it was.
            if file.holder == node or file.path not in files:
                files[file.path] = file
    for file in files.values():
        if (file.tag, file.save) in found:
            found[file.tag, file.save].files[file.path] = file
    return sorted(found.values(), key=lambda one: one.generation.when, reverse=True)


def _make_whole(keeper: Keeper, one: Candidate) -> dict[str, Any]:
    body = _manifest(keeper, one)
    digests = digests_of(one.generation.tag, body)
    unknown = sorted(set(digests) - set(one.files))
    if unknown:
        raise Unrecoverable(f"nobody knows of {unknown[0]} and {len(unknown) - 1} more of its files")
    damage = _damage(keeper, one, digests)
    lost = sorted({one.files[path].origin for path in damage.lost})
    if lost or damage.bad:
        _tell(keeper, one, body, "know")
        moved = rebuild(keeper, one.generation, {p: one.files[p] for p in digests}, digests, damage)
        one.files.update({file.path: file for file in moved})
    _tell(keeper, one, body, "settle")
    for node, chunks in damage.parity.items():
        if chunks != [] and node not in keeper.peers.lost:
            keeper.ask(node, "protect", tag=one.generation.tag, save=one.generation.save)
    return {"rebuilt": lost, "repaired": sum(map(len, damage.bad.values()))}


def _damage(keeper: Keeper, one: Candidate, digests: Mapping[str, ChunkDigests]) -> Damage:
    """What is lost with a node, or does not match its digest."""
    damage = Damage()
    there = {keeper.shelf.node, *(n["node"] for n in keeper.peers.known)} - set(keeper.peers.lost)
    damage.lost.extend(path for path in digests if one.files[path].holder not in there)
    for node in sorted(there):
        mine = {path: table.text for path, table in digests.items() if one.files[path].holder == node}
        told = keeper.ask(node, "scrub", save=one.generation.save, files=mine).header
        damage.lost.extend(told["missing"])
        damage.bad.update(told["bad"])
        damage.parity[node] = told["parity"]
    return damage


def _tell(keeper: Keeper, one: Candidate, body: bytes, op: str) -> None:
    """Tell every keeper about the generation. With 'settle' they also drop newer ones."""
    said = {**vars(one.generation), "protected": sorted(one.generation.protected)}
    files = [vars(file) for file in one.files.values()]
    for node in sorted({keeper.shelf.node, *(n["node"] for n in keeper.peers.known)} - set(keeper.peers.lost)):
        keeper.ask(node, op, body, generation=said, files=files, known=keeper.peers.known)


def scrub(shelf: Shelf, save: str, files: Mapping[str, str]) -> dict[str, Any]:
    """Which files of a save are missing here, which of their chunks are damaged, and which chunks of this node's parity
    are.

    files: path -> table of digests, in text. The parity's chunks are None if there is no parity.
    """
    bad, missing = {}, []
    for path, text in files.items():
        with shelf.lock:
            file = shelf.files.get(path)
            view = None if file is None or file.holder != shelf.node else shelf.memory(file.memory).view[: file.size]
        if file is None or view is None:
            missing.append(path)
        elif chunks := _differing(view, ChunkDigests.from_text(file.size, text)):
            bad[path] = chunks
    with shelf.lock:
        kept = shelf.parities.get(save)
        memory = None if kept is None else shelf.memory(kept.memory).view
    parity = None if kept is None or memory is None else _differing(memory, ChunkDigests(len(memory), kept.table))
    return {"bad": bad, "missing": missing, "parity": parity}


def _differing(view: memoryview, wanted: ChunkDigests) -> list[int]:
    """The chunks that are not what they should be. Nobody trains while a recovery waits for this, so that it takes all
    processors there are."""
    steps = range(0, len(view), limits.DIGEST_BATCH_BYTES)
    with ThreadPoolExecutor(min(limits.processors(), limits.SCRUBBING_THREADS_MAX_COUNT), "ucp-scrub") as pool:
        tables = pool.map(lambda at: digest_chunks(view[at : at + limits.DIGEST_BATCH_BYTES]), steps)
        found = ChunkDigests(wanted.size, b"".join(tables))
    return [k for k in range(-(-wanted.size // CHUNK)) if found[k] != wanted[k]] if found != wanted else []


def digests_of(tag: str, body: bytes) -> dict[str, ChunkDigests]:
    """The files that a manifest names, by their paths in the run's memory, with their digests.

    Raises DamagedCheckpoint if the manifest is not what was written.
    """
    path = f"{tag}/{manifest.NAME}"
    files = manifest.parse(path, body).get("files")
    try:
        columns = zip(files["path"], files["size"], files["digests"], strict=True)  # type: ignore[index]
        return {f"{tag}/{name}": ChunkDigests.from_text(size, text) for name, size, text in columns}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path}: its table of files is none: {error}") from error


def generation_of(raw: Mapping[str, Any]) -> Generation:
    """A generation, from what another keeper says about it."""
    groups = tuple(tuple(map(str, group)) for group in raw["groups"])
    return Generation(raw["tag"], raw["save"], raw["when"], groups, raw["redundancy"], frozenset(raw["protected"]))


def _joined(one: Generation, other: Generation) -> Generation:
    return Generation(one.tag, one.save, one.when, one.groups, one.redundancy, one.protected | other.protected)


def _manifest(keeper: Keeper, one: Candidate) -> bytes:
    path = f"{one.generation.tag}/{manifest.NAME}"
    node = one.nodes[0]
    size = keeper.ask(node, "stat", path=path).header["found"]["size"]
    return bytes(keeper.ask(node, "read", path=path, start=0, stop=size).body)
