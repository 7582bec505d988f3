"""Which checkpoint of a run's folder is meant: the one place where that is decided.

In this order:

1. A tag picks the folder of that name. It may have slashes, but never leads out of the folder.
2. If the folder is a checkpoint itself, that one is taken.
3. The file ``latest``, or another program's file for the same purpose (`POINTERS`), names a checkpoint. Trailing
   slashes, ``./``, an absolute path inside the folder, line ends of other systems and a byte-order mark are read as
   what they mean. If the file names anything else, nothing is taken. Somebody may have edited it to go back, and the
   newest would be the very checkpoint to get away from.
4. Without such a file, the newest checkpoint is taken. It is found by the step that each says of itself
   (`Format.step`), else by the number in names that are alike apart from it, else by the times of its files. A log line
   says which one was taken, and by what. Retention (`ucp.saving.retention`) goes by the same rule: no clock decides
   where there are steps.

A folder in which such a file names a checkpoint counts as that one, such as a Trainer's ``checkpoint-10`` of DeepSpeed.

The tag ``newest`` asks for the newest checkpoint that is whole, no matter what ``latest`` says.
"""

from __future__ import annotations

import codecs
import difflib
import errno
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ucp import formats, limits
from ucp.errors import BadArgument, DamagedCheckpoint, NotACheckpoint, RemovedMeanwhile
from ucp.formats import beside
from ucp.formats.base import Format
from ucp.printable import logger
from ucp.storage import atomic, locations
from ucp.units import counted

T = TypeVar("T")

log = logger(__name__)

LATEST = "latest"


def _iteration(text: str) -> str:
    """Megatron's folder of an iteration (megatron/training/checkpointing.py: get_checkpoint_name)."""
    return f"iter_{int(text):07d}" if text.isdecimal() and text.isascii() and len(text) < 18 else text


POINTERS: Mapping[str, Callable[[str], str]] = {
    LATEST: str,
    "latest_checkpointed_iteration.txt": _iteration,
    "latest_universal": str,
}
"""Files that name the newest checkpoint of their folder, the first that is there, each with what its text means."""

NEWEST = "newest"
"""The tag that stands for the newest whole checkpoint."""
WAY_ON = f"say which with a tag; tag='{NEWEST}' (--{NEWEST}) takes the newest whole one"

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class Chosen:
    """A checkpoint that was chosen. note: what the user should be told about the choice, or an empty string."""

    path: Path
    format: Format
    note: str = ""

    def within(self, folder: Path) -> str:
        """Its name in this folder."""
        return self.path.relative_to(folder).as_posix() if folder in self.path.parents else self.path.name


def take(folder: Path, tag: str | int | None, read: Callable[[Path, Format], T]) -> tuple[Path, T]:
    """The checkpoint that is meant, and what ``read`` makes of it. folder: as `locations.locate` gives it.

    If the checkpoint is removed meanwhile (as ``keep_last`` does) and no tag asks for it, the choice is made again.

    Raises BadArgument, NotACheckpoint, and what ``read`` raises. A DamagedCheckpoint says how to get another one.
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

    Raises BadArgument for a tag that cannot be one, and NotACheckpoint if there is no checkpoint to choose or if the
    one that ``latest`` names is not there.
    """
    if tag is not None:
        return _tagged(folder, tag)
    known = formats.kinds(folder)
    if known:
        return Chosen(folder, known[0], _beside_others(folder, known))
    put_back = _set_aside(folder)
    if put_back is not None:
        return put_back
    named = _named(folder)
    if named is not None:
        return named
    found = checkpoints_in(folder)
    if not found:
        raise _none_here(folder)
    _refuse_parts(folder, found)
    ranked, why = newest_first(folder, found)
    newest = ranked[0]
    note = f"taking '{newest.within(folder)}', the newest checkpoint of '{folder}'{why}, which has no file '{LATEST}'"
    return replace(newest, note=note)


