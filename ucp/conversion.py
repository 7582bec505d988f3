"""Convert a checkpoint into another form, layout or format.

A conversion is planned whole before its first byte is written: the source's catalog is checked, every file of the
destination is laid out, and its space is compared with what is free. It then grows in a hidden folder beside the
destination (`ucp.storage.partial`), by one process or by several, and takes the destination's place in one rename;
whatever fails, the destination is as it was, and the same conversion continues where this one ended.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ucp import checkpoint, formats, run_folder
from ucp.catalog import Catalog, SourceFile
from ucp.errors import BadArgument, DamagedCheckpoint, DestinationError, Unsupported
from ucp.formats.shared import shards
from ucp.formats.universal import consolidated, manifest, training, virtual
from ucp.parallel.mesh import Layout, parse_layout
from ucp.printable import logger
from ucp.spec.select import Choice, choose
from ucp.storage import configs, locations, names
from ucp.storage.atomic import check_destination
from ucp.storage.digests import ChunkDigests, chunk_count, digest_file
from ucp.storage.files import Files
from ucp.storage.locations import is_remote, locate
from ucp.storage.partial import CHECKPOINT, growing, held_bytes, part_folder
from ucp.transfer.gather import Reader
from ucp.transfer.targets import TargetFile
from ucp.transfer.team import Team
from ucp.transfer.team_write import Writing, noted_bytes, write_following, write_leading
from ucp.transfer.upload import check_upload, discard, upload, upload_files
from ucp.transfer.windows import budget, check_files
from ucp.transfer.write import Progress
from ucp.version import version

log = logger(__name__)

# Space kept free for folders and the file system's own bookkeeping.
_SLACK = 1 << 20


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, or would do (``dry_run``).

    layout: of the run that saved the source; target_layout: of the destination, where it has one of its own. tag: the
    folder below the destination that holds the checkpoint, for DeepSpeed's formats. parameters, tensors: counts (a
    tensor is one state of one parameter). files, bytes_written: of the destination. bytes_read: what was read of the
    source's tensors. seconds: from opening the source to the end.
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
    seconds: float
    dry_run: bool

    def __str__(self) -> str:
        target = self.to + (" (virtual)" if self.virtual else "")
        if self.target_layout is not None:
            target += f" ({self.target_layout})"
        did = "would write" if self.dry_run else "wrote"
        return (
            f"{did} {self.destination}: {self.tensors} tensors of {self.parameters} parameters, {self.files} files, "
            f"{self.bytes_written / 1e9:.3f} GB, from {self.source_format} ({self.layout}) to {target} in "
            f"{self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class _Options:
    """What the writers need to know besides the catalog."""

    layout: Layout | None
    ds_config: Mapping[str, Any] | None
    virtual: bool
    destination: str
    tag: str
    digests: bool
    workers: int | None
    dtype: str | None
    max_shard_size: int | None
    like: Path | None
    choice: Choice


@dataclass(frozen=True)
class _Job:
    """A planned conversion. files: the last is one by which readers find the checkpoint. finish: small files that
    depend on the digests of what was written, name -> bytes; they come after all others."""

    source: Catalog
    files: tuple[TargetFile, ...]
    finish: Callable[[dict[str, ChunkDigests]], dict[str, bytes]]
    tag: str | None = None
    target_layout: Layout | None = None


def convert(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    to: str = "universal",
    layout: str | Layout | None = None,
    spec: str | os.PathLike[str] | None = None,
    *,
    model_config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
    virtual: bool = False,
    tag: str | int | None = None,
    digests: bool = False,
    workers: int | None = None,
    max_memory: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    team: Team | None = None,
    ds_config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    like: str | os.PathLike[str] | None = None,
    trust_client_state: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a checkpoint of any supported format; returns what was done.

    source, tag, spec, model_config, sizes, trust_client_state: as for `ucp.open`.
    dest: a folder that does not exist yet. For DeepSpeed's formats it follows DeepSpeed's convention: the checkpoint is
        ``dest/<tag>``, and ``dest/latest`` (``dest/latest_universal``) names it. A URL is written in one go, by this
        process alone, the file by which readers find it last.
    to: 'universal', 'deepspeed', 'deepspeed-universal', 'dcp' or 'huggingface' (weights alone, as a model folder).
    layout: 'deepspeed' only, and needed there: the ranks and ZeRO stage to write for, as ``dp=4,zero=3`` or a Layout.
    virtual: 'universal' only: write a manifest that points into the source, which stays where it is.
    digests: virtual only: read the source once for digests of its chunks. Other forms always have them.
    workers: threads; default is the number of processors, at most 8. max_memory: bytes for buffers.
    overwrite: replace a checkpoint at ``dest`` (never anything else, and never one that the source is part of).
    resume: continue a conversion of the same source with the same arguments that was interrupted, and leave what was
        written where this one is; False: begin anew, and leave nothing.
    dry_run: plan and check everything, the free space too, and write nothing.
    team: processes that share the work, on machines that see the same source and destination: every one of them calls
        this with the same arguments and its own number (`ucp.transfer.team.from_environment`). Default: this one alone.
    ds_config: 'deepspeed' only: a DeepSpeed config (a path or a mapping) for what the layout leaves open; default is
        the source's recorded one.
    dtype: 'huggingface' only: the element type of floating-point weights, such as 'bf16'; default is the source's own,
        the most precise it has. max_shard_size: 'huggingface' only: bytes of a file before another is begun (5 GB).
    like: 'huggingface' only: a model folder whose config, tokenizer and generation files are carried over; one with an
        adapter_config.json and no config.json makes it a PEFT adapter folder. Default: the source, if it is a model's.
    progress: called with (bytes done, bytes in all).

    Raises a UcpError: BadArgument, DestinationError, and what `ucp.open` and reading raise. The destination is
    untouched then.
    """
    started = time.monotonic()
    destination = str(locate(dest))
    if to not in _WRITERS:
        raise _unknown_target(to)
    parsed = parse_layout(layout) if isinstance(layout, str) else layout
    _check_flags(to, parsed, virtual, digests, ds_config)
    _check_model_flags(to, dtype=dtype, max_shard_size=max_shard_size, like=like)
    budget(workers, max_memory)
    with checkpoint.open(
        source, spec, tag, model_config=model_config, sizes=sizes, trust_client_state=trust_client_state
    ) as opened:
        options = _Options(
            layout=parsed,
            ds_config=configs.given(ds_config, BadArgument),
            virtual=virtual,
            destination=destination,
            tag=_target_tag(opened),
            digests=digests,
            workers=workers,
            dtype=dtype,
            max_shard_size=max_shard_size,
            like=_model_folder(like, opened),
            choice=choose(spec, model_config, sizes),
        )
        job = _WRITERS[to](opened.catalog, options)
        total = sum(file.size for file in job.files)
        needed = total + _manifest_bound(opened.catalog, total) + _SLACK
        identity = _identity(job)
        team = team or Team()
        _check_destination(destination, job, needed, identity if resume else None, team, overwrite)
        check_files(job.files)
        finished: dict[str, bytes] = {}
        with Files() as files:
            writing = Writing(
                Reader(job.source, files),
                job.files,
                identity,
                lambda: _check_unchanged(job.source.on_disk),
                workers,
                max_memory,
                progress,
            )
            if dry_run:
                log.debug("%s: nothing is written in a dry run", destination)
            elif is_remote(destination):
                finished = _upload(writing, destination, job)
            elif team.leads:
                finished = _write_whole(writing, destination, job, team, overwrite, resume)
            else:
                write_following(writing, part_folder(destination), team)
            read = files.bytes_read
    return ConversionReport(
        source=str(locate(source)),
        destination=destination,
        source_format=opened.format,
        to=to,
        virtual=virtual,
        layout=str(opened.layout),
        target_layout=None if job.target_layout is None else str(job.target_layout),
        tag=job.tag,
        parameters=len(opened.parameters),
        tensors=len(opened.catalog.tensors),
        files=len(job.files) + len(finished),
        bytes_written=total + sum(map(len, finished.values())),
        bytes_read=read,
        seconds=time.monotonic() - started,
        dry_run=dry_run,
    )


