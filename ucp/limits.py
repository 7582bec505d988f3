"""Every number that could be another one, and what a checkpoint may ask of the process that reads it.

Sizes, times, counts and thresholds have their units in their names and a line of why. Numbers that a file format or an
algorithm prescribes are not here; they stand where the format is read or written. Modules read these when they need
them (``limits.SCRATCH_BYTES``), so that a test or a program that has to change one changes it here, once.

Nothing that a file says is believed before it is compared with the file itself: a count is compared with the files
there are before it is counted up to, a size with the bytes that are left before they are taken. Those bounds come last.
"""

from __future__ import annotations

import functools
import math
import os
from typing import TYPE_CHECKING

from ucp.errors import DamagedCheckpoint

if TYPE_CHECKING:
    from pathlib import Path

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# --- geometry and reading -------------------------------------------------------------------------------------------

# Pairs of blocks that are all tried: sorting out those that may overlap costs more.
PAIRS_TRIED_COUNT = 64
# Runs shorter than this are fetched together, with the gaps between them, when that costs less than separate reads.
SHORT_RUN_BYTES = 32 * KIB
# Gaps longer than this are never read for the sake of the short runs between them.
LONG_GAP_BYTES = 16 * KIB
# Scratch for strided or converted copies, per thread.
SCRATCH_BYTES = 8 * MIB
# Verified chunks kept by each reader thread, for neighbours that share a chunk.
CHUNKS_KEPT_COUNT = 2
# Whole chunks read at once from a file here: few, so that they are verified while they are in the processor's cache.
CHUNKS_AT_ONCE_COUNT = 4
# Whole chunks read at once from behind a URL: many, since every request takes its time.
CHUNKS_FETCHED_COUNT = 32
# Parts that bytes are read into straight away; into more of them they are copied.
READ_PARTS_COUNT = 128
# What one more thread has to read before it is worth starting.
BYTES_PER_READER = 4 * MIB
# Threads of one gathering or conversion: more gain nothing on one disk or one network card.
THREADS_MAX_COUNT = 8
# How much `digest_file` and `verify_range` hold at once: a read of this size costs little beside its hashing.
DIGEST_BATCH_BYTES = 16 * MIB

# Read at once of a record with a CRC-32, and looked at while it is in the processor's cache.
RECORD_STEP_BYTES = 4 * MIB
# A load reads what is missing of a record, to compare its CRC-32, where that is at most this part of it (padding).
RECORD_MISSING_PART = 1 / 32
# A single value's record is read and compared whole where it has at most so many bytes.
SMALL_RECORD_BYTES = 64 * KIB

# --- converting -----------------------------------------------------------------------------------------------------

# A window where memory allows: long enough that planning and system calls don't show.
CONVERT_WINDOW_BYTES = 8 * MIB
# Windows filled together, where they share chunks of the source and memory allows (`ucp.transfer.batches`).
WINDOWS_TOGETHER_BYTES = 32 * MIB
# Pieces shorter on average than a digest's chunk are short: of longer ones it costs less to read their ends twice than
# to work in small windows.
SHORT_PIECE_BYTES = 1 * MIB
# How much is planned at once, so that a plan of many files stays small in memory.
PLANNED_FILES_COUNT = 128
PLANNED_BLOCKS_COUNT = 100_000
# Space kept free for folders and the file system's own bookkeeping.
FREE_SPACE_SLACK_BYTES = 1 * MIB
# Each part of a multipart upload: object stores want at least 5 MiB, and take at most 10,000 parts.
UPLOAD_PART_BYTES = 16 * MIB
# A safetensors file may have so much before another one is begun, as Hugging Face's tools do; one tensor is never cut.
SHARD_FILE_BYTES = 5_000_000_000
# A chunk of a DCP checkpoint, about: what a stock reader reads at least, and what several of its ranks may share.
DCP_CHUNK_BYTES = 128 * MIB
# A data file of a DCP checkpoint, about: several files let several threads write.
DCP_FILE_BYTES = 4 * GIB
# Bytes before a DCP record's elements that are worth comparing with another record's.
DCP_PREAMBLE_BYTES = 4 * KIB
# Room beside a local zip header: torch pads a record's beginning to 64 bytes, in the header's extra field.
ZIP_EXTRA_BYTES = 128

# --- writing --------------------------------------------------------------------------------------------------------

# Files of at least this size are written back while the work goes on; for smaller ones it is not worth a call.
WRITEBACK_FILE_BYTES = 32 * MIB
# Threads of a conversion beside one for each processor: that many wait for the device while the others digest.
WAITING_WRITERS_COUNT = 1
# One write. File systems with large folios allocate page cache in pieces as long as the write, which can be dear: on
# ext4 of Linux 6.18 in a virtual machine, writes of 8 MiB took six times the processor time of these.
WRITE_PIECE_BYTES = 256 * KIB
# A temporary folder of another machine without a write for so long is taken for a dead process's.
STALE_FOLDER_SECONDS = 3600

