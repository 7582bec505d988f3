"""Carrying out a write plan: into a hidden folder beside the destination, or file by file to a URL.

The hidden folder (`ucp.storage.partial`) is filled by one process or by several, and takes the destination's place in
one rename. Whatever fails, the destination is as it was, and the same plan continues where this one ended. At a URL
there is no rename: one process writes, and the file by which readers find the checkpoint comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ucp import limits
from ucp.catalog import Catalog, SourceFile
from ucp.errors import BadArgument, DamagedCheckpoint, DestinationError
from ucp.logical.record import drawn
from ucp.printable import logger
from ucp.storage import disk, locations, names
from ucp.storage.atomic import check_destination
from ucp.storage.digests import ChunkDigests, chunk_count
from ucp.storage.files import Files
from ucp.storage.locations import is_remote
from ucp.storage.partial import CHECKPOINT, growing, held_bytes, part_folder
from ucp.transfer.collecting import Collecting
from ucp.transfer.reader import Counts, Reader
from ucp.transfer.targets import WritePlan
from ucp.transfer.team import Team
from ucp.transfer.team_write import Writing, noted_bytes, write_following, write_leading
from ucp.transfer.upload import check_upload, discard, upload, upload_files
from ucp.transfer.write import Progress
from ucp.units import bytes_text
from ucp.version import version

log = logger(__name__)


@dataclass(frozen=True)
class Running:
    """How a conversion runs, whatever it converts.

    workers: threads. None for the number of processors, at most 8, and one more.
    max_memory: bytes for buffers.
    overwrite: replace a checkpoint at the destination.
    resume: continue what an interrupted run of the same conversion has left.
    dry_run: check everything, including the free space, and write nothing.
    team: the processes that share the work. None for this one alone.
    progress: called with (bytes done, bytes in all).
    """

    workers: int | None = None
    max_memory: int | None = None
    overwrite: bool = False
    resume: bool = True
    dry_run: bool = False
    team: Team | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Written:
    """What was done.

    files, nbytes: of the destination.
    bytes_read: of the source's tensors.
    verified_bytes: how many of them, and of what else their records hold, were compared with a digest or a CRC-32.
    unverified_bytes: how many of them had neither.
    """

    files: int
    nbytes: int
    bytes_read: int
    verified_bytes: int
    unverified_bytes: int


def carry_out(plan: WritePlan, destination: str, running: Running) -> Written:
    """Check the destination, and write everything unless it is a dry run.

    Raises DestinationError if the destination can't be written, BadArgument for what a URL does not allow,
    DamagedCheckpoint if the source changes meanwhile, DigestMismatch if the source's bytes differ from its digests or
    CRC-32s, ProcessLost, and what reading the source raises.
    """
    team = running.team or Team()
    identity = identify(plan)
    _check(destination, plan, identity if running.resume else None, team, running.overwrite)
    finished: dict[str, bytes] = {}
    others = Counts()
    with Files() as files:
        reader = Reader(plan.source, files, keeps_pieces=True)
        writing = Writing(
            reader,
            plan.files,
            identity,
            lambda: check_unchanged(plan.source.on_disk),
            running.workers,
            running.max_memory,
            running.progress,
            _collecting(plan, identity),
        )
        if running.dry_run:
            log.debug("%s: nothing is written in a dry run", destination)
        elif is_remote(destination):
            finished = _upload(writing, destination, plan)
        elif team.leads:
            finished, others = _write_whole(writing, destination, plan, team, running)
        else:
            write_following(writing, part_folder(destination), team)
        read = files.bytes_read
    if not team.gathers:
        others = Counts()
    return Written(
        len(plan.files) + len(finished),
        plan.nbytes + sum(map(len, finished.values())),
        read + others.read,
        reader.verified_bytes + others.digested,
        reader.unverified_bytes + others.unchecked,
    )


def _collecting(plan: WritePlan, identity: str) -> Collecting | None:
    """What digests tensors while they are written: all, or those that the source has digests of; None if none."""
    if not plan.records and all(tensor.digest is None for tensor in plan.source.tensors.values()):
        return None
    sample = drawn(int(identity[:16], 16))
    return Collecting(plan.files, sample, lambda want: plan.records or want.tensor.digest is not None)


def _finished(plan: WritePlan, writing: Writing, digests: dict[str, ChunkDigests]) -> dict[str, bytes]:
    """The small files, once all others are written. Raises DamagedCheckpoint if tensors differ from the source's."""
    logical = {} if writing.collecting is None else writing.collecting.finish(plan.source)
    return plan.finish(digests, logical) if plan.finish is not None else {}