def _check_destination(
    destination: str, job: _Job, needed: int, identity: str | None, team: Team, overwrite: bool
) -> None:
    """Raise where the destination cannot be written. identity: of an interrupted conversion that may be continued."""
    if is_remote(destination):
        _check_remote(destination, team, overwrite)
        return
    _check_replaced(Path(destination), job.source, overwrite)
    if team.leads:
        held = 0 if identity is None else held_bytes(destination, identity)
        check_destination(destination, needed_bytes=needed - held, replace=overwrite)


def _write_whole(
    writing: Writing, destination: str, job: _Job, team: Team, overwrite: bool, resume: bool
) -> dict[str, bytes]:
    """Process 0: write the destination together with the others, the small files last."""
    with growing(destination, writing.identity, replace=overwrite, resume=resume) as part:
        if there := noted_bytes(part):
            total = sum(file.size for file in job.files)
            log.warning("continuing in '%s': about %.2f of %.2f GB were written", part, there / 1e9, total / 1e9)
        finished = job.finish(write_leading(writing, part, team))
        for name, raw in finished.items():
            _write(Path(names.below(part / CHECKPOINT, name)), raw)
        writing.check_source()
    return finished


def _check_remote(url: str, team: Team, overwrite: bool) -> None:
    """Raise where a destination behind a URL cannot be written."""
    if overwrite:
        raise BadArgument(
            f"{url}: behind a URL nothing is replaced; remove what is there, or choose another destination"
        )
    if team.processes > 1:
        raise BadArgument(f"{url}: several processes share a local destination only; convert with one")
    check_upload(url)