def resolve(folder: Path, tag: str | int | None = None) -> Path:
    """Like `choose`, and logs the note on the choice."""
    chosen = choose(folder, tag)
    if chosen.note:
        log.warning("%s", chosen.note)
    return chosen.path


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a checkpoint or a folder of them, by the names in it."""
    return formats.find(folder) is not None or bool(checkpoints_in(folder))


def checkpoints_in(folder: Path) -> list[Chosen]:
    """The folders in this one that are checkpoints to resume a run from, or in which a file names such a checkpoint;
    else the single files that are checkpoints. Unfinished ones (names with a leading dot) are left out."""
    try:
        names = locations.names(folder)
    except OSError:
        return []
    entries = [folder / name for name in names if not name.startswith(".") and name != LATEST]
    folders = [entry for entry in entries if locations.is_folder(entry)]
    found = [one for entry in folders if (one := _at(entry)) is not None and one.format.resumable]
    return found or _files([entry for entry in entries if entry not in set(folders)])


def _files(entries: Sequence[Path]) -> list[Chosen]:
    """Single files that are checkpoints, by their names."""
    return [
        Chosen(entry, known)
        for entry in entries
        if not beside.is_state(entry.name) and (known := formats.find(entry)) is not None
    ]


def below(folder: Path, depth: int = limits.LISTED_DEPTH_COUNT) -> list[Chosen]:
    """All checkpoints below the folder, those of weights alone included, down to ``depth`` levels. What lies inside a
    checkpoint to resume from is not listed, nor installed packages, which bring files such as ``*.pth``."""
    found: list[Chosen] = []
    try:
        names = locations.names(folder)
    except OSError:
        return found
    names = [] if beside.is_installed(folder.name, names) else [name for name in names if not name.startswith(".")]
    files = [] if formats.find(folder) is not None else [folder / name for name in names]
    found += _files([entry for entry in files if not locations.is_folder(entry)])
    for entry in [folder / name for name in names if name != LATEST]:
        if not locations.is_folder(entry):
            continue
        one = _at(entry)
        if one is not None:
            inner = below(entry, 1) if one.path != entry else []  # a run's folder has more than its file names
            found += inner if one.path in [other.path for other in inner] else [one, *inner]
        linked = locations.is_link(entry)
        if depth > 1 and not linked and (one is None or not one.format.resumable):
            found += below(entry, depth - 1)
    return found


def _at(entry: Path) -> Chosen | None:
    """The checkpoint that this folder is, or that a file in it names; else None."""
    known = formats.find(entry)
    if known is not None:
        return Chosen(entry, known)
    try:
        return _named(entry)
    except NotACheckpoint:
        return None


def _beside_others(folder: Path, known: Sequence[Format]) -> str:
    """What to tell the user if the folder is of another format, too, or has whole checkpoints beside weights alone."""
    also = [one.name for one in known[1:] if one.name not in known[0].parts]
    if also:
        return f"{folder}: is read as the format '{known[0].name}'; it has files of {', '.join(map(repr, also))}, too"
    inner = [] if known[0].resumable else [one.within(folder) for one in checkpoints_in(folder)]
    if inner:
        return (
            f"{folder}: holds weights alone ('{known[0].name}'), which are taken; of a training run "
            f"{nearest('', inner)} in it, to be had by the path"
        )
    return ""


def latest_text(folder: Path) -> str | None:
    """What the file ``latest``, or another of `POINTERS`, means; None if there is no such file.

    Raises NotACheckpoint if it cannot be read.
    """
    found = _pointer(folder)
    return None if found is None else found[1]


def _pointer(folder: Path) -> tuple[Path, str] | None:
    """The first of `POINTERS` in the folder, and what it means."""
    for name, meaning in POINTERS.items():
        text = _text(folder / name)
        if text is not None:
            return folder / name, meaning(text)
    return None


def _text(pointer: Path) -> str | None:
    """A small file's text, without byte-order mark and surrounding white space; None if there is no such file."""
    try:
        raw = locations.read(pointer, limits.POINTER_BYTES)
    except OSError as error:
        nothing = isinstance(error, (FileNotFoundError, NotADirectoryError)) or error.errno == errno.ELOOP
        if nothing and not locations.is_link(pointer):
            return None
        raise NotACheckpoint(f"{pointer}: cannot be read: {error.strerror or error}; {WAY_ON}") from error
    try:
        return raw.decode(next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")).strip()
    except UnicodeDecodeError as error:
        raise NotACheckpoint(f"{pointer}: cannot be read: {error}; {WAY_ON}") from error


def latest_name(folder: Path) -> str | None:
    """What ``latest`` names, as a path relative to the folder; None if it names nothing in the folder.

    For callers that must not remove what it names. It raises no error, whatever the file says.
    """
    try:
        text = latest_text(folder)
    except NotACheckpoint:
        return None
    return None if text is None else _inside(folder, text)


def _none_here(folder: Path) -> NotACheckpoint:
    """The error for a folder that is not a checkpoint and has none directly in it."""
    deeper = [one.within(folder) for one in below(folder)]
    if not deeper:
        return formats.explain_unknown(folder)
    return NotACheckpoint(
        f"{folder}: is no checkpoint and no run's folder of them; {counted(len(deeper), 'checkpoint')} below it; "
        f"give the path of one, such as '{folder / deeper[-1]}'"
    )


def unknown_tag(folder: Path, tag: str) -> NotACheckpoint:
    """The error for a tag that no checkpoint in the folder has. It names the checkpoints that are there."""
    if not locations.exists(folder):
        return formats.explain_unknown(folder)
    names = [c.within(folder) for c in checkpoints_in(folder)]
    hint = nearest(tag, names) if names else "there is no checkpoint at all"
    return NotACheckpoint(f"{folder}: no checkpoint with the tag '{tag}'; {hint}")


def nearest(name: str, known: Iterable[str]) -> str:
    """What to tell a user who has given a name that does not exist."""
    known = list(known)
    if near := difflib.get_close_matches(name, known, n=3, cutoff=0.6):
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    shown = ", ".join(repr(n) for n in known[:3])
    return f"there {'is' if len(known) == 1 else 'are'} {len(known)}: {shown}{', …' if len(known) > 3 else ''}"


def _tagged(folder: Path, tag: str | int) -> Chosen:
    inside = _inside(folder, str(tag)) if isinstance(tag, (str, int)) else None
    if inside is None:
        raise BadArgument(f"tag '{tag}' is not the name of a folder in '{folder}'")
    where = folder / inside
    known = formats.find(where)
    put_back = _set_aside(where) if known is None else None
    if put_back is not None:
        return put_back
    found = Chosen(where, known) if known is not None else _at(where)
    if found is None:
        raise unknown_tag(folder, str(tag))
    return found


def _set_aside(where: Path) -> Chosen | None:
    """The old checkpoint, if a save that was about to replace it died between two renames."""
    old = atomic.set_aside(where)
    known = None if old is None else formats.find(old)
    if old is None or known is None:
        return None
    return Chosen(
        old, known, f"{where}: a save died while it replaced this checkpoint; the old one, '{old.name}', is taken"
    )


def _named(folder: Path) -> Chosen | None:
    """The checkpoint that ``latest`` names; None if there is no such file."""
    pointer = folder / LATEST
    linked = formats.find(pointer) if locations.is_folder(pointer) else None
    if linked is not None:
        # A link to the checkpoint, as other programs make it.
        return Chosen(pointer if locations.is_remote(pointer) else Path(os.path.realpath(pointer)), linked)
    told = _pointer(folder)
    if told is None:
        return None
    pointer, text = told
    inside = _inside(folder, text)
    format_ = None if inside is None else formats.find(folder / inside)
    if inside is not None and format_ is not None:
        return Chosen(folder / inside, format_)
    put_back = None if inside is None else _set_aside(folder / inside)
    if put_back is not None:
        return put_back
    known = [c.within(folder) for c in checkpoints_in(folder)]
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
    """The path, relative to the folder, that a tag or a pointer means; None if that is not below the folder."""
    if not locations.can_be_path(text):
        return None
    start = f"{str(folder).rstrip('/')}/"
    if locations.is_remote(folder):
        text = text.removeprefix(start)
        if locations.is_remote(text):
            return None
    elif os.path.isabs(text):
        whole = os.path.normpath(text)
        # The folder, or a folder above it, may be a link, and only one of the two paths may go through that link.
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
    """The newest checkpoint that can be read. A log line names it and those that were passed over."""
    known = formats.find(folder)
    if known is not None:
        return folder, read(folder, known)
    found = checkpoints_in(folder)
    if not found:
        raise _none_here(folder)
    if any(one.path == folder / NEWEST for one in found):
        raise BadArgument(f"{folder}: '{NEWEST}' is a checkpoint's own name here; give the path of the one to take")
    _refuse_parts(folder, found)
    passed: list[Exception] = []
    for candidate in newest_first(folder, found)[0]:
        try:
            result = read(candidate.path, candidate.format)
        except (NotACheckpoint, DamagedCheckpoint) as error:
            passed.append(error)
            continue
        over = "".join(f"; not whole: {error}" for error in passed)
        log.warning("taking '%s', the newest whole checkpoint of '%s'%s", candidate.within(folder), folder, over)
        return candidate.path, result
    raise passed[0]


def _refuse_parts(folder: Path, found: Sequence[Chosen]) -> None:
    """Raise NotACheckpoint if the folders in this one are parts of one checkpoint, so that none can stand for it."""
    parts = [one.path.name for one in found if beside.is_part(one.path.name)]
    if parts:
        raise NotACheckpoint(
            f"{folder}: holds parts of one checkpoint, each a folder of its own ({', '.join(parts)}), which are not "
            "read as one; give the path of the part to take, such as "
            f"'{folder / parts[-1]}', which is not the whole checkpoint then"
        )


def newest_first(folder: Path, found: Sequence[Chosen]) -> tuple[list[Chosen], str]:
    """The checkpoints of a folder, newest first, and words for a sentence that say by what they were ordered.

    They are ordered by the step that each says of itself, else by the number in names that are alike apart from it,
    else by the newest file of each. If the times of the files contradict the steps, the words say so.
    """
    written = {one: _written(one) for one in found}
    by_time = sorted(found, key=lambda one: (written[one], _numbered(one, folder)[1]), reverse=True)
    if len(found) == 1:
        return by_time, ""
    steps = {one: one.format.step(one.path) for one in found}
    names = {one: _numbered(one, folder) for one in found}
    if None not in steps.values():
        order, why = {one: step or 0 for one, step in steps.items()}, "by the steps that they say"
    elif len({stem for stem, _ in names.values()}) == 1 and min(number for _, number in names.values()) >= 0:
        order, why = {one: number for one, (_, number) in names.items()}, "by the steps in their names"
    else:
        return by_time, " by the times of their files"
    ranked = sorted(found, key=lambda one: (order[one], written[one]), reverse=True)
    if written[by_time[0]] > written[ranked[0]]:
        why += f" (though '{by_time[0].within(folder)}' was written later)"
    return ranked, f" {why}"


def _numbered(one: Chosen, folder: Path) -> tuple[str, int]:
    """The name in a folder without its last number, and that number, or -1 if there is none."""
    name = one.within(folder).partition("/")[0]
    number = re.search(r"(\d{1,18})(?=\D*$)", name)
    return (name, -1) if number is None else (name[: number.start()] + name[number.end() :], int(number[1]))


def _written(one: Chosen) -> int:
    try:
        return locations.stat(one.path).mtime_ns if locations.is_file(one.path) else locations.newest_ns(one.path)
    except OSError:
        return 0  # it was just removed; reading it will report that


def _removed(path: Path) -> RemovedMeanwhile:
    return RemovedMeanwhile(
        f"{path}: was removed while it was read, by a run that keeps only its last checkpoints (keep_last), or by "
        "somebody"
    )