# --- saving ---------------------------------------------------------------------------------------------------------

# The first rank waits so long for the others' receipts: longer than the slowest disk of a job, shorter than a night.
SAVE_TIMEOUT_SECONDS = 1800.0
# Receipts are looked for so often, at first and at most: quick after a short save, and cheap beside a long one.
RECEIPT_POLL_SECONDS = (0.002, 0.1)
# Host memory that a rank's pool may take if nothing else is asked for.
STAGING_BYTES = 16 * GIB
# Digested and written at once; tensors on a device pass through host memory in such pieces. Whole digest chunks.
SAVE_WINDOW_BYTES = 16 * MIB
# Windows that are copied before the writer hears of them: few words pass, and it begins early.
COPY_STEP_WINDOWS = 16
# Windows that a device copies without making way for training.
COPY_UNBROKEN_WINDOWS = 4
# Windows of memory that tensors pass through where nothing goes on beside: some are filled by a device while others
# are written.
SAVE_TURNS_WINDOWS = 4
# The writing process's niceness where there are no processors to spare: training goes first.
WRITER_NICENESS = 10

# --- snapshots in memory --------------------------------------------------------------------------------------------

# What a keeper's frame has at most: headers have directories in them, bodies pieces of files and whole manifests.
KEEPER_HEADER_BYTES = 256 * MIB
KEEPER_BODY_BYTES = 4 * GIB
# Asked for at once of a file on another node.
KEEPER_PART_BYTES = 8 * MIB
# A keeper that is not reached, or doesn't answer, for so long is lost. An answer may have to wait for a rebuilding.
KEEPER_CONNECT_SECONDS = 5.0
KEEPER_ANSWER_SECONDS = 600.0
# What takes no rebuilding, digesting or waiting has to be answered within so long; a network that is cut says nothing.
KEEPER_WORD_SECONDS = 20.0
# A process that has Python's start and a few imports before it, on a machine that is busy.
KEEPER_START_SECONDS = 60.0
# A keeper of which nobody has heard for so long ends: longer than a night's repair, shorter than for ever.
KEEPER_LINGER_SECONDS = 24 * 3600.0
KEEPER_WATCH_SECONDS = 5.0
KEEPER_BACKLOG_COUNT = 128
# Warnings that a keeper remembers.
KEEPER_LINES_COUNT = 20
# The first rank tells of a refusal before another one ends their agent, which ends all of them.
REFUSAL_HEAD_START_SECONDS = 2.0
# What a report shows of a run, at most.
TIMELINE_RECORDS_COUNT = 2000
# The first rank waits so long for the others' part in a snapshot: one that takes longer protects nobody.
SNAPSHOT_TIMEOUT_SECONDS = 60.0

# --- loading --------------------------------------------------------------------------------------------------------

# Memory that tensors get in one piece, touched by several threads.
HOST_MEMORY_PIECE_BYTES = 16 * MIB
# From this size on memory gets pages of its own.
OWN_PAGES_BYTES = 1 * MIB
# Tensors in one memory begin at multiples of a processor's cache line.
HOST_ALIGNMENT_BYTES = 64
# Of each copy of a tied tensor, compared at a time.
TIED_WINDOW_BYTES = 8 * MIB
# The buffer that a rank exchanges through, on the device of the group's backend.
EXCHANGE_BUFFER_BYTES = 32 * MIB
# What ranks want alike below which 'adaptive' measures nothing, and every rank reads for itself.
EXCHANGE_WORTHWHILE_BYTES = 64 * MIB
# What 'adaptive' reads to measure the storage, and what it exchanges to measure the network.
READ_SAMPLE_BYTES = 16 * MIB
EXCHANGE_TRIAL_BYTES = 4 * MIB
# How often another checkpoint is looked for, where the one at hand is removed while it is opened.
OPEN_ATTEMPTS_COUNT = 5
# How many levels of folders a listing goes down: runs, their folders of checkpoints, a program's own folder in these.
LISTED_DEPTH_COUNT = 4

# --- recognising ----------------------------------------------------------------------------------------------------

# Whether files are of one run: fragments looked at in each file, elements of each, and how many have to say no.
SAME_RUN_FRAGMENTS_COUNT = 32
SAME_RUN_ELEMENTS_COUNT = 16
SAME_RUN_ENOUGH_COUNT = 2
# Ranks save at about the same time: files that were written further apart are told.
SAVED_APART_SECONDS = 1800
# Whether copies are equal: places of each copy that are compared with the tensor, and elements at each.
COPY_PLACES_COUNT = 4
COPY_ELEMENTS_COUNT = 16
# Elements of each tensor that are compared to recognise a parameter by its values.
STAGE0_SAMPLE_COUNT = 64
# The largest file beside a Hugging Face model that is carried along: tokenizers are smaller, weights larger.
CARRIED_FILE_BYTES = 256 * MIB
# Of a tensor, compared at a time to recognise a family's weights.
COMPARED_BYTES = 32 * MIB

# --- remote files ---------------------------------------------------------------------------------------------------