def _upload(writing: Writing, url: str, job: _Job) -> dict[str, bytes]:
    """Write everything behind a URL, the manifest last; what was written is removed where that fails."""
    finished: dict[str, bytes] = {}
    try:
        found = upload_files(
            writing.reader,
            url,
            job.files,
            threads=writing.threads,
            max_memory=writing.max_memory,
            progress=writing.progress,
        )
        writing.check_source()
        finished = job.finish(found)
        for name, raw in finished.items():
            upload(names.below(url, name), raw)
    except BaseException:
        discard(url, [*finished, *(file.name for file in job.files)])
        raise
    return finished


# --- writers: one for each target format -----------------------------------------------------------------------------


def _to_universal(catalog: Catalog, options: _Options) -> _Job:
    writer = manifest.writer_name()
    if not options.virtual:
        whole = consolidated.plan(catalog)
        return _Job(whole.source, whole.files, lambda digests: {manifest.NAME: whole.manifest(digests, writer)})
    pointing = virtual.plan(catalog)

    def finish(digests: dict[str, ChunkDigests]) -> dict[str, bytes]:
        foreign = _digests_of(pointing.foreign, options.workers) if options.digests else {}
        _check_unchanged(pointing.foreign)
        return {manifest.NAME: pointing.manifest(digests, writer, options.destination, foreign)}

    return _Job(pointing.source, pointing.files, finish)


def _to_deepspeed(catalog: Catalog, options: _Options) -> _Job:
    from ucp.formats.deepspeed.write import native

    if options.layout is None:
        raise BadArgument("converting to 'deepspeed' needs a layout to write for, such as dp=4,zero=3")
    source = training.with_sources_of_state(catalog)
    files = native.plan(source, options.layout, options.ds_config, options.choice)
    return _tagged_job(source, files, options.tag, "latest", options.layout)


def _to_deepspeed_universal(catalog: Catalog, options: _Options) -> _Job:
    from ucp.formats.deepspeed.write import universal_folder

    source = training.with_sources_of_state(catalog)
    return _tagged_job(source, universal_folder.plan(source), options.tag, "latest_universal", None)


def _tagged_job(catalog: Catalog, files: list[TargetFile], tag: str, pointer: str, layout: Layout | None) -> _Job:
    """A job in DeepSpeed's convention: everything in a folder named by the tag, and a file beside it that names it."""
    folder = names.entry(tag, "the source's tag", BadArgument, "rename its folder")
    placed = [dataclasses.replace(file, name=f"{folder}/{file.name}") for file in files]
    text = tag.encode("utf-8")
    placed.append(TargetFile(pointer, len(text), ((0, text),), ()))
    return _Job(catalog, tuple(placed), lambda digests: {}, tag=tag, target_layout=layout)


def _to_dcp(catalog: Catalog, options: _Options) -> _Job:
    from ucp.formats.dcp import writer

    source = training.with_sources_of_state(catalog)
    return _Job(source, tuple(writer.plan(source)), lambda digests: {})


def _to_huggingface(catalog: Catalog, options: _Options) -> _Job:
    from ucp.formats.huggingface import writer

    max_shard = shards.SHARD if options.max_shard_size is None else options.max_shard_size
    source, files = writer.plan(
        catalog, dtype=options.dtype, max_shard=max_shard, like=options.like, choice=options.choice
    )
    return _Job(source, tuple(files), lambda digests: {})


_WRITERS: dict[str, Callable[[Catalog, _Options], _Job]] = {
    "universal": _to_universal,
    "deepspeed": _to_deepspeed,
    "deepspeed-universal": _to_deepspeed_universal,
    "dcp": _to_dcp,
    "huggingface": _to_huggingface,
}

_PLANNED = ("megatron",)


# --- checks and small steps ------------------------------------------------------------------------------------------


def _unknown_target(to: str) -> Exception:
    known = ", ".join(f"'{name}'" for name in _WRITERS)
    if to in _PLANNED:
        return Unsupported(f"converting to '{to}' is not supported yet; supported are {known}")
    return BadArgument(f"unknown target format '{to}'; supported are {known}")


