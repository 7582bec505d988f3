"""One process's part in writing a destination that several processes, or several attempts, fill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from ucp.storage.digests import CHUNK, ChunkDigests
from ucp.storage.partial import CHECKPOINT, JOURNAL, TEAM
from ucp.transfer.collecting import Collecting
from ucp.transfer.pieces import (
    Journal,
    Piece,
    create_files,
    known_chunks,
    read_counts,
    read_journal,
    read_record_pieces,
    seal_files,
)
from ucp.transfer.reader import Counts, Reader
from ucp.transfer.targets import TargetFile
from ucp.transfer.team import Attempt, Team, joined, lead
from ucp.transfer.windows import shares
from ucp.transfer.write import Progress, write_share


@dataclass(frozen=True)
class Writing:
    """What is written, and how: the same files in every process. check_source: raises if the source has changed.
    collecting: digests what is written."""

    reader: Reader
    files: Sequence[TargetFile]
    identity: str
    check_source: Callable[[], None]
    threads: int | None = None
    max_memory: int | None = None
    progress: Progress | None = None
    collecting: Collecting | None = None


def noted_bytes(part: Path) -> int:
    """Bytes that earlier attempts have noted as written."""
    return len(known_chunks(_earlier(part, ""))) * CHUNK


def write_leading(writing: Writing, part: Path, team: Team) -> tuple[dict[str, ChunkDigests], Counts]:
    """Process 0: have all files written into a folder of `ucp.storage.partial`. Returns their digests by name, and what
    the other processes have read.

    Records of the source that were read in part are read to the end, and each is compared with its CRC-32.

    Raises what `write_share` raises, ProcessLost, and DigestMismatch for a damaged record.
    """
    create_files(part / CHECKPOINT, writing.files, continued=True)
    attempt = lead(team, part / TEAM, writing.identity)
    pieces = _write(writing, part, attempt)

    def finished(process: int) -> bool:
        path = _journal(part, attempt, process)
        return path.exists() and read_journal(path)[1]

    attempt.await_all(finished)
    records, others = writing.reader.records, Counts()
    for process in attempt.members:
        journal = _journal(part, attempt, process)
        pieces += read_journal(journal)[0]
        others += read_counts(journal)
        records.add_known(read_record_pieces(journal))
    # Only now: other processes read other parts of the same records.
    records.finish()
    if writing.collecting is not None:
        for piece in pieces:
            writing.collecting.add(piece.file, piece.logical)
    return seal_files(part / CHECKPOINT, writing.files, pieces), others


def write_following(writing: Writing, part: Path, team: Team) -> None:
    """The other processes: write this one's share. Raises what `write_share` raises, and ProcessLost."""
    with joined(team, part / TEAM, writing.identity) as attempt:
        _write(writing, part, attempt)


def _write(writing: Writing, part: Path, attempt: Attempt) -> list[Piece]:
    def progress(done: int, total: int) -> None:
        attempt.check()
        if writing.progress is not None:
            writing.progress(done, total)

    share = shares(writing.files, attempt.team.process, attempt.team.processes)
    known = known_chunks(_earlier(part, attempt.name), share)
    journal = Journal(_journal(part, attempt, attempt.team.process))
    records = writing.reader.records
    records.add_known(piece for path in _earlier_journals(part, attempt.name) for piece in read_record_pieces(path))

    turn = Lock()

    def note(piece: Piece) -> None:
        # What was read for a piece is noted before the piece, so a known piece never comes from unknown bytes.
        with turn:
            journal.add_record_pieces(records.take_pieces())
        journal.add(piece)

    try:
        pieces = write_share(
            writing.reader,
            part / CHECKPOINT,
            writing.files,
            share,
            threads=writing.threads,
            max_memory=writing.max_memory,
            progress=progress,
            known=known,
            note=note,
            collecting=writing.collecting,
        )
        writing.check_source()
        journal.add_record_pieces(records.take_pieces())
        journal.finish(writing.reader.counts)
        return pieces
    finally:
        journal.close()


def _journal(part: Path, attempt: Attempt, process: int) -> Path:
    return part / JOURNAL / f"{attempt.name}-{process}"


def _earlier(part: Path, attempt: str) -> list[Piece]:
    """What attempts other than this one have noted."""
    return [piece for path in _earlier_journals(part, attempt) for piece in read_journal(path)[0]]


def _earlier_journals(part: Path, attempt: str) -> list[Path]:
    paths = sorted((part / JOURNAL).iterdir()) if (part / JOURNAL).is_dir() else []
    return [path for path in paths if path.name.rpartition("-")[0] != attempt]
