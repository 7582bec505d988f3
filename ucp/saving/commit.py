"""Committing what many ranks write, in two phases and without a process group.

1. The first rank makes a temporary folder beside the destination (`begin`). Every rank writes its files there, flushes
   them to disk and then leaves a receipt, in one rename (`leave_receipt`), or a note about why it could not.
2. The first rank waits for all receipts, joins them into the manifest, flushes that too, and renames the folder. If
   there already was something under the same tag, it is exchanged with it. At the end ``latest`` is replaced
   (`commit`).

At every instant the destination is the old checkpoint or the new one. A save that died leaves a hidden folder. Nobody
takes it for a checkpoint, since it has no manifest until all is written, and its name begins with ``.ucp-tmp-``. The
next save removes it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ucp import formats, limits
from ucp.errors import BadArgument, DestinationError, SaveFailed, UcpError, described, noted, rebuilt
from ucp.formats.universal import fragmented, manifest
from ucp.printable import logger
from ucp.run_folder import LATEST
from ucp.saving.retention import Keep, prune
from ucp.storage import atomic, disk, locations, names
from ucp.storage.locations import is_remote, locate

log = logger(__name__)


_RECEIPTS = "receipts"

# Temporary folders of the saves that this process has under way.
_in_use: set[str] = set()


@dataclass(frozen=True)
class Session:
    """One save, the same on all its ranks.

    folder: the absolute path of the folder with the tags. temporary: the folder that is filled. save: the save's own
    number. world: how many ranks take part. inode: the temporary folder's. keep: which other checkpoints stay once this
    one is committed; None for all. began: when the state was taken, in nanoseconds since the epoch.
    """

    folder: str
    tag: str
    temporary: str
    save: str
    world: int
    latest: bool
    inode: int
    keep: Keep | None = None
    began: int = field(default_factory=time.time_ns)

    @property
    def destination(self) -> Path:
        return locate(self.folder) / self.tag

    def path(self, name: str) -> Path:
        """A file of the checkpoint, while it is being written."""
        return locate(self.temporary) / name

    def receipt(self, rank: int) -> Path:
        return self.path(_RECEIPTS) / f"{rank:05d}.json"

    def failure(self, rank: int) -> Path:
        return self.path(_RECEIPTS) / f"{rank:05d}.failed"

    @property
    def verdict(self) -> Path:
        """Where the first rank says that the save failed."""
        return self.path(_RECEIPTS) / "verdict.failed"

    @property
    def prefix(self) -> str:
        """What the manifest puts before the files' names."""
        return ""

    def is_published(self) -> bool:
        """Whether the first rank has published the checkpoint. The temporary folder is then another one, or gone."""
        try:
            return os.stat(self.temporary).st_ino != self.inode
        except FileNotFoundError:
            return True

    def put(self, path: Path, data: bytes) -> None:
        """Write a small file in one step. Raises DestinationError."""
        atomic.write_atomic(path, data)

    def publish(self, body: bytes) -> int:
        """Add the manifest, and put the checkpoint in its place. Returns how many bytes all files have. For the first
        rank. Raises DestinationError.
        """
        try:
            disk.write_new(self.path(manifest.NAME), body)
            # So that a checkpoint that took long to write does not look newer than what was taken meanwhile.
            os.utime(self.path(manifest.NAME), ns=(self.began, self.began))
            disk.remove_tree(self.path(_RECEIPTS))
            nbytes = sum(entry.stat().st_size for entry in os.scandir(self.temporary))
        except OSError as error:
            raise DestinationError(
                f"{self.destination}: the manifest cannot be written: {error.strerror or error}"
            ) from error
        atomic.publish(Path(self.temporary), self.destination)
        return nbytes

    def discard(self) -> None:
        """Remove what was written."""
        atomic.discard(Path(self.temporary))

    def discard_tensors(self) -> None:
        """Remove what was written, except the notes."""
        for path in Path(self.temporary).glob("*.safetensors"):
            disk.remove_file(path, missing_ok=True)


