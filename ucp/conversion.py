"""Convert a checkpoint into another form, layout or format.

A conversion is planned whole before its first byte is written: the source's catalog is checked, the target lays out
every file of the destination, and its space is compared with what is free. Then `ucp.transfer.destination` writes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

from ucp import checkpoint, formats
from ucp.catalog import Catalog
from ucp.errors import BadArgument
from ucp.formats import beside
from ucp.formats.base import WriteTarget
from ucp.formats.nouns import WriteRequest
from ucp.formats.signature import defaults_of, showing
from ucp.parallel.mesh import Layout, parse_layout
from ucp.printable import logger
from ucp.settings import OPENING, check_layout, check_replaced, divide_settings
from ucp.spec.select import choose
from ucp.storage.locations import is_remote, locate
from ucp.transfer.destination import Running, Written, carry_out
from ucp.transfer.targets import WritePlan
from ucp.transfer.windows import budget, check_files
from ucp.units import bytes_text, counted, took

log = logger(__name__)


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, or would do (``dry_run``).

    In a team that a launcher made, each process reports what it knows itself.

    Attributes
    ----------
    source, destination
        Their paths or URLs.
    source_format, to
        The formats of the source and of the destination.
    virtual
        Whether the destination is a manifest that points into the source.
    layout
        The layout of the run that saved the source.
    target_layout
        The layout of the destination, or None if it has none of its own.
    tag
        For DeepSpeed's formats: the folder below the destination that holds the checkpoint.
    parameters, tensors
        How many there are. A tensor is one state of one parameter.
    files, bytes_written
        How many files and bytes the destination has.
    bytes_read
        How many bytes of the source's tensors were read.
    verified_bytes
        How many of these were compared with the source's digests or CRC-32s, with the rest of the records they lie in.
    unverified_bytes
        How many of these have neither a digest nor a CRC-32.
    seconds
        The time from opening the source to the end.
    dry_run
        Whether nothing was written.
    changes
        What was changed on purpose, as declared, a line each.
    """

    source: str
    destination: str
    source_format: str
    to: str
    virtual: bool
    layout: str
    target_layout: str | None
    tag: str | None
    parameters: int
    tensors: int
    files: int
    bytes_written: int
    bytes_read: int
    verified_bytes: int
    unverified_bytes: int
    seconds: float
    dry_run: bool
    changes: tuple[str, ...] = ()

    def __str__(self) -> str:
        target = self.to + (" (virtual)" if self.virtual else "")
        if self.target_layout is not None:
            target += f" ({self.target_layout})"
        did = "would write" if self.dry_run else "wrote"
        checked = ""
        if self.verified_bytes or self.unverified_bytes:
            checked = f" (verified {bytes_text(self.verified_bytes)} of what was read"
            if self.unverified_bytes:
                checked += f", with nothing to verify {bytes_text(self.unverified_bytes)} by"
            checked += ")"
        if self.changes:
            checked += f" (changed as declared: {'; '.join(self.changes)})"
        return (
            f"{did} {self.destination}: {counted(self.tensors, 'tensor')} of {counted(self.parameters, 'parameter')}, "
            f"{counted(self.files, 'file')}, {bytes_text(self.bytes_written)}{checked}, "
            f"from {self.source_format} ({self.layout}) to {target}{took(self.seconds, self.dry_run)}"
        )


# Every keyword that `convert` takes besides its parameters. Each is declared in one place only, and not here.
_SETTINGS = {
    **{name: signature(checkpoint.open).parameters[name].default for name in OPENING},
    **{field.name: field.default for field in fields(Running)},
    **defaults_of(),
}


