"""The checkpoints in a run's folder: which there are, which are whole, and which one a resume would take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ucp import checkpoint, formats, run_folder
from ucp.errors import DamagedCheckpoint, NotACheckpoint, RemovedMeanwhile, UcpError
from ucp.storage import locations

SCHEMA = "ucp.ls/1"
LEFTOVER = ".ucp-"
"""What the hidden folders of unfinished saves and conversions begin with (`ucp.storage.atomic`)."""


@dataclass(frozen=True)
class ListedCheckpoint:
    """A checkpoint. written: when its newest file was written, in seconds since the epoch. bytes: of all its files.
    step, layout: None if it can't be read. whole: its metadata is complete, and every file is there with its size
    (`ucp verify` checks digests and values); None if that is unknown, as for a newer version. problem: why it is not
    whole. latest: the file ``latest`` names it."""

    tag: str
    path: str
    format: str
    step: int | None
    layout: str | None
    written: float
    bytes: int
    files: int
    whole: bool | None
    problem: str | None
    latest: bool


@dataclass(frozen=True)
class Listing:
    """The checkpoints of a folder. latest: what the file ``latest`` says, or None. taken: the path of the checkpoint
    that opening the folder takes. refused: why it takes none. unfinished: folders of saves that died."""

    folder: str
    latest: str | None
    taken: str | None
    refused: str | None
    checkpoints: tuple[ListedCheckpoint, ...]
    unfinished: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


def listing(folder: str | os.PathLike[str]) -> Listing:
    """List the checkpoints in a folder and the folders below it, oldest first. For a checkpoint's own folder, list that
    one.

    A folder of weights alone may have a run's checkpoints in it. Only metadata is read.

    Parameters
    ----------
    folder
        A path or a URL.

    Returns
    -------
    Listing

    Raises
    ------
    NotACheckpoint
        If there is no checkpoint at all.
    """
    where = locations.locate(folder)
    known = formats.find(where)
    alone = None if known is None else run_folder.Chosen(where, known)
    found = [] if alone is None else [alone]
    if alone is None or not alone.format.resumable:
        found += run_folder.below(where)
    parent = where if alone is None else where.parent
    taken, refused = alone, None
    try:
        taken = alone or run_folder.choose(where)
    except NotACheckpoint as error:
        refused = str(error)
    unfinished = _unfinished(where) if alone is None else []
    if taken is not None and all(one.path != taken.path for one in found):
        found.append(taken)  # what `latest` names may lie deeper
    if not found and not unfinished:
        raise formats.explain_unknown(where)
    entries = [entry for one in found if (entry := _entry(one, parent)) is not None]
    if alone is not None and not entries and not unfinished:
        checkpoint.open(alone.path, allow_approximate=True).close()  # says what else the file is
    return Listing(
        str(where),
        _latest(parent),
        None if taken is None else str(taken.path),
        refused,
        tuple(sorted(entries, key=lambda e: (e.written, e.step or 0))),
        tuple(sorted(unfinished)),
    )


def _is_latest(path: Path, parent: Path) -> bool:
    """Whether a pointer names the checkpoint: in the listed folder, or in the one that it lies in."""
    for folder in {parent, path.parent}:
        named = run_folder.latest_name(folder)
        if named is not None and path == folder / named:
            return True
    return False


def _entry(found: run_folder.Chosen, parent: Path) -> ListedCheckpoint | None:
    """A checkpoint's entry. None if it was removed meanwhile."""
    path = found.path
    step: int | None = None
    layout = problem = None
    whole: bool | None = True
    try:
        with checkpoint.open(path, allow_approximate=True) as opened:
            step, layout = opened.catalog.training_state.global_steps, str(opened.layout)
    except RemovedMeanwhile:
        return None
    except (DamagedCheckpoint, NotACheckpoint) as error:
        if isinstance(error, NotACheckpoint) and locations.is_file(path):
            return None  # some file of torch.save's
        whole, problem = False, str(error)
    except UcpError as error:
        whole, problem = None, str(error)
    try:
        files, written = _files_of(path)
    except FileNotFoundError:
        return None
    return ListedCheckpoint(
        tag="/".join(path.parts[len(parent.parts) :]) if parent in path.parents else path.name,
        path=str(path),
        format=found.format.name,
        step=step,
        layout=layout,
        written=written / 1e9,
        bytes=sum(files),
        files=len(files),
        whole=whole,
        problem=problem,
        latest=_is_latest(path, parent),
    )


def _files_of(path: Path) -> tuple[list[int], int]:
    """The sizes of a checkpoint's files, and when the newest was written. Raises FileNotFoundError."""
    if locations.is_file(path):
        found = locations.stat(path)
        return [found.size], found.mtime_ns
    return list(_sizes(path)), locations.newest_ns(path)


def _sizes(folder: Path) -> Iterator[int]:
    """The sizes of all files in a folder and below it."""
    for name in locations.names(folder):
        if locations.is_folder(folder / name):
            yield from _sizes(folder / name)
        else:
            yield locations.stat(folder / name).size


def _latest(parent: Path) -> str | None:
    try:
        return run_folder.latest_text(parent)
    except NotACheckpoint:
        return None  # `refused` says why


def _unfinished(folder: Path) -> list[str]:
    try:
        return [name for name in locations.names(folder) if name.startswith(LEFTOVER)]
    except OSError:
        return []
