"""Repair a checkpoint that lost the files of some layers (`ucp.repair.repair`)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ucp import formats, run_folder
from ucp.catalog import Catalog
from ucp.errors import BadArgument, DamagedCheckpoint, NotACheckpoint
from ucp.formats.nouns import ReadRequest, Remains, WriteRequest
from ucp.printable import logger
from ucp.repair.build import repaired
from ucp.repair.refill import Outlook, RepairSettings, outlook_of
from ucp.settings import check_replaced
from ucp.spec.select import Choice, choose
from ucp.storage.files import Files
from ucp.storage.locations import is_remote, locate
from ucp.transfer.destination import Running, carry_out
from ucp.transfer.reader import Reader
from ucp.transfer.windows import check_files
from ucp.units import bytes_text, counted, took

log = logger(__name__)


@dataclass(frozen=True)
class RepairReport:
    """What a repair did, or would do (``dry_run``).

    Attributes
    ----------
    source, destination
        Their paths.
    method, moments
        As in `RepairSettings`.
    files
        The missing or damaged files -> what was wrong with each.
    layers
        The name of each lost layer -> what it is filled with.
    parameters
        The names of the filled parameters.
    stateless
        The names of the parameters that kept their weights and lost their optimizer states.
    warnings
        Sentences for people.
    own_group
        Whether the filled parameters are a param group of their own.
    bytes_written
        How many bytes the destination has.
    seconds
        The time from the call to the end.
    dry_run
        Whether nothing was written.
    """

    source: str
    destination: str
    method: str
    files: Mapping[str, str]
    layers: Mapping[str, str]
    parameters: tuple[str, ...]
    stateless: tuple[str, ...]
    warnings: tuple[str, ...]
    moments: str
    own_group: bool
    bytes_written: int
    seconds: float
    dry_run: bool

    def __str__(self) -> str:
        did = "would write" if self.dry_run else "wrote"
        what = []
        if self.layers:
            what.append(
                f"{counted(len(self.layers), 'layer')} ({counted(len(self.parameters), 'parameter')}) by {self.method}"
            )
        if self.stateless:
            what.append(f"the optimizer states of {counted(len(self.stateless), 'more parameter')} as zeros")
        return (
            f"{did} {self.destination}: filled {' and '.join(what)}, {bytes_text(self.bytes_written)}"
            f"{took(self.seconds, self.dry_run)}; it is approximate, and loaded only with allow_approximate"
        )


def repair(
    damaged: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    method: str = "checkfree",
    tag: str | int | None = None,
    *,
    spec: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> RepairReport:
    """Write a whole universal checkpoint from one that lost the files of some layers; returns what was done.

    Parameters
    ----------
    damaged, tag
        The damaged checkpoint, or a folder of them and a tag. What its files still hold is written bit for bit.
    dest
        A folder that does not exist yet.
    method
        How lost layers are filled. 'checkfree' takes the mean of their neighbours, weighted by the norms of their
        gradients (`ucp.repair.refill`). 'uniform', 'copy-left', 'copy-right' and 'random' are there to compare with.
    spec
        As for `ucp.open`.
    settings
        The other fields of `RepairSettings`, those of `Running`, and options of reading, as `ucp.open` has them.

    Raises
    ------
    Unsupported, Mismatch
        If what was lost has no neighbour that is like it. The destination is as it was before.
    BadArgument
        For a checkpoint that lost nothing, or a wrong setting.
    DamagedCheckpoint
        If nothing tells what was lost.
    """
    started = time.monotonic()
    how, running, reading = _divided(method, settings)
    destination = str(locate(dest))
    choice = choose(spec, None, None)
    with Files() as files:
        path, remains = _remains(damaged, tag, files, choice, reading)
        outlook = outlook_of(remains, how)
        for warning in outlook.warnings:
            log.warning("%s: %s", path, warning)
        catalog = repaired(remains, outlook, how, Reader(remains.catalog, files))
        nbytes = _write(catalog, path, destination, choice, running)
    return RepairReport(
        str(path),
        destination,
        method,
        dict(remains.files),
        {str(filling.layer): str(filling) for filling in outlook.fillings},
        tuple(outlook.parameters),
        outlook.stateless,
        outlook.warnings,
        how.moments,
        how.lr_scale is not None,
        nbytes,
        time.monotonic() - started,
        running.dry_run,
    )


def _divided(method: str, settings: Mapping[str, Any]) -> tuple[RepairSettings, Running, dict[str, Any]]:
    """The settings for the filling, those of the run, and those for reading. Raises BadArgument."""
    own, taken = ({field.name for field in fields(kind)} for kind in (RepairSettings, Running))
    reading = {name: settings[name] for name in settings.keys() - own - taken if formats.is_read_option(name)}
    unknown = sorted(settings.keys() - own - taken - reading.keys())
    if unknown:
        raise BadArgument(f"a repair takes no option '{unknown[0]}'")
    how = RepairSettings(method, **{name: settings[name] for name in own & settings.keys()})
    how.check()
    return how, Running(**{name: settings[name] for name in taken & settings.keys()}), reading


def outlook(damaged: str | os.PathLike[str], tag: str | int | None = None) -> Outlook:
    """Find out what a repair by checkfree would do. Nothing is written.

    Parameters
    ----------
    damaged, tag
        As for `repair`.

    Returns
    -------
    Outlook

    Raises
    ------
    UcpError
        What `repair` raises.
    """
    with Files() as files:
        return outlook_of(_remains(damaged, tag, files, Choice())[1], RepairSettings())


def _remains(
    damaged: str | os.PathLike[str],
    tag: str | int | None,
    files: Files,
    choice: Choice,
    reading: Mapping[str, Any] | None = None,
) -> tuple[Path, Remains]:
    path = run_folder.resolve(locate(damaged), tag)
    known = formats.find(path)
    if known is None:
        raise formats.explain_unknown(path)
    request = ReadRequest(choice, options=known.checked(reading or {}))
    found = known.remains(path, files, request)
    if found is not None:
        return path, found
    try:
        formats.read(known, path, files, request)
    except (DamagedCheckpoint, NotACheckpoint) as error:
        raise DamagedCheckpoint(f"{error}; nothing tells what was lost, so it can't be repaired") from error
    raise BadArgument(f"{path}: lost no file, so there is nothing to repair; open it as it is")


def _write(catalog: Catalog, path: Path, destination: str, choice: Choice, running: Running) -> int:
    """Write a universal checkpoint; returns its bytes."""
    target = formats.target("universal")
    plan = target.plan(catalog, WriteRequest(path, catalog.format, destination, path.name, None, choice))
    if running.overwrite and not is_remote(destination):
        check_replaced(Path(destination), plan.source)
    check_files(plan.files)
    return carry_out(plan, destination, running).nbytes
