"""Checkpoint formats, one package each, and how the one at hand is found.

To add a format to this package, write a subclass of `ucp.formats.base.Format` and a line in `BUILT_IN`. Formats of
other packages come through the entry-point group ``ucp.formats``. They are looked for if no built-in one will do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any

from ucp import installed
from ucp.errors import BadArgument, NotACheckpoint
from ucp.formats.base import Format, Option, WriteTarget
from ucp.printable import logger

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
    from pathlib import Path

    from ucp.catalog import Catalog
    from ucp.formats.nouns import FolderNames, ReadRequest
    from ucp.storage.files import Files

log = logger(__name__)

# If several formats know a folder and none has the others as parts, the first of these reads it: a manifest of ours is
# the surer sign. Each module has its format as FORMAT.
BUILT_IN = (
    "ucp.formats.universal",
    "ucp.formats.deepspeed",
    "ucp.formats.megatron",
    "ucp.formats.dcp",
    "ucp.formats.huggingface",
    "ucp.formats.trainer",
    "ucp.formats.accelerate",
    "ucp.formats.lightning",
    "ucp.formats.torch_file",
    "ucp.formats.deepspeed_universal",
    "ucp.formats.torch_checkpointing",
    "ucp.formats.torch_ranks",
)
GROUP = "ucp.formats"
"""The entry-point group of other packages' formats."""
DEFAULT_TARGET = "universal"


@cache
def built_in() -> tuple[Format, ...]:
    """The formats of this package, in the order of trial."""
    return tuple(import_module(module).FORMAT for module in BUILT_IN)


@cache
def registered() -> tuple[Format, ...]:
    """The formats of other packages, ordered by name. One that can't be used is left out with a warning."""
    if not installed.may_declare(GROUP):
        return ()
    from importlib.metadata import entry_points  # takes longer than all the rest of this module

    found = {known.name: known for known in built_in()}
    targets = {target.name for known in built_in() for target in known.targets}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        loaded = _load(entry)
        if loaded is None:
            continue
        taken = sorted({loaded.name} & found.keys() | {target.name for target in loaded.targets} & targets)
        if taken:
            log.warning("%s is left out: there is a format or target '%s' already", _called(entry), taken[0])
            continue
        found[loaded.name] = loaded
        targets.update(target.name for target in loaded.targets)
    return tuple(found.values())[len(built_in()) :]


def _load(entry: EntryPoint) -> Format | None:
    try:
        loaded = entry.load()
    except Exception as error:
        log.warning("%s can't be loaded: %s: %s", _called(entry), type(error).__name__, error)
        log.debug("traceback", exc_info=True)
        return None
    if not isinstance(loaded, Format):
        log.warning("%s is a %s, not a ucp.formats.base.Format", _called(entry), type(loaded).__name__)
        return None
    for one, attribute in [(loaded, "name"), (loaded, "sign"), *((target, "name") for target in loaded.targets)]:
        if not isinstance(getattr(one, attribute, None), str):
            log.warning("%s is left out: %s has no '%s'", _called(entry), type(one).__name__, attribute)
            return None
    return loaded


