"""Which checkpoint of a run's folder is meant: the one place where that is decided.

In this order:

1. A tag picks the folder of that name. It may have slashes, but leads nowhere out of the folder.
2. A folder that is a checkpoint itself is that one.
3. The file ``latest`` names one. Trailing slashes, ``./``, an absolute path inside the folder, line ends of other
   systems and a byte-order mark are read as what they mean. Where it names anything else, nothing is taken: somebody
   may have edited it to go back, and the newest would be the very checkpoint to get away from.
4. Without that file, the newest is taken, by the times of its files, and a line says so.

The tag ``newest`` asks for the newest that is whole, whatever ``latest`` says.
"""

from __future__ import annotations

import codecs
import difflib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ucp import formats, limits
from ucp.errors import BadArgument, DamagedCheckpoint, NotACheckpoint, RemovedMeanwhile
from ucp.formats import beside
from ucp.formats.base import Format
from ucp.printable import logger
from ucp.storage import atomic, locations

T = TypeVar("T")

log = logger(__name__)

LATEST = "latest"
NEWEST = "newest"
"""The tag that stands for the newest whole checkpoint."""
WAY_ON = f"say which with a tag; tag='{NEWEST}' (--{NEWEST}) takes the newest whole one"

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class Chosen:
    """path: the checkpoint's folder; format: what it is. note: what is to be said of the choice, if anything."""

    path: Path
    format: Format
    note: str = ""


def take(folder: Path, tag: str | int | None, read: Callable[[Path, Format], T]) -> tuple[Path, T]:
    """The checkpoint that is meant, and what ``read`` makes of it.

    folder: as `locations.locate` gives it. Where the checkpoint is removed meanwhile (as ``keep_last`` does) and no tag
    asks for it, the one that is meant then is taken.

    Raises BadArgument, NotACheckpoint, and what ``read`` raises; DamagedCheckpoint says how to get another one.
    """
    if tag == NEWEST:
        return _newest_whole(folder, read)
    for attempt in range(limits.OPEN_ATTEMPTS_COUNT):
        chosen = choose(folder, tag)
        try:
            result = read(chosen.path, chosen.format)
        except (NotACheckpoint, DamagedCheckpoint) as error:
            if is_checkpoint(chosen.path):
                if tag is not None or chosen.path == folder:
                    raise
                raise type(error)(f"{error}; {WAY_ON}") from error
            if tag is not None or chosen.path == folder or attempt == limits.OPEN_ATTEMPTS_COUNT - 1:
                raise _removed(chosen.path) from error
            log.warning("%s: was removed while it was opened, so the checkpoint after it is looked for", chosen.path)
            continue
        if chosen.note:
            log.warning("%s", chosen.note)
        return chosen.path, result
    raise AssertionError("unreachable")


def choose(folder: Path, tag: str | int | None = None) -> Chosen:
    """The checkpoint that is meant, by names and times alone; it may be damaged.

    Raises BadArgument for what is no tag, NotACheckpoint where nothing is meant or what ``latest`` says is not there.
    """
    if tag is not None:
        return _tagged(folder, tag)
    known = formats.find(folder)
    if known is not None:
        return Chosen(folder, known)
    put_back = _set_aside(folder)
    if put_back is not None:
        return put_back
    named = _named(folder)
    if named is not None:
        return named
    found = checkpoints_in(folder)
    if not found:
        raise formats.explain_unknown(folder)
    _refuse_parts(folder, found)
    newest = _by_age(found)[0]
    note = f"taking '{newest.path.name}', the newest checkpoint of '{folder}', which has no file '{LATEST}'"
    return replace(newest, note=note)