def identify(plan: WritePlan) -> str:
    """A digest of everything that decides the bytes of the files: the plan, and the source as it is now.

    Folders above the source are left out, since another machine may see it in another place.
    """
    found = xxhash.xxh3_128(version().encode())
    for file in plan.source.files:
        found.update(repr((file.path.rsplit("/", 2)[1:], file.size, file.mtime_ns)).encode())
    for target in plan.files:
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


def check_unchanged(files: Sequence[SourceFile]) -> None:
    """Raise DamagedCheckpoint if a source file has changed since it was opened."""
    for file in files:
        try:
            stat = locations.stat(file.path)
        except OSError as error:
            raise DamagedCheckpoint(f"{file.path}: went away during the conversion: {error.strerror}") from error
        if (stat.size, stat.mtime_ns) != (file.size, file.mtime_ns):
            raise DamagedCheckpoint(
                f"{file.path}: was changed during the conversion; convert again once it is complete"
            )


def _check(destination: str, plan: WritePlan, identity: str | None, team: Team, overwrite: bool) -> None:
    """Raise if the destination cannot be written. identity: of an interrupted conversion that may be continued."""
    if is_remote(destination):
        _check_remote(destination, team, overwrite)
    elif team.leads:
        needed = plan.nbytes + _manifest_bound(plan.source, plan.nbytes) + limits.FREE_SPACE_SLACK_BYTES
        held = 0 if identity is None else held_bytes(destination, identity)
        check_destination(destination, needed_bytes=needed - held, replace=overwrite)


def _check_remote(url: str, team: Team, overwrite: bool) -> None:
    """Raise if a destination at a URL cannot be written."""
    if overwrite:
        raise BadArgument(
            f"{url}: behind a URL nothing is replaced; remove what is there, or choose another destination"
        )
    if team.processes > 1:
        raise BadArgument(f"{url}: several processes share a local destination only; convert with one")
    check_upload(url)


def _manifest_bound(catalog: Catalog, written: int) -> int:
    """About the most bytes that a manifest takes: digests in base64, and text for each block, tensor and name."""
    digested = max(written, sum(file.size for file in catalog.files))
    blocks = sum(len(tensor.blocks) for tensor in catalog.tensors.values())
    return chunk_count(digested) * 12 + blocks * 64 + len(catalog.tensors) * 400


def _write_whole(
    writing: Writing, destination: str, plan: WritePlan, team: Team, running: Running
) -> tuple[dict[str, bytes], Counts]:
    """Process 0: write the destination together with the others, the small files last. Returns these, and what the
    others have read."""
    with growing(destination, writing.identity, replace=running.overwrite, resume=running.resume) as part:
        if there := noted_bytes(part):
            log.warning(
                "continuing in '%s': about %s of %s were written", part, bytes_text(there), bytes_text(plan.nbytes)
            )
        digests, others = write_leading(writing, part, team)
        finished = _finished(plan, writing, digests)
        for name, raw in finished.items():
            _write(Path(names.below(part / CHECKPOINT, name)), raw)
        writing.check_source()
    return finished, others


def _write(path: Path, raw: bytes) -> None:
    try:
        disk.write_new(path, raw)
    except OSError as error:
        raise DestinationError(f"{path}: cannot be written: {error.strerror or error}") from error


def _upload(writing: Writing, url: str, plan: WritePlan) -> dict[str, bytes]:
    """Write everything to a URL, the small files last. If that fails, what was written is removed."""
    finished: dict[str, bytes] = {}
    try:
        found = upload_files(
            writing.reader,
            url,
            plan.files,
            threads=writing.threads,
            max_memory=writing.max_memory,
            progress=writing.progress,
            collecting=writing.collecting,
        )
        writing.reader.records.finish()
        writing.check_source()
        finished = _finished(plan, writing, found)
        for name, raw in finished.items():
            upload(names.below(url, name), raw)
    except BaseException:
        discard(url, [*finished, *(file.name for file in plan.files)])
        raise
    return finished