# Requests to a store are tried so often, with a pause before the second that doubles for each further one.
REQUEST_ATTEMPTS_COUNT = 4
REQUEST_FIRST_PAUSE_SECONDS = 0.2
# Fetched at once while metadata are read from a remote file.
REMOTE_BLOCK_BYTES = 1 * MIB

# --- showing --------------------------------------------------------------------------------------------------------

# Seconds between lines of progress in a log, between redraws on a terminal, and before the first of either.
PROGRESS_LOG_SECONDS = 15.0
PROGRESS_REDRAW_SECONDS = 0.2
PROGRESS_PATIENCE_SECONDS = 1.0
# Items of a list that a refusal, a comparison or a command names; the rest is counted.
REFUSAL_ITEMS_COUNT = 8
DIFFERENCE_NAMES_COUNT = 3
VERIFY_FAULTS_COUNT = 20
DIFF_LINES_COUNT = 40
PLAN_LINES_COUNT = 16
INSPECT_FRAGMENTS_COUNT = 16
# Above so many cells of the grid that boxes' edges make, faults are counted and not located.
COVERAGE_CELLS_COUNT = 1 << 24
# Rectangles of one map of a report; beyond, neighbours are drawn as one.
MAP_RECTANGLES_COUNT = 256
# Rows and columns of a report's matrix of a planned resume; more sources or ranks are drawn together.
MATRIX_CELLS_COUNT = 64
# A batch of tensors that are looked through, and a piece of an archive whose CRC is computed.
STREAM_BATCH_BYTES = 32 * MIB
CRC_BATCH_BYTES = 16 * MIB
CRC_PIECE_BYTES = 4 * MIB
# The largest difference of logits that is rounding, over the largest logit.
TRIAL_TOLERANCE_RATIO = 1e-5

# --- a conversion by several processes ------------------------------------------------------------------------------

# How long process 0 waits for the others to come, how long a silent one is waited for, and how often each gives a sign.
TEAM_JOIN_SECONDS = 300.0
TEAM_LOST_SECONDS = 60.0
TEAM_BEAT_SECONDS = 0.5

# --- what a checkpoint may ask for -----------------------------------------------------------------------------------

METADATA_FACTOR = 16
METADATA_FREE = 64 << 20
"""Bytes; see `metadata_bytes`."""

NESTING = 100
"""How deep the values of a file may be nested. Checkpoints have about 10; Python's own writers end near 300."""

INTEGER_BYTES = 1785
"""The longest integer of a pickle: as many decimal digits as Python is willing to print."""

EMPTY_ITEMS = 1 << 16
"""Elements of an array whose elements have no bytes."""

LAYERS_COUNT = 1 << 12
"""The most layers in a row that a pipeline's checkpoint may have lost: they are listed before anything is looked at."""

EXPERTS = 1 << 16
"""The most experts of one layer: they are listed before their tensors are looked at."""


def metadata_bytes(file_bytes: int) -> int:
    """The most memory that reading a file's metadata (pickles, headers, manifests; no tensors) may take, in bytes."""
    return METADATA_FACTOR * file_bytes + METADATA_FREE


def check_json(path: str, raw: bytes) -> None:
    """Raise DamagedCheckpoint where parsing JSON text would take more than `metadata_bytes` of it: before it is parsed.

    Counted generously, as Python keeps it: an object as 240 bytes, a list as 72, a text as 56 beside its letters.
    """
    if 240 * len(raw) < METADATA_FREE:
        return
    needed = 2 * len(raw) + 240 * raw.count(b"{") + 72 * raw.count(b"[") + 28 * raw.count(b'"') + 40 * raw.count(b",")
    if needed > metadata_bytes(len(raw)):
        raise DamagedCheckpoint(
            f"{path}: {len(raw)} bytes of text would take about {needed} in memory, and "
            f"{metadata_bytes(len(raw))} is the most that is read"
        )


def processors() -> int:
    """How many processors this process may use: those that it may run on, within its control group's share of time."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(here, _quota())))


@functools.cache
def _quota() -> float:
    """The processors' time that this process's control groups allow, in processors."""
    from pathlib import Path  # late: the commands' --help needs none of it

    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    return control_group_quota(Path("/sys/fs/cgroup"), lines)


def control_group_quota(root: Path, groups: list[str]) -> float:
    """The processors that control groups allow; infinite where none sets a limit.

    root: where the hierarchies are mounted. groups: the lines of ``/proc/self/cgroup``. A group's limit is its own or
    that of a group above it, the smallest; version 2 has them in ``cpu.max``, version 1 in two files.
    """
    found = math.inf
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        folder = top / path.lstrip("/")
        for at in (folder, *folder.parents):
            found = min(found, _limit_of(at, bool(controllers)))
            if at == top:
                break
    return found


def _limit_of(folder: Path, first_version: bool) -> float:
    try:
        if first_version:
            quota, period = ((folder / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
        else:
            quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no such group, or "max"
        return math.inf
