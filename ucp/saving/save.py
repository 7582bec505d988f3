"""Save a live training process: every rank writes its share by itself, and the first one commits.

Only two small messages pass between the ranks: where to write, at the beginning, and the result, at the end.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ucp import limits
from ucp.catalog import Catalog, LogicalTensor, SourceFile, TrainingState
from ucp.formats.shared.training_state import Tensors, encode
from ucp.formats.universal import fragmented, manifest, training
from ucp.geometry import concat
from ucp.job import ranks
from ucp.job.stopwatch import Stopwatch
from ucp.parallel.mesh import Layout
from ucp.progress import watching
from ucp.saving import commit
from ucp.saving.commit import Session
from ucp.saving.retention import Keep
from ucp.saving.share import WrittenElements, assign, lay_out
from ucp.saving.source import Source
from ucp.saving.staging import Copying, Pool
from ucp.saving.writer import Share, write
from ucp.storage import plain
from ucp.storage.locations import is_remote
from ucp.storage.safetensors import FilePlan
from ucp.units import bytes_text


@dataclass(frozen=True)
class SaveReport:
    """What a save did.

    Attributes
    ----------
    path, tag
        The checkpoint's.
    nbytes
        How many bytes all files of the checkpoint have.
    written
        How many bytes of tensors this rank wrote.
    seconds
        Stage -> seconds of work on this rank. In the background 'copy' overlaps with 'digest' and 'write', so the sum
        is not ``wall``.

        - prepare: what the training thread did (who writes what, the training state, a place for the files).
        - copy: until everything was in host memory.
        - digest: digesting what is written.
        - write: writing the files, with their flush.
        - commit: the receipt, the wait for the other ranks, and on the first rank the manifest and the rename.
    wall
        The seconds from the call until the checkpoint was on disk.
    memory
        For a save in the background: how many bytes of host memory this rank has for copies. 0 otherwise.
    """

    path: str
    tag: str
    nbytes: int
    written: int
    seconds: Mapping[str, float]
    wall: float
    memory: int = 0

    def __str__(self) -> str:
        return f"saved {self.path} ({bytes_text(self.nbytes)}) in {self.wall:.2f} s"


def save(
    source: Source,
    folder: str | os.PathLike[str],
    tag: str,
    *,
    latest: bool = True,
    timeout: float = limits.SAVE_TIMEOUT_SECONDS,
    keep: Keep | None = None,
) -> SaveReport:
    """Write the checkpoint ``folder/tag``. Collective. The first rank's folder, tag and ``latest`` count.

    latest: let the file ``latest`` in the folder name this checkpoint. timeout: how many seconds the first rank waits
    for the others' files. keep: which other checkpoints stay; None for all. Returns once the checkpoint is whole and on
    disk.

    Raises on every rank, with everything as it was: DestinationError (no space, not writable), Unsupported (training
    state that is not plain data), SaveFailed (a rank failed or hangs, or ranks contradict each other).
    """
    watch = Stopwatch()
    with watch.of("prepare"):
        session = ranks.from_first(lambda: commit.begin(folder, tag, ranks.world_size(), latest=latest, keep=keep))
    rank = ranks.rank()
    written, error = 0, None
    try:
        written = write_share(session, rank, source, watch)
    except Exception as caught:  # noqa: BLE001 - raised below, on all ranks
        error = caught
        if rank:
            commit.leave_failure(session, rank, caught)

    def finish() -> int:
        if error is not None:
            commit.abandon(session)
            raise error
        return commit.commit(session, timeout=timeout)

    try:
        with watch.of("commit"):
            nbytes = ranks.from_first(finish)
    except Exception:
        if error is not None:
            raise error from None
        raise
    return SaveReport(str(session.destination), session.tag, nbytes, written, dict(watch.seconds), watch.passed)


def prepare(source: Source, rank: int, world: int) -> tuple[Share, FilePlan, list[WrittenElements]]:
    """This rank's share, and the header and the pieces of its tensors' file. Does not communicate, and writes nothing.

    Raises Unsupported for what cannot be stored.
    """
    met = Tensors(prefix=f"r{rank}t" if rank else "t")
    state = fragmented.empty_state() if rank else encode(source.training_state, met)
    own = {name: plain.encode(value, met.put, f"rank {rank}'s {name}") for name, value in source.own.items()}
    plan, pieces = lay_out(assign(source.holdings, rank))
    name = fragmented.file_name(rank, world)
    extra = _tensors_file(met, rank)
    files = [SourceFile(name, plan.size, 0)]
    if extra is not None:
        files.append(SourceFile(extra[0], sum(map(len, extra[1])), 0))
    catalog = Catalog(
        format="universal",
        writer=manifest.writer_name(),
        layout=source.layout,
        files=tuple(files),
        parameters=source.parameters,
        tensors=_placed(source, pieces),
        training_state=TrainingState(),
    )
    return Share(name, plan.size, extra, catalog, state, own), plan, pieces


def write_share(session: Session, rank: int, source: Source, watch: Stopwatch | None = None) -> int:
    """`prepare` and then `write`, in this thread. Returns how many bytes the file with this rank's tensors has."""
    watch = watch or Stopwatch()
    with watch.of("prepare"):
        share, plan, pieces = prepare(source, rank, session.world)
        copying = Copying(Pool(limits.SAVE_TURNS_WINDOWS * limits.SAVE_WINDOW_BYTES), plan, pieces)
    path = session.path(share.name)
    with watching("saving", lambda: _held(path), share.size, rank == 0 and not is_remote(path)):
        write(session, rank, share, copying.windows(watch), watch)
    return share.size


def _held(path: Path) -> int:
    """How many bytes a file has that is being written."""
    return path.stat().st_size if path.exists() else 0


def _placed(source: Source, pieces: list[WrittenElements]) -> dict[tuple[str, str], LogicalTensor]:
    """All tensors of the model, with the fragments that this rank wrote in its first file."""
    written: dict[tuple[str, str], list[WrittenElements]] = {}
    for piece in pieces:
        written.setdefault((piece.holding.name, piece.holding.state), []).append(piece)
    out: dict[tuple[str, str], LogicalTensor] = {}
    for holding in source.holdings:
        key = (holding.name, holding.state)
        if key in out:
            continue
        mine = written.get(key, [])
        blocks = concat([piece.blocks for piece in mine], len(holding.shape))
        bases = np.repeat(
            np.array([piece.start for piece in mine], np.int64),
            np.array([len(piece.blocks) for piece in mine], np.int64),
        )
        out[key] = LogicalTensor(*key, holding.shape, holding.dtype, blocks, bases)
    return out


def _tensors_file(met: Tensors, rank: int) -> tuple[str, list[bytes]] | None:
    """The name of the file with the training state's tensors, and the bytes to write one after the other. None if there
    are no such tensors."""
    nothing = Catalog("universal", "", Layout(), (), {}, {}, TrainingState())
    name = training.RANK_TENSORS_FILE.format(rank=rank) if rank else training.TENSORS_FILE
    planned = training.tensors_file(nothing, met, name)
    if planned is None:
        return None
    return name, [raw for _, raw in sorted(planned.literals)]