def begin(
    folder: str | os.PathLike[str],
    tag: str,
    world: int,
    *,
    latest: bool = True,
    keep: Keep | None = None,
    process: int | None = None,
) -> Session:
    """Make the temporary folder for a save. Call it on the first rank, and give the result to all.

    latest: in the end, name the checkpoint in the file ``latest``. process: the process that will commit, if not this
    one; while it lives, nobody else removes the folder. Leftovers of earlier saves are removed.
    Raises BadArgument for a tag that cannot be a folder's name, DestinationError if the folder cannot be used or
    something at the destination is no checkpoint.
    """
    if not tag or tag.startswith(".") or tag == LATEST or "/" in tag or "\0" in tag:
        raise BadArgument(f"tag '{tag}' cannot be used: it has to be a folder's name, not hidden and not '{LATEST}'")
    names.entry(tag, "tag", BadArgument, "choose another")
    if is_remote(folder):
        return begin_remote(folder, tag, world, latest=latest, keep=keep)
    target = Path(os.path.abspath(folder), tag)
    if os.path.lexists(target):
        if target.is_symlink() or not target.is_dir():
            raise DestinationError(f"{target}: exists already and is no folder; choose another tag")
        if formats.find(target) is None and any(target.iterdir()):
            raise DestinationError(f"{target}: exists already and holds no checkpoint, so it is not replaced")
    temporary = atomic.reserve(target, keep=_in_use, process=process)
    _in_use.add(temporary.name)
    inode = temporary.stat().st_ino
    session = Session(str(target.parent), tag, str(temporary), secrets.token_hex(8), world, latest, inode, keep)
    try:
        disk.make_folder(Path(temporary, _RECEIPTS))
    except OSError as error:
        abandon(session)
        raise DestinationError(f"{target}: cannot be made: {error.strerror or error}") from error
    return session


# --- behind a URL ----------------------------------------------------------------------------------------------------

_SAVE = re.compile(r"[0-9a-f]{16}")
_PUBLISHED = "published"


@dataclass(frozen=True)
class RemoteSession(Session):
    """A save behind a URL, where nothing can be renamed. The files lie in the save's own folder (``temporary``) below
    the tag. The manifest above that folder is written last, in one request."""

    @property
    def prefix(self) -> str:
        return f"{self.save}/"

    def is_published(self) -> bool:
        return locations.exists(self.path(_RECEIPTS) / _PUBLISHED)

    def put(self, path: Path, data: bytes) -> None:
        try:
            locations.write(path, data)
        except OSError as error:
            raise DestinationError(f"{path}: cannot be written: {error.strerror or error}") from error

    def publish(self, body: bytes) -> int:
        sizes = [locations.stat(self.path(n)).size for n in locations.names(self.temporary) if n != _RECEIPTS]
        try:
            self.put(self.destination / manifest.NAME, body)
        except DestinationError:
            if not _holds(self.destination / manifest.NAME, body):
                raise
        # From here on the checkpoint is the new one. If anything fails now, its files must not be removed.
        try:
            self.put(self.path(_RECEIPTS) / _PUBLISHED, b"")
        except DestinationError as error:
            log.warning("%s: is saved, but the other ranks may not be told: %s", self.destination, error)
        for name in locations.names(self.destination):
            if _SAVE.fullmatch(name) and name != self.save:
                _remove_remote(self.destination / name)
        return sum(sizes) + len(body)

    def discard(self) -> None:
        _remove_remote(locate(self.temporary))

    def discard_tensors(self) -> None:
        # Nothing may have been written yet, and then there is no folder.
        for name in locations.names(self.temporary) if locations.exists(self.temporary) else []:
            if name.endswith(".safetensors"):
                locations.remove(self.path(name))


def _holds(path: Path, data: bytes) -> bool:
    """Whether a write that seemed to fail has succeeded after all."""
    try:
        return locations.read(path) == data
    except OSError:
        return False


def begin_remote(
    url: str | os.PathLike[str], tag: str, world: int, *, latest: bool = True, keep: Keep | None = None
) -> RemoteSession:
    """`begin` behind a URL. What dead saves have left under other tags is removed once it is old enough
    (`limits.STALE_FOLDER_SECONDS`).

    Raises DestinationError if the URL cannot be used, or holds something else under the tag.
    """
    folder = locate(url)
    save = secrets.token_hex(8)
    try:
        there = locations.names(folder / tag) if locations.exists(folder / tag) else []
        if formats.find(folder / tag) is None and any(not _SAVE.fullmatch(name) for name in there):
            raise DestinationError(f"{folder / tag}: exists already and holds no checkpoint, so it is not replaced")
        for name in locations.names(folder) if locations.exists(folder) else []:
            _sweep_remote(folder / name)
    except OSError as error:
        raise DestinationError(f"{folder}: cannot be used: {error.strerror or error}") from error
    temporary = str(folder / tag / save)
    return RemoteSession(str(folder), tag, temporary, save, world, latest, 0, keep)


def _sweep_remote(place: Path) -> None:
    """Remove what saves have left under a tag that never got a manifest, once it is old enough."""
    if not locations.is_folder(place):
        return
    there = locations.names(place)
    if not there or not all(_SAVE.fullmatch(name) for name in there):
        return
    newest = max((locations.newest_ns(place / name) for name in there), default=0)
    if newest and time.time() - newest / 1e9 > limits.STALE_FOLDER_SECONDS:
        _remove_remote(place)


def _remove_remote(place: Path) -> None:
    try:
        locations.remove_tree(place)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s could not be removed: %s", place, error)


# --- the steps of every save -----------------------------------------------------------------------------------------


def leave_receipt(session: Session, rank: int, receipt: bytes) -> None:
    """Say that this rank's files are whole and on disk. Raises DestinationError."""
    session.put(session.receipt(rank), receipt)