@showing(_SETTINGS)
def convert(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    to: str = formats.DEFAULT_TARGET,
    layout: str | Layout | None = None,
    spec: str | os.PathLike[str] | None = None,
    *,
    changes: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> ConversionReport:
    """Convert a checkpoint of any supported format.

    Parameters
    ----------
    source, spec
        As for `ucp.open`.
    dest
        A folder that does not exist yet. For DeepSpeed's formats the checkpoint is ``dest/<tag>``, and ``dest/latest``
        (``dest/latest_universal``) names it. A URL is written in one go, by this process alone.
    to
        'universal', 'deepspeed', 'deepspeed-universal', 'dcp', 'huggingface' (weights alone, as a model folder),
        'megatron', or the name of a format that an installed package adds.
    layout
        For 'deepspeed' and 'megatron', which need it: the ranks and ZeRO stage to write for, as ``dp=4,zero=3`` or a
        Layout.
    changes
        What of the model to change on the way, as a mapping or a file (`ucp.spec.changes`).
    options
        Any of the settings, as a mapping.
    settings
        Of reading: as for `ucp.open` (tag, model_config, sizes, trust_client_state, trust_paths, param_names,
        allow_approximate). Of the run: the fields of `Running` (workers, max_memory in bytes, overwrite, resume,
        dry_run, team, progress). Of the target: its own options (``virtual``, ``digests``, ``ds_config``, ``dtype``,
        ``max_shard_size`` in bytes, ``like``, ...), which ``ucp convert --help`` explains.

    Returns
    -------
    ConversionReport
        What was written, and how long it took.

    Raises
    ------
    BadArgument
        An argument is wrong, or a setting is one that nothing takes.
    DestinationError
        The destination is there already, or cannot be written.
    UcpError
        What `ucp.open` and reading raise.

    After any error the destination is as it was before.
    """
    return _converted(source, dest, to, layout, spec, changes, _merged(settings, options))


def _converted(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    to: str,
    layout: str | Layout | None,
    spec: str | os.PathLike[str] | None,
    changes: str | os.PathLike[str] | Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> ConversionReport:
    started = time.monotonic()
    target = formats.target(to)
    layout = parse_layout(layout) if isinstance(layout, str) else layout
    opening, running, own = divide_settings(target, settings)
    check_layout(target, layout)
    budget(running.workers, running.max_memory)
    destination = str(locate(dest))
    with checkpoint.open_before(changes, None, source, spec, **opening) as opened:
        catalog, lines = _changed(opened.catalog, changes, opening.get("model_config"))
        choice = choose(spec, opening.get("model_config"), opening.get("sizes"))
        request = WriteRequest(
            opened.path, opened.format, destination, _tag(opened), layout, choice, own, running.workers, bool(lines)
        )
        plan = _planned(target, catalog, request, running)
        written = carry_out(plan, destination, running)
    seconds = time.monotonic() - started
    done = _report(str(locate(source)), destination, opened, to, plan, written, seconds, running.dry_run)
    return replace(done, changes=lines)


def _planned(target: WriteTarget, catalog: Catalog, request: WriteRequest, running: Running) -> WritePlan:
    """The plan of the files, checked against what is at the destination."""
    if names := beside.around(request.source, request.source_format):
        log.warning("%s: %s", request.source, beside.sentence(names, "beside it"))
    plan = target.plan(catalog, request)
    if running.overwrite and not is_remote(request.destination):
        check_replaced(Path(request.destination), plan.source)
    check_files(plan.files)
    return plan


def _changed(catalog: Catalog, changes: Any, config: Any) -> tuple[Catalog, tuple[str, ...]]:
    """The catalog with declared changes, and what they are in words."""
    if changes is None:
        return catalog, ()
    from ucp.changes import applied  # imported late, as the language of specs and torch are
    from ucp.spec.changes import read

    found = applied(catalog, read(changes), None, choose(None, config).config)
    return found.catalog, found.lines


def _report(
    source: str,
    destination: str,
    opened: checkpoint.Checkpoint,
    to: str,
    plan: WritePlan,
    written: Written,
    seconds: float,
    dry_run: bool,
) -> ConversionReport:
    if opened.catalog.approximate and to != formats.DEFAULT_TARGET:
        log.warning("%s: does not say that it is approximate: '%s' has no place for it", destination, to)
    tensors = plan.tensors
    return ConversionReport(
        source=source,
        destination=destination,
        source_format=opened.format,
        to=to,
        virtual=plan.is_virtual,
        layout=str(opened.layout),
        target_layout=None if plan.layout is None else str(plan.layout),
        tag=plan.tag,
        parameters=len({name for name, _ in tensors}),
        tensors=len(tensors),
        files=written.files,
        bytes_written=written.nbytes,
        bytes_read=written.bytes_read,
        verified_bytes=written.verified_bytes,
        unverified_bytes=written.unverified_bytes,
        seconds=seconds,
        dry_run=dry_run,
    )


def _merged(settings: Mapping[str, Any], options: Mapping[str, Any] | None) -> dict[str, Any]:
    twice = sorted(settings.keys() & (options or {}).keys())
    if twice:
        raise BadArgument(f"'{twice[0]}' is given twice, as a keyword and in options; give it once")
    return {**settings, **(options or {})}


def _tag(opened: checkpoint.Checkpoint) -> str:
    """The tag to write under: the source's own where it has one, else DeepSpeed's default for its step count."""
    known = formats.named(opened.format)
    own = None if known is None else known.tag(opened.path)
    return own or f"global_step{opened.catalog.training_state.global_steps or 0}"