def _check_flags(to: str, layout: Layout | None, virtual: bool, digests: bool, ds_config: Any) -> None:
    if virtual and to != "universal":
        raise BadArgument(f"the virtual form exists in the universal format only, not in '{to}'")
    if digests and not virtual:
        raise BadArgument("digests can be asked for in the virtual form only; the consolidated form always has them")
    if layout is not None and to != "deepspeed":
        raise BadArgument(f"a layout is for 'deepspeed' only: '{to}' checkpoints have none, and resume in any")
    if ds_config is not None and to != "deepspeed":
        raise BadArgument(f"a DeepSpeed config is for 'deepspeed' only, not for '{to}'")


def _check_model_flags(to: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None and to != "huggingface":
            raise BadArgument(f"{name} is for 'huggingface' only, not for '{to}'")


def _model_folder(like: str | os.PathLike[str] | None, opened: checkpoint.Checkpoint) -> Path | None:
    if like is not None:
        return Path(os.path.abspath(like))
    is_one = opened.format == formats.huggingface.NAME and locations.is_file(opened.path / "config.json")
    return opened.path if is_one else None


def _target_tag(opened: checkpoint.Checkpoint) -> str:
    """The tag to write under: the source's own where it has one, else DeepSpeed's default for its step count."""
    if opened.format == formats.deepspeed.NAME:
        return opened.path.name
    return f"global_step{opened.catalog.training_state.global_steps or 0}"


def _manifest_bound(catalog: Catalog, written: int) -> int:
    """About the most bytes that a manifest has: digests in base64, and text for each block, tensor and name."""
    digested = max(written, sum(file.size for file in catalog.files))
    blocks = sum(len(tensor.blocks) for tensor in catalog.tensors.values())
    return chunk_count(digested) * 12 + blocks * 64 + len(catalog.tensors) * 300


def _identity(job: _Job) -> str:
    """A digest of everything that decides the bytes of the files: the plan, and the source as it is now.

    Folders above the source are left out: another machine may see it in another place.
    """
    found = xxhash.xxh3_128(version().encode())
    for file in job.source.files:
        found.update(repr((file.path.rsplit("/", 2)[1:], file.size, file.mtime_ns)).encode())
    for target in job.files:
        found.update(repr((target.name, target.size, target.crc32_entries)).encode())
        for offset, raw in target.literals:
            found.update(repr((offset, len(raw))).encode())
            found.update(raw)
        for want in target.wants:
            tensor = want.tensor
            found.update(repr((tensor.name, tensor.state, tensor.shape, tensor.dtype, want.dtype, want.base)).encode())
            for blocks in (tensor.blocks, want.blocks):
                for column in (blocks.offsets, blocks.sizes, blocks.starts, blocks.strides, blocks.buffers):
                    found.update(column.tobytes())
            found.update(tensor.bases.tobytes())
    return found.hexdigest()


def _check_replaced(destination: Path, source: Catalog, overwrite: bool) -> None:
    """Raise DestinationError where replacing would lose the source, or something else than a checkpoint."""
    if not overwrite or not os.path.lexists(destination):
        return
    if not run_folder.is_checkpoint(destination):
        raise DestinationError(f"{destination}: holds no checkpoint, so it is not replaced; choose another destination")
    inside = os.path.realpath(destination)
    for file in source.files:
        if os.path.commonpath([inside, os.path.realpath(file.path)]) == inside:
            raise DestinationError(
                f"{destination}: holds '{file.path}', which is part of the source, so it is not replaced; choose "
                "another destination"
            )


def _check_unchanged(files: tuple[SourceFile, ...]) -> None:
    """Raise DamagedCheckpoint where a source file is not what it was when it was opened."""
    for file in files:
        try:
            stat = locations.stat(file.path)
        except OSError as error:
            raise DamagedCheckpoint(f"{file.path}: went away during the conversion: {error.strerror}") from error
        if (stat.size, stat.mtime_ns) != (file.size, file.mtime_ns):
            raise DamagedCheckpoint(
                f"{file.path}: was changed during the conversion; convert again once it is complete"
            )


def _digests_of(files: tuple[SourceFile, ...], workers: int | None) -> dict[int, ChunkDigests]:
    with Files() as source, ThreadPoolExecutor(budget(workers, None)[0]) as pool:
        return dict(enumerate(pool.map(lambda file: digest_file(file.path, source), files)))


def _write(path: Path, raw: bytes) -> None:
    try:
        path.write_bytes(raw)
    except OSError as error:
        raise DestinationError(f"{path}: cannot be written: {error.strerror or error}") from error