def _called(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist is not None else "an unknown package"
    return f"the format '{entry.name}' of {package} ({entry.value})"


def every() -> Iterator[Format]:
    """All formats, in the order of trial. Those of other packages come last and are only looked for when reached."""
    yield from built_in()
    yield from registered()


def look(path: Path) -> FolderNames:
    """The names in a folder; none if there is no such folder, or if it can't be listed."""
    from ucp.formats.nouns import FolderNames
    from ucp.storage import locations

    try:
        names = tuple(locations.names(path))
        return FolderNames(path, names, is_file=not names and locations.is_remote(path) and locations.is_file(path))
    except NotADirectoryError:
        return FolderNames(path, (), is_file=locations.is_file(path))
    except FileNotFoundError:
        return FolderNames(path, ())
    except OSError:
        return FolderNames(path, (), listed=False)


def find(path: Path) -> Format | None:
    """The format that reads the checkpoint in this folder, the first of `kinds`; None if no format knows it."""
    return next(iter(kinds(path)), None)


def kinds(path: Path) -> list[Format]:
    """All built-in formats that know the folder, parts after what they are parts of (`Format.parts`). If none does, the
    first format of another package that knows it."""
    folder = look(path)
    found = [known for known in built_in() if known.detect(folder)]
    if found:
        return sorted(found, key=lambda known: sum(known.name in other.parts for other in found))
    return list(islice((known for known in registered() if _detects(known, folder)), 1))


def _detects(known: Format, folder: FolderNames) -> bool:
    try:
        return known.detect(folder)
    except Exception as error:
        log.warning("%s: the format '%s' fails to tell whether it is one of its: %s", folder.path, known.name, error)
        log.debug("traceback", exc_info=True)
        return False


def read(known: Format, path: Path, files: Files, request: ReadRequest) -> Catalog:
    """The catalog of a checkpoint of this format. Raises what `Format.read` raises. Whatever else the reader raises on
    what is in the folder becomes a DamagedCheckpoint."""
    from ucp.formats.shared.malformed import malformed
    from ucp.formats.shared.two_saves import other_step

    with malformed(path, f"as a checkpoint of the format '{known.name}' it"):
        catalog = known.read(path, files, request)
        for other, folder in completing(path, known):
            catalog = other.complete(catalog, folder, request)
    note = other_step(path, catalog)
    if note is None:
        return catalog
    log.warning("%s: %s", path, note)
    return replace(catalog, unchecked=(*catalog.unchecked, note))


def completing(path: Path, known: Format) -> list[tuple[Format, FolderNames | None]]:
    """The formats whose programs may have kept more of a checkpoint of this format, each with the folder around it if
    that has something of theirs."""
    others = [other for other in built_in() if known.name in other.completes]
    if not others:
        return []
    folder = look(path.parent)
    return [(other, folder if folder.listed and other.keeps_beside(folder) else None) for other in others]


def named(name: str) -> Format | None:
    """The format of this name, None if there is none."""
    return next((known for known in every() if known.name == name), None)


def those_of(name: str) -> list[Format]:
    """The format of this name, then the built-in ones, since a checkpoint may point into their files."""
    own = named(name) if all(known.name != name for known in built_in()) else None
    return [*([] if own is None else [own]), *built_in()]


def target(name: str) -> WriteTarget:
    """The target that ``to=`` names. Raises BadArgument if none has this name."""
    for known in every():
        for one in known.targets:
            if one.name == name:
                return one
    import difflib  # takes longer than all else here, and only a wrong name needs it

    targets = [one for known in every() for one in known.targets]
    meant = [one.name for one in targets if name.lower() in (one.name, *one.also)]
    meant = meant or difflib.get_close_matches(name, [one.name for one in targets], 1)
    hint = f"did you mean '{meant[0]}'? " if meant else ""
    known_names = ", ".join(f"'{one.name}'" for one in targets)
    raise BadArgument(f"unknown target format '{name}'; {hint}supported are {known_names}")


def options_of_targets(among: Iterable[Format] | None = None) -> list[tuple[WriteTarget, Option]]:
    """The targets' own options, each with the target that takes it. among: the formats; default is all."""
    among = every() if among is None else among
    return [(one, option) for known in among for one in known.targets for option in one.options]


def dividing(name: str | None = None) -> WriteTarget:
    """The target of this name, whose framework divides a model over ranks. Without a name, the first such target.

    Raises BadArgument if the named target is not written for a layout.
    """
    if name is None:
        return next(one for known in every() for one in known.targets if one.takes_layout)
    found = target(name)
    if not found.takes_layout:
        raise BadArgument(f"'{name}' is written for no layout, so nothing can be said of its ranks")
    return found


def own_options(of: WriteTarget, given: Mapping[str, Any], others: Iterable[str] = ()) -> dict[str, Any]:
    """The target's own options among those given, checked. An option at its default counts as not given.

    others: names that are taken elsewhere, for the hint. Raises BadArgument for an option that the target does not
    take, unless it is another target's option and at its default.
    """
    takes = {option.name: option for option in of.options}
    own = {}
    for name, value in given.items():
        if name not in takes:
            _refuse(of, name, value, (*takes, *others))
            continue
        value = takes[name].checked(value)
        if value != takes[name].default:
            own[name] = value
    return own


def _refuse(of: WriteTarget, name: str, value: object, known: Sequence[str]) -> None:
    takers = next((found for among in (built_in, every) if (found := _takers(name, among()))), [])
    if not takers:
        from difflib import get_close_matches

        near = get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(known) or 'none'}"
        raise BadArgument(f"'{of.name}' takes no option '{name}'; {hint}")
    option = takers[0][1]
    if value != option.default:
        names = " or ".join(f"'{one.name}'" for one, _ in takers)
        said = option.elsewhere or f"{name} is for {names} only, not for '{{to}}'"
        raise BadArgument(said.format(to=of.name))


def _takers(name: str, among: Iterable[Format]) -> list[tuple[WriteTarget, Option]]:
    return [(one, option) for one, option in options_of_targets(among) if option.name == name]


def is_read_option(name: str) -> bool:
    """Whether some format takes an option of this name when it reads."""
    return any(option.name == name for known in every() for option in known.read_options)


def explain_unknown(path: Path) -> NotACheckpoint:
    """The error for a path that no format knows, saying what was looked for and what is there."""
    from ucp.storage import locations

    known = ", ".join(one.sign for one in every())
    kind = "a file" if locations.is_remote(path) else locations.kind(path)
    if not locations.exists(path):
        linked = kind.startswith("a link")
        return NotACheckpoint(f"{path}: {'is ' + kind if linked else 'there is no such file or folder'}")
    if not locations.is_folder(path):
        if kind != "a file":
            return NotACheckpoint(f"{path}: is {kind}; a checkpoint is a folder, or a regular file")
        around = find(path.parent)
        if around is not None:
            return NotACheckpoint(
                f"{path}: is a single file in the folder of a checkpoint ('{around.name}'); give that folder, "
                f"'{path.parent}'"
            )
        return NotACheckpoint(f"{path}: is a file; a checkpoint is a folder, or a file of these names ({known})")
    try:
        names = locations.names(path)
    except OSError as error:
        return NotACheckpoint(f"{path}: the folder cannot be listed: {error.strerror or error}")
    found = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
    return NotACheckpoint(f"{path}: no checkpoint was recognised here; the folder holds {found}; looked for: {known}")
