"""The checkpoints in a run's folder: which there are, which are whole, and which one a resume would take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ucp import checkpoint, formats
from ucp.errors import BadArgument, DamagedCheckpoint, NotACheckpoint, UcpError
from ucp.printable import logger
from ucp.storage import locations

SCHEMA = "ucp.ls/1"
LEFTOVER = ".ucp-"
"""What the hidden folders of unfinished saves and conversions begin with (`ucp.storage.atomic`)."""

log = logger(__name__)


@dataclass(frozen=True)
class ListedCheckpoint:
    """A checkpoint. written: seconds since the epoch, of its newest file. bytes: of all its files. step, layout: None
    where it can't be read. whole: its metadata is complete and every file is there with its size (digests and values:
    `ucp verify`); None where that can't be told, as of a newer version's. problem: why it is not so. latest: the file
    ``latest`` names it."""

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
    """latest: what the file of that name says, None without one. unfinished: folders of saves that died."""

    folder: str
    latest: str | None
    checkpoints: tuple[ListedCheckpoint, ...]
    unfinished: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


def listing(folder: str | os.PathLike[str]) -> Listing:
    """The checkpoints in a folder, oldest first; of a checkpoint's own folder, that one.

    Reads metadata only. Raises NotACheckpoint where there is none at all.
    """
    where = locations.locate(folder)
    alone = formats.find(where) is not None
    found = [where] if alone else checkpoint.checkpoints_in(where)
    parent = where.parent if alone else where
    latest = _latest(parent / checkpoint.LATEST)
    unfinished = [] if alone else _unfinished(where)
    if not found and not unfinished:
        raise formats.explain_unknown(where)
    entries = [_entry(path, latest) for path in found]
    return Listing(
        str(where),
        latest,
        tuple(sorted(entries, key=lambda e: (e.written, e.step or 0))),
        tuple(sorted(unfinished)),
    )


def resolve(folder: str | os.PathLike[str], tag: str | None = None) -> Path:
    """The checkpoint that is meant: the folder itself, the one with this tag, or what ``latest`` names.

    Unlike `ucp.open`, never another one instead of one that is damaged. Raises NotACheckpoint, BadArgument where there
    are several and nothing says which.
    """
    where = locations.locate(folder)
    if tag is not None:
        if not locations.exists(where / tag):
            raise checkpoint.unknown_tag(where, tag)
        return where / tag
    if formats.find(where) is not None:
        return where
    found = checkpoint.checkpoints_in(where)
    named = _latest(where / checkpoint.LATEST)
    if named is not None and "/" not in named:
        if not found:
            raise NotACheckpoint(f"{where / checkpoint.LATEST}: names '{named}', but no checkpoint is there")
        return where / named
    if not found:
        raise formats.explain_unknown(where)
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise BadArgument(
            f"{where}: holds {len(found)} checkpoints ({names}) and no file 'latest'; say which with --tag"
        )
    return found[0]


def _entry(path: Path, latest: str | None) -> ListedCheckpoint:
    reader = formats.find(path)
    step: int | None = None
    layout = problem = None
    whole: bool | None = True
    try:
        with checkpoint.open(path) as opened:
            step, layout = opened.catalog.training_state.global_steps, str(opened.layout)
    except (DamagedCheckpoint, NotACheckpoint) as error:
        whole, problem = False, str(error)
    except UcpError as error:
        whole, problem = None, str(error)
    files = list(_sizes(path))
    return ListedCheckpoint(
        tag=path.name,
        path=str(path),
        format="" if reader is None else reader.NAME,
        step=step,
        layout=layout,
        written=locations.newest_ns(path) / 1e9,
        bytes=sum(files),
        files=len(files),
        whole=whole,
        problem=problem,
        latest=path.name == latest,
    )


def _sizes(folder: Path) -> Iterator[int]:
    """Of all files in a folder and those in it."""
    for name in locations.names(folder):
        if locations.is_folder(folder / name):
            yield from _sizes(folder / name)
        else:
            yield locations.stat(folder / name).size


def _latest(pointer: Path) -> str | None:
    try:
        return locations.read(pointer).decode("utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        log.warning("%s: cannot be read: %s", pointer, error.strerror or error)
        return None
    except UnicodeDecodeError as error:
        log.warning("%s: cannot be read: %s", pointer, error)
        return None


def _unfinished(folder: Path) -> list[str]:
    try:
        return [name for name in locations.names(folder) if name.startswith(LEFTOVER)]
    except OSError:
        return []