def resolve(folder: Path, tag: str | int | None = None) -> Path:
    """As `choose`, and what is to be said of the choice is logged."""
    chosen = choose(folder, tag)
    if chosen.note:
        log.warning("%s", chosen.note)
    return chosen.path


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a checkpoint or a folder of them, by the names in it."""
    return formats.find(folder) is not None or bool(checkpoints_in(folder))


def checkpoints_in(folder: Path) -> list[Chosen]:
    """The folders in this one that are checkpoints which a run resumes from; unfinished ones (names with a leading dot)
    are left out."""
    try:
        names = locations.names(folder)
    except OSError:
        return []
    entries = [folder / name for name in names if not name.startswith(".") and name != LATEST]
    found = [(entry, formats.find(entry)) for entry in entries if locations.is_folder(entry)]
    return [Chosen(entry, known) for entry, known in found if known is not None and known.resumable]


def latest_text(folder: Path) -> str | None:
    """What the file ``latest`` says, without byte-order mark and white space around it; None where there is none.

    Raises NotACheckpoint where it cannot be read.
    """
    pointer = folder / LATEST
    try:
        raw = locations.read(pointer)
    except (FileNotFoundError, NotADirectoryError):
        if not locations.is_remote(pointer) and os.path.islink(pointer):
            raise NotACheckpoint(f"{pointer}: is a link to nothing; {WAY_ON}") from None
        return None
    except OSError as error:
        raise NotACheckpoint(f"{pointer}: cannot be read: {error.strerror or error}; {WAY_ON}") from error
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding).strip()
    except UnicodeDecodeError as error:
        raise NotACheckpoint(f"{pointer}: cannot be read: {error}; {WAY_ON}") from error


def latest_name(folder: Path) -> str | None:
    """What ``latest`` names, as a path relative to the folder; None where it names nothing in it.

    For those who keep what it names: no error, whatever it says.
    """
    try:
        text = latest_text(folder)
    except NotACheckpoint:
        return None
    return None if text is None else _inside(folder, text)


def unknown_tag(folder: Path, tag: str) -> NotACheckpoint:
    """The error for a tag that no checkpoint in the folder has, with those that there are."""
    names = [c.path.name for c in checkpoints_in(folder)]
    hint = nearest(tag, names) if names else "there is no checkpoint at all"
    return NotACheckpoint(f"{folder}: no checkpoint with the tag '{tag}'; {hint}")


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say to somebody who has named what is not there."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    shown = ", ".join(repr(n) for n in known[:3])
    return f"there are {len(known)}: {shown}{', …' if len(known) > 3 else ''}"


def _tagged(folder: Path, tag: str | int) -> Chosen:
    inside = _inside(folder, str(tag)) if isinstance(tag, (str, int)) else None
    if inside is None:
        raise BadArgument(f"tag '{tag}' is not the name of a folder in '{folder}'")
    where = folder / inside
    known = formats.find(where)
    put_back = _set_aside(where) if known is None else None
    if put_back is not None:
        return put_back
    if known is None:
        raise unknown_tag(folder, str(tag))
    return Chosen(where, known)


def _set_aside(where: Path) -> Chosen | None:
    """The old checkpoint, where a save that was to replace it died between two renames."""
    old = atomic.set_aside(where)
    known = None if old is None else formats.find(old)
    if old is None or known is None:
        return None
    return Chosen(
        old, known, f"{where}: a save died while it replaced this checkpoint; the old one, '{old.name}', is taken"
    )


def _named(folder: Path) -> Chosen | None:
    """The checkpoint that ``latest`` names; None where there is no such file."""
    pointer = folder / LATEST
    linked = formats.find(pointer) if locations.is_folder(pointer) else None
    if linked is not None:
        # A link to the checkpoint, as other programs make it.
        return Chosen(pointer if locations.is_remote(pointer) else Path(os.path.realpath(pointer)), linked)
    text = latest_text(folder)
    if text is None:
        return None
    inside = _inside(folder, text)
    format_ = None if inside is None else formats.find(folder / inside)
    if inside is not None and format_ is not None:
        return Chosen(folder / inside, format_)
    put_back = None if inside is None else _set_aside(folder / inside)
    if put_back is not None:
        return put_back
    known = [c.path.name for c in checkpoints_in(folder)]
    if not known:
        raise NotACheckpoint(f"'{pointer}' names a checkpoint, but none is there: {formats.explain_unknown(folder)}")
    if inside is None:
        what = "which is no folder in this one"
    elif locations.exists(folder / inside):
        what = "which is no checkpoint"
    else:
        what = "which is not there"
    raise NotACheckpoint(f"{pointer}: names '{text[:200]}', {what}; {nearest(text, known)}; {WAY_ON}")


def _inside(folder: Path, text: str) -> str | None:
    """The path relative to the folder that a tag or a pointer means; None where it is none below the folder."""
    if not locations.can_be_path(text):
        return None
    start = f"{str(folder).rstrip('/')}/"
    if locations.is_remote(folder):
        text = text.removeprefix(start)
        if locations.is_remote(text):
            return None
    elif os.path.isabs(text):
        whole = os.path.normpath(text)
        # The folder, or the way to it, may be a link that the text does not go by, or that only the text goes by.
        behind = os.path.join(os.path.realpath(os.path.dirname(whole)), os.path.basename(whole))
        starts = (start, f"{os.path.realpath(folder)}/")
        found = [path[len(base) :] for path in (whole, behind) for base in starts if path.startswith(base)]
        if not found:
            return None
        text = found[0]
    relative = os.path.normpath(text)
    if relative == "." or relative.startswith(("/", "../")) or relative == "..":
        return None
    return relative


def _newest_whole(folder: Path, read: Callable[[Path, Format], T]) -> tuple[Path, T]:
    """The newest checkpoint that can be read, with a line that names it and what is passed over."""
    known = formats.find(folder)
    if known is not None:
        return folder, read(folder, known)
    found = checkpoints_in(folder)
    if not found:
        raise formats.explain_unknown(folder)
    if any(one.path == folder / NEWEST for one in found):
        raise BadArgument(f"{folder}: '{NEWEST}' is a checkpoint's own name here; give the path of the one to take")
    _refuse_parts(folder, found)
    passed: list[Exception] = []
    for candidate in _by_age(found):
        try:
            result = read(candidate.path, candidate.format)
        except (NotACheckpoint, DamagedCheckpoint) as error:
            passed.append(error)
            continue
        over = "".join(f"; not whole: {error}" for error in passed)
        log.warning("taking '%s', the newest whole checkpoint of '%s'%s", candidate.path.name, folder, over)
        return candidate.path, result
    raise passed[0]


def _refuse_parts(folder: Path, found: Sequence[Chosen]) -> None:
    """Raise NotACheckpoint where the folders in this one are parts of one checkpoint, so that none stands for it."""
    parts = [one.path.name for one in found if beside.is_part(one.path.name)]
    if parts:
        raise NotACheckpoint(
            f"{folder}: holds parts of one checkpoint, each a folder of its own ({', '.join(parts)}), which are not "
            "read as one; give the path of the part to take, such as "
            f"'{folder / parts[-1]}', which is not the whole checkpoint then"
        )


def _by_age(found: Sequence[Chosen]) -> list[Chosen]:
    """Newest first, by the newest file of each; of those as old, the higher number in the name."""

    def age(one: Chosen) -> tuple[int, int]:
        number = re.search(r"(\d{1,18})\D*$", one.path.name)
        try:
            written = locations.newest_ns(one.path)
        except OSError:
            written = 0  # removed this moment; reading it will tell
        return written, int(number[1]) if number else -1

    return sorted(found, key=age, reverse=True)


def _removed(path: Path) -> RemovedMeanwhile:
    return RemovedMeanwhile(
        f"{path}: was removed while it was read, by a run that keeps only its last checkpoints (keep_last), or by "
        "somebody"
    )