def leave_failure(session: Session, rank: int, error: BaseException) -> None:
    """Say that this rank has given up, and why, so that the first rank need not wait for it. Never raises."""
    _note(session, session.failure(rank), error)


def leave_verdict(session: Session, error: BaseException) -> None:
    """Say for the first rank, whose writing process has ended, that it has given up. Never raises.

    Nothing is removed, since it may have published already.
    """
    if not session.is_published():
        _note(session, session.verdict, error)


def _note(session: Session, path: Path, error: BaseException, tells_outcome: bool = False) -> None:
    """Leave a note about an error. tells_outcome: the error's text already says that nothing was saved."""
    note = {**noted(error), "tells_outcome": tells_outcome}
    try:
        session.put(path, json.dumps(note).encode())
    except UcpError as second:
        log.warning("%s: cannot say that the save failed (%s): %s", path, described(error), second)


def commit(session: Session, *, timeout: float = limits.SAVE_TIMEOUT_SECONDS, watched: bool = False) -> int:
    """Wait for all receipts, then publish the checkpoint. For the first rank. Returns how many bytes all its files
    have.

    watched: the other ranks look for the verdict in files (`await_verdict`), so leave one if the save fails.

    Raises SaveFailed (or the rank's own error) if a rank gave up or left no receipt within ``timeout`` seconds. Then,
    as after any other error, the temporary folder is gone and everything is as it was.
    """
    failed: Exception | None = None
    try:
        failed = _await(session, timeout)
        if failed is not None:
            raise failed
        receipts = [str(session.receipt(rank)) for rank in range(session.world)]
        nbytes = session.publish(fragmented.merge(session.temporary, receipts, session.save, session.prefix))
    except BaseException as error:
        if watched:
            condemn(session, error, tells_outcome=error is failed)
        else:
            abandon(session)
        raise
    _in_use.discard(os.path.basename(session.temporary))
    if session.latest:
        session.put(locate(session.folder) / LATEST, session.tag.encode("utf-8"))
    if session.keep is not None:
        for tag in prune(session.folder, session.tag, session.keep):
            log.info("%s was removed: newer checkpoints are kept instead", locate(session.folder) / tag)
    return nbytes


def abandon(session: Session) -> None:
    """Remove what a save has written. For the first rank."""
    session.discard()
    _in_use.discard(os.path.basename(session.temporary))


def release(session: Session) -> None:
    """Forget a save that another process has finished, with or without success. For the first rank."""
    _in_use.discard(os.path.basename(session.temporary))


def condemn(session: Session, error: BaseException, *, tells_outcome: bool = False) -> None:
    """Remove what a save has written, except a note about why it failed, which the next save removes. Never raises.

    tells_outcome: the error's text already says that nothing was saved.
    """
    session.discard_tensors()
    _note(session, session.verdict, error, tells_outcome)
    _in_use.discard(os.path.basename(session.temporary))


def await_verdict(session: Session, timeout: float = limits.SAVE_TIMEOUT_SECONDS) -> None:
    """Return once the first rank has published the checkpoint. For the other ranks.

    Raises what the first rank noted if it gave up, SaveFailed if it does neither within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    pause = limits.RECEIPT_POLL_SECONDS[0]
    while True:
        if session.is_published():
            return
        if locations.exists(session.verdict):
            raise _noted(session.verdict, f"{session.destination}: nothing was saved: ")
        if time.monotonic() > deadline:
            raise SaveFailed(
                f"{session.destination}: was not published by rank 0 within {timeout:g} seconds; it died or hangs"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, limits.RECEIPT_POLL_SECONDS[1])


def _await(session: Session, timeout: float) -> Exception | None:
    """Wait for all receipts. Returns why the save has failed, or None if it has not."""
    missing = set(range(session.world))
    deadline = time.monotonic() + timeout
    pause = limits.RECEIPT_POLL_SECONDS[0]
    while True:
        for rank in sorted(missing):
            if locations.exists(session.receipt(rank)):
                missing.discard(rank)
            elif locations.exists(session.failure(rank)):
                start = f"{session.destination}: nothing was saved, since rank {rank} failed: "
                return _noted(session.failure(rank), start)
        if not missing:
            return None
        if time.monotonic() > deadline:
            named = ", ".join(map(str, sorted(missing)[:8])) + (", …" if len(missing) > 8 else "")
            return SaveFailed(
                f"{session.destination}: nothing was saved: {len(missing)} of {session.world} ranks ({named}) left no "
                f"receipt within {timeout:g} seconds; they died, hang, or do not see the same folder"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, limits.RECEIPT_POLL_SECONDS[1])


def _noted(path: Path, start: str) -> Exception:
    """The error about which a rank left a note."""
    note: dict[str, Any] = json.loads(locations.read(path))
    return rebuilt(note, "" if note["tells_outcome"] else start)
