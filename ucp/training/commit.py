"""Committing what many ranks write, in two phases and without a process group.

1. The first rank makes a temporary folder beside the destination (`begin`); every rank writes its files there, flushes
   them to disk and then leaves a receipt, in one rename (`leave_receipt`), or a note of why it could not.
2. The first rank waits for all receipts, joins them into the manifest, flushes that too, and renames the folder; what
   stood there under the same tag is exchanged with it. Last of all ``latest`` is replaced (`commit`).

At every instant the destination is the old checkpoint or the new one. A save that died leaves a hidden folder that
nobody takes for a checkpoint (it has no manifest until all is written, and its name begins with ``.ucp-tmp-``); the
next save removes it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ucp import errors, formats
from ucp.checkpoint import LATEST
from ucp.errors import BadArgument, DestinationError, SaveFailed, UcpError
from ucp.formats.universal import fragmented, manifest
from ucp.storage import commit as storage
from ucp.training.retention import Keep, prune

log = logging.getLogger(__name__)

TIMEOUT = 1800.0
"""Seconds that the first rank waits for the others' receipts."""

_RECEIPTS = "receipts"
_POLL = (0.002, 0.1)  # seconds: at first, and at most

# Temporary folders of this process's saves that are under way.
_in_use: set[str] = set()


@dataclass(frozen=True)
class Session:
    """One save, the same on all its ranks. folder: where tags lie, absolute. temporary: the folder that is filled.

    save: the save's own number. world: how many ranks take part. inode: of the temporary folder. keep: which other
    checkpoints stay once this one is committed; all without it.
    """

    folder: str
    tag: str
    temporary: str
    save: str
    world: int
    latest: bool
    inode: int
    keep: Keep | None = None

    @property
    def destination(self) -> Path:
        return Path(self.folder, self.tag)

    def path(self, name: str) -> Path:
        """A file of the checkpoint, while it is being written."""
        return Path(self.temporary, name)

    def receipt(self, rank: int) -> Path:
        return Path(self.temporary, _RECEIPTS, f"{rank:05d}.json")

    def failure(self, rank: int) -> Path:
        return Path(self.temporary, _RECEIPTS, f"{rank:05d}.failed")

    @property
    def verdict(self) -> Path:
        """Where the first rank says that the save failed; it succeeded when the temporary folder is another or gone."""
        return Path(self.temporary, _RECEIPTS, "verdict.failed")


def begin(
    folder: str | os.PathLike[str], tag: str, world: int, *, latest: bool = True, keep: Keep | None = None
) -> Session:
    """Make the temporary folder for a save; to be called on the first rank, its result given to all.

    latest: name the checkpoint in the file ``latest`` in the end. Leftovers of earlier saves are removed.
    Raises BadArgument for a tag that cannot be a folder's name, DestinationError where the folder cannot be used or
    what stands at the destination is no checkpoint.
    """
    if not tag or tag.startswith(".") or tag == LATEST or "/" in tag or "\0" in tag:
        raise BadArgument(f"tag '{tag}' cannot be used: it has to be a folder's name, not hidden and not '{LATEST}'")
    target = Path(os.path.abspath(folder), tag)
    if os.path.lexists(target):
        if target.is_symlink() or not target.is_dir():
            raise DestinationError(f"{target}: exists already and is no folder; choose another tag")
        if formats.find(target) is None and any(target.iterdir()):
            raise DestinationError(f"{target}: exists already and holds no checkpoint, so it is not replaced")
    temporary = storage.reserve(target, keep=_in_use)
    _in_use.add(temporary.name)
    inode = temporary.stat().st_ino
    session = Session(str(target.parent), tag, str(temporary), secrets.token_hex(8), world, latest, inode, keep)
    try:
        Path(temporary, _RECEIPTS).mkdir()
    except OSError as error:
        abandon(session)
        raise DestinationError(f"{target}: cannot be made: {error.strerror or error}") from error
    return session


def leave_receipt(session: Session, rank: int, receipt: bytes) -> None:
    """Say that this rank's files are whole and on disk. Raises DestinationError."""
    storage.write_atomic(session.receipt(rank), receipt)


def leave_failure(session: Session, rank: int, error: BaseException) -> None:
    """Say that this rank has given up, and why, so that the first rank need not wait for it. Never raises."""
    _note(session.failure(rank), error)


def _note(path: Path, error: BaseException) -> None:
    kind = type(error).__name__ if isinstance(error, UcpError) else ""
    text = str(error) if kind else f"{type(error).__name__}: {error}"
    try:
        storage.write_atomic(path, json.dumps({"kind": kind, "text": text}).encode())
    except UcpError as second:
        log.warning("%s: cannot say that the save failed (%s): %s", path, text, second)


def commit(session: Session, *, timeout: float = TIMEOUT, watched: bool = False) -> int:
    """Wait for all receipts, then publish the checkpoint. On the first rank; returns the bytes of all its files.

    watched: the other ranks look for the verdict in files (`await_verdict`), so leave one where the save fails.

    Raises SaveFailed (or the rank's own error) where a rank gave up or left no receipt within ``timeout`` seconds;
    then, as after any other error, the temporary folder is gone and everything is as it was.
    """
    try:
        _await(session, timeout)
        receipts = [os.fspath(session.receipt(rank)) for rank in range(session.world)]
        body = fragmented.merge(session.temporary, receipts, session.save)
        try:
            _write_flushed(session.path(manifest.NAME), body)
            shutil.rmtree(session.path(_RECEIPTS))
            nbytes = sum(entry.stat().st_size for entry in os.scandir(session.temporary))
        except OSError as error:
            raise DestinationError(
                f"{session.destination}: the manifest cannot be written: {error.strerror or error}"
            ) from error
        storage.publish(Path(session.temporary), session.destination)
    except BaseException as error:
        if watched:
            condemn(session, error)
        else:
            abandon(session)
        raise
    _in_use.discard(os.path.basename(session.temporary))
    if session.latest:
        storage.write_atomic(Path(session.folder, LATEST), session.tag.encode("utf-8"))
    if session.keep is not None:
        for tag in prune(session.folder, session.tag, session.keep):
            log.info("%s was removed: newer checkpoints are kept instead", Path(session.folder, tag))
    return nbytes


def abandon(session: Session) -> None:
    """Remove what a save has written. On the first rank."""
    storage.discard(Path(session.temporary))
    _in_use.discard(os.path.basename(session.temporary))


def condemn(session: Session, error: BaseException) -> None:
    """Remove what a save has written, but for a note of why it failed, which goes with the next save. Never raises."""
    for path in Path(session.temporary).glob("*.safetensors"):
        path.unlink(missing_ok=True)
    _note(session.verdict, error)
    _in_use.discard(os.path.basename(session.temporary))


def await_verdict(session: Session, timeout: float = TIMEOUT) -> None:
    """Return once the first rank has published the checkpoint. On the other ranks.

    Raises what the first rank noted where it gave up, SaveFailed where it does neither within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    pause = _POLL[0]
    while True:
        try:
            if os.stat(session.temporary).st_ino != session.inode:
                return
        except FileNotFoundError:
            return
        if session.verdict.exists():
            raise _noted(session.verdict, f"{session.destination}: nothing was saved: ")
        if time.monotonic() > deadline:
            raise SaveFailed(
                f"{session.destination}: was not published by rank 0 within {timeout:g} seconds; it died or hangs"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, _POLL[1])


def _await(session: Session, timeout: float) -> None:
    missing = set(range(session.world))
    deadline = time.monotonic() + timeout
    pause = _POLL[0]
    while True:
        for rank in sorted(missing):
            if session.receipt(rank).exists():
                missing.discard(rank)
            elif session.failure(rank).exists():
                start = f"{session.destination}: nothing was saved, since rank {rank} failed: "
                raise _noted(session.failure(rank), start)
        if not missing:
            return
        if time.monotonic() > deadline:
            named = ", ".join(map(str, sorted(missing)[:8])) + (", …" if len(missing) > 8 else "")
            raise SaveFailed(
                f"{session.destination}: nothing was saved: {len(missing)} of {session.world} ranks ({named}) left no "
                f"receipt within {timeout:g} seconds; they died, hang, or do not see the same folder"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, _POLL[1])


def _noted(path: Path, start: str) -> UcpError:
    """The error that a rank left a note of."""
    note: dict[str, Any] = json.loads(path.read_text())
    kind = getattr(errors, note["kind"], None) if note["kind"] else None
    found = kind if isinstance(kind, type) and issubclass(kind, UcpError) else SaveFailed
    text = note["text"]
    return found(text if text.startswith(start[:-2]) else start + text)


def _write_flushed(path: Path, data: bytes) -> None:
    with open(path, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
