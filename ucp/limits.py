"""Every number that was chosen, and bounds on what a checkpoint may ask of the process that reads it.

Sizes, times, counts and thresholds have their units in their names and a comment that says why. Numbers that a file
format or an algorithm prescribes are not here; they are where the format is read or written. Modules look these numbers
up when they need them (``limits.SCRATCH_BYTES``), so a test or a program that has to change one changes it only here.

Nothing that a file says is believed before it is compared with the file itself. A count is compared with the number of
files before anything counts up to it. A size is compared with the bytes that are left before memory is taken for it.
These bounds come last in this file.
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

# Up to so many pairs of blocks are all tried: sorting out those that may overlap would cost more.
PAIRS_TRIED_COUNT = 64
# Runs shorter than this are fetched together, with the gaps between them, when that costs less than separate reads.
SHORT_RUN_BYTES = 32 * KIB
# Gaps longer than this are never read for the sake of the short runs between them.
LONG_GAP_BYTES = 16 * KIB
# Scratch for strided or converted copies, per thread.
SCRATCH_BYTES = 8 * MIB
# Verified chunks kept by each reader thread, for neighbours that share a chunk.
CHUNKS_KEPT_COUNT = 2
# Whole chunks read at once from a local file: few, so that they are verified while they are in the processor's cache.
CHUNKS_AT_ONCE_COUNT = 4
# The same where nothing but the comparison is done.
CHUNKS_COMPARED_COUNT = 8
# Up to so many processors of a rank, chunks are read one by one, so that they stay in a processor's second cache. With
# more threads, fewer calls count more than that.
CHUNKS_ONE_BY_ONE_PROCESSORS_COUNT = 4
# Whole chunks read at once from a URL: many, since every request takes time.
CHUNKS_FETCHED_COUNT = 32
# Bytes are read straight into at most so many parts. For more parts they are read once and copied.
READ_PARTS_COUNT = 128
# What one more thread has to read before it is worth starting.
BYTES_PER_READER = 4 * MIB
# What one more process of a command has to read before it is worth starting.
BYTES_PER_PROCESS = 512 * MIB
# How long it may take to end once the work is done, before it is ended.
PROCESS_END_SECONDS = 10.0
# What it says of its end at most: less than a pipe holds.
PROCESS_LAST_WORDS_BYTES = 4096
# How often processes of one command give a sign of life, in place of `TEAM_BEAT_SECONDS`: they share a machine.
OWN_TEAM_BEAT_SECONDS = 0.1
# Threads of one gathering or conversion: more gain nothing on one disk or one network card.
THREADS_MAX_COUNT = 8
# How much `digest_file` and `verify_range` hold at once: a read of this size costs little beside its hashing.
DIGEST_BATCH_BYTES = 16 * MIB

# How much of a record with a CRC-32 is read at once, and checked while it is in the processor's second cache.
RECORD_STEP_BYTES = 1 * MIB
# A load reads what it lacks of a record, to compare the CRC-32, if that is at most this part of the record (padding).
RECORD_MISSING_PART = 1 / 32
# Pickles are kept to copy what came of them, if other files have the same ones: how long one may be together with what
# came of it, and all of them.
TWIN_BYTES = 2 * MIB
TWINS_BYTES = 16 * MIB
# A torch archive of at most this size is read at once: it is names and shapes more than tensors.
SMALL_ARCHIVE_BYTES = 256 * KIB
# The most parts of records that all ranks of a job together tell one another of, each in 32 bytes. Records whose parts
# are left out are not compared.
RECORD_PIECES_COUNT = 1 << 18
# The most parts of chunks that all ranks of a job together tell one another of. Of chunks whose parts are left out each
# rank reads all.
CHUNK_PARTS_ALL_COUNT = 1 << 18
# The most parts of one chunk that a rank reads one by one, instead of all of it.
CHUNK_PARTS_COUNT = 4
# The record of a single value is read and compared whole if it has at most so many bytes.
SMALL_RECORD_BYTES = 64 * KIB

# --- converting -----------------------------------------------------------------------------------------------------

# The size of a window if memory allows: so large that planning and system calls cost little beside it.
CONVERT_WINDOW_BYTES = 8 * MIB
# Windows filled together if they share chunks of the source and memory allows (`ucp.transfer.batches`).
WINDOWS_TOGETHER_BYTES = 32 * MIB
# Pieces are short if they are shorter on average than a digest's chunk. For longer pieces, reading their ends twice
# costs less than working in small windows.
SHORT_PIECE_BYTES = 1 * MIB
# How much is planned at once, so that a plan of many files stays small in memory.
PLANNED_FILES_COUNT = 128
PLANNED_BLOCKS_COUNT = 100_000
# Space kept free for folders and the file system's own bookkeeping.
FREE_SPACE_SLACK_BYTES = 1 * MIB
# The size of each part of a multipart upload: object stores want at least 5 MiB, and take at most 10,000 parts.
UPLOAD_PART_BYTES = 16 * MIB
# The most that a safetensors file holds before another one is begun, as in Hugging Face's tools. No tensor is cut.
SHARD_FILE_BYTES = 5_000_000_000
# About the size of a chunk of a DCP checkpoint: the least that a stock reader reads, and what its ranks may share.
DCP_CHUNK_BYTES = 128 * MIB
# About the size of a data file of a DCP checkpoint: several files let several threads write.
DCP_FILE_BYTES = 4 * GIB
# So many bytes before a DCP record's elements are worth comparing with those of another record.
DCP_PREAMBLE_BYTES = 4 * KIB
# What a compressed DCP record may hold beside its tensor's elements (torch's archive takes about 2 KiB), how much is
# decompressed at once, and how much of what was decompressed is kept, if that is more than one record.
ZSTD_SPARE_BYTES = 1 * MIB
ZSTD_STEP_BYTES = 4 * MIB
ZSTD_KEPT_BYTES = 256 * MIB
# Room beside a local zip header: torch pads a record's beginning to 64 bytes, in the header's extra field.
ZIP_EXTRA_BYTES = 128

# --- writing --------------------------------------------------------------------------------------------------------

# Files of at least this size are written back while the work goes on. For smaller ones the call is not worth it.
WRITEBACK_FILE_BYTES = 32 * MIB
# A rank's processors from which on the writer's copies into the page cache take nothing from training.
CACHED_SAVE_PROCESSORS_COUNT = 4
# Windows of a conversion in addition to one for each thread that fills them: so many wait for the device meanwhile.
WAITING_WINDOWS_COUNT = 1
# The size of one write. File systems with large folios allocate page cache in pieces as long as the write, which can be
# expensive: on ext4 of Linux 6.18 in a virtual machine, writes of 8 MiB took six times the processor time of these.
WRITE_PIECE_BYTES = 256 * KIB
# If nothing has been written to another machine's temporary folder for so long, its process is taken to be dead. That
# is longer than a save waits for its slowest rank, and a clock that has stepped by an hour.
STALE_FOLDER_SECONDS = 3 * 3600

# --- saving ---------------------------------------------------------------------------------------------------------

# How long the first rank waits for the others' receipts: longer than a job's slowest disk takes, shorter than a night.
SAVE_TIMEOUT_SECONDS = 1800.0
# The pause between looks for receipts, at first and at most: quick after a short save, and cheap during a long one.
RECEIPT_POLL_SECONDS = (0.002, 0.1)
# Host memory that a rank's pool may take unless the caller sets another amount.
STAGING_BYTES = 16 * GIB
# How much is digested and written at once. Tensors on a device pass through host memory in such pieces. They are whole
# digest chunks.
SAVE_WINDOW_BYTES = 16 * MIB
# Windows that are copied before the writer hears of them: few messages pass, and the writer still begins early.
COPY_STEP_WINDOWS = 16
# Windows that a device copies in a row without making way for training.
COPY_UNBROKEN_WINDOWS = 4
# Windows of memory that tensors pass through if nothing else runs meanwhile: a device fills some while others are
# written.
SAVE_TURNS_WINDOWS = 4
# The writing process's niceness if there are no processors to spare: training goes first.
WRITER_NICENESS = 10

# --- snapshots in memory --------------------------------------------------------------------------------------------

# The most that a keeper's frame holds. Headers contain directories. Bodies contain pieces of files and whole manifests.
KEEPER_HEADER_BYTES = 256 * MIB
KEEPER_BODY_BYTES = 4 * GIB
# The most that is read of somebody who has not shown yet that they know the run's token.
KEEPER_HELLO_BYTES = 64 * KIB
# How long a keeper that has no descriptor or thread to spare waits before it takes the next connection.
KEEPER_BREATH_SECONDS = 0.2
# How much of a file on another node is asked for at once.
KEEPER_PART_BYTES = 8 * MIB
# A keeper that cannot be reached, or does not answer, for so long is lost. An answer may have to wait for a rebuilding.
KEEPER_CONNECT_SECONDS = 5.0
KEEPER_ANSWER_SECONDS = 600.0
# How long an answer may take that needs no rebuilding, digesting or waiting. A network that is cut gives no sign.
KEEPER_WORD_SECONDS = 20.0
# How long a keeper's process may take to start: Python and a few imports, on a machine that is busy.
KEEPER_START_SECONDS = 60.0
# A keeper that has heard from nobody for so long ends: longer than a night's repair, shorter than for ever.
KEEPER_LINGER_SECONDS = 24 * 3600.0
KEEPER_WATCH_SECONDS = 5.0
KEEPER_BACKLOG_COUNT = 128
# Warnings that a keeper remembers.
KEEPER_LINES_COUNT = 20
# How long the other ranks wait, so that the first rank reports a refusal before one of them ends their agent, and with
# it all ranks.
REFUSAL_HEAD_START_SECONDS = 2.0
# How often a rank looks whether a node that was to be left out has left.
LEFT_NODE_WATCH_SECONDS = 1.0
# What a report shows of a run, at most.
TIMELINE_RECORDS_COUNT = 2000
# Processes that digest a rank's snapshot at most: 3 GB/s each, of the 40 or so that a device sends.
DIGESTERS_MAX_COUNT = 16
# Threads that look a snapshot through at most.
SCRUBBING_THREADS_MAX_COUNT = 16
# How long the first rank waits for the others' part in a snapshot: a snapshot that takes longer protects nobody.
SNAPSHOT_TIMEOUT_SECONDS = 60.0

# --- loading --------------------------------------------------------------------------------------------------------

# Host memory that a load may take on each rank beyond what is live, unless the caller says so, and the least it needs.
LOAD_MEMORY_BYTES = 512 * MIB
LOAD_MEMORY_LEAST_BYTES = 64 * MIB
# What a load counts for each thread that reads: scratch, chunks that are read at once, and its part of the windows.
LOAD_THREAD_BYTES = 26 * MIB
# The part of it that may hold, until it is proved, what is kept in fewer bits than it is read in.
LOAD_ROUNDED_PART = 1 / 4
# Threads of a load: copies out of the page cache gain from more threads than a disk or a network card does.
LOAD_THREADS_MAX_COUNT = 16
# How far ahead of what is read from cold files the system is told to read, and of how much it is told at once: it takes
# no more of one call than a device's largest request. How often it is looked how much was read.
READ_AHEAD_BYTES = 64 * MIB
READ_AHEAD_STEP_BYTES = 256 * KIB
READ_AHEAD_PAUSE_SECONDS = 0.001
# A share of at most so many bytes is held before it is put in place, since reading it twice gains nothing.
HELD_ANYWAY_BYTES = 32 * MIB
# Files are warm if the page cache has this part of what is wanted of them.
WARM_PART = 0.9
# How much of the available memory the page cache is trusted to keep between two readings.
CACHE_PART = 0.7
# How much is read, and how much memory is taken, to see whether holding a share is quicker than reading it twice.
TRIAL_BYTES = 16 * MIB
# After how long a thread of a load lets go of the interpreter if others wait for it (Python's own: 5 ms).
SWITCH_SECONDS = 0.0002
# What passes through host memory at a time on the way to a device: whole chunks. A thread fills one while the one
# before is copied. With margins it is a little less than 16 MiB: torch's pinned memory comes in powers of two.
LOAD_WINDOW_BYTES = 15 * MIB
# Threads that fill them. On an H200's 16 processors 12 were 5 % quicker than 8, and 16 slower than either.
LOAD_FILLING_THREADS_COUNT = 12
# Windows beside one for each thread: so many may be on their way to the device while the threads fill others.
LOAD_WINDOWS_AHEAD_COUNT = 4
# Values of at most so many bytes that are held go to a device together, put into a room of so many bytes. For larger
# ones a copy of their own costs little. Each room takes as much on the device.
SENT_TOGETHER_BYTES = 256 * KIB
SENDING_ROOM_BYTES = 4 * MIB
# Tensors on a device begin at such multiples in a window that holds several of them.
WINDOW_ALIGNMENT_BYTES = 64
# The size of the pieces in which tensors get memory ahead of its use, and by which kinds of pages are tried.
HOST_MEMORY_PIECE_BYTES = 4 * MIB
# Huge pages that come slower than this are compared with ordinary ones, which take about 0.5e-9.
SLOW_PAGES_SECONDS_PER_BYTE = 1e-9
# The niceness of the thread that gets memory ahead of its use (Linux has one for each thread): whoever opens and plans
# meanwhile is waited for.
MEMORY_NICENESS = 10
# Memory of this size or more gets pages of its own.
OWN_PAGES_BYTES = 1 * MIB
# Tensors in one memory begin at multiples of a processor's cache line.
HOST_ALIGNMENT_BYTES = 64
# How much of each copy of a tied tensor is compared at a time.
TIED_WINDOW_BYTES = 8 * MIB
# The buffer that a rank exchanges through, on the device of the group's backend.
EXCHANGE_BUFFER_BYTES = 32 * MIB
# What all ranks of one machine together exchange through, in memory that they share. Containers often have 64 MiB.
EXCHANGE_LOCAL_BYTES = 48 * MIB
# If ranks want less than this in common, 'adaptive' measures nothing, and every rank reads for itself.
EXCHANGE_WORTHWHILE_BYTES = 64 * MIB
# How much 'adaptive' reads to measure the storage, and exchanges to measure the network.
READ_SAMPLE_BYTES = 16 * MIB
EXCHANGE_TRIAL_BYTES = 4 * MIB
# How many checkpoints are tried if each is removed while it is opened.
OPEN_ATTEMPTS_COUNT = 5
# How many levels of folders a listing goes down: runs, their folders of checkpoints, a program's own folder in these.
LISTED_DEPTH_COUNT = 4

# --- recognising ----------------------------------------------------------------------------------------------------

# To tell whether files are of one run: fragments looked at in each file, elements of each, and how many must differ.
SAME_RUN_FRAGMENTS_COUNT = 32
SAME_RUN_ELEMENTS_COUNT = 16
SAME_RUN_ENOUGH_COUNT = 2
# Ranks save at about the same time. Files that were written further apart than this are reported.
SAVED_APART_SECONDS = 1800
# To tell whether copies are equal: places of each copy that are compared with the tensor, and elements at each place.
COPY_PLACES_COUNT = 4
COPY_ELEMENTS_COUNT = 16
# Elements of each tensor that are compared to recognise a parameter by its values.
STAGE0_SAMPLE_COUNT = 64
# The largest file beside a Hugging Face model that is carried along: tokenizers are smaller, weights larger.
CARRIED_FILE_BYTES = 256 * MIB
# The largest files that are read at once; larger ones are refused unread. Of any metadata; such as `latest`; a spec, a
# recipe, or what was changed on purpose.
WHOLE_FILE_BYTES = 4 * GIB
POINTER_BYTES = 64 * KIB
SPEC_BYTES = 16 * MIB
# How much of a tensor is compared at a time to recognise a family's weights.
COMPARED_BYTES = 32 * MIB

# --- remote files ---------------------------------------------------------------------------------------------------

# How often a request to a store is tried, and the pause before the second try. The pause doubles for each further try.
REQUEST_ATTEMPTS_COUNT = 4
REQUEST_FIRST_PAUSE_SECONDS = 0.2
# How much is fetched at once while metadata is read from a remote file.
REMOTE_BLOCK_BYTES = 1 * MIB

# --- showing --------------------------------------------------------------------------------------------------------

# Seconds between lines of progress in a log, between redraws on a terminal, and before the first of either.
PROGRESS_LOG_SECONDS = 15.0
PROGRESS_REDRAW_SECONDS = 0.2
PROGRESS_PATIENCE_SECONDS = 1.0
# An error longer than this is said in full by one rank. The others say so many characters of it, and which rank it is.
REFUSAL_ON_ALL_RANKS_CHARACTERS = 360
REFUSAL_POINTER_CHARACTERS = 200
# Items of a list that a refusal, a comparison or a command names. The rest is only counted.
REFUSAL_ITEMS_COUNT = 5
DIFFERENCE_NAMES_COUNT = 3
VERIFY_FAULTS_COUNT = 20
DIFF_LINES_COUNT = 40
PLAN_LINES_COUNT = 16
INSPECT_FRAGMENTS_COUNT = 16
# If the edges of the boxes make a grid of more cells than this, faults are counted but not located.
COVERAGE_CELLS_COUNT = 1 << 24
# Rectangles of one map of a report. If there are more, neighbours are drawn as one.
MAP_RECTANGLES_COUNT = 256
# Rows and columns of a report's matrix of a planned resume; more sources or ranks are drawn together.
MATRIX_CELLS_COUNT = 64
# The size of a batch of tensors that are looked through, and of pieces of an archive whose CRC is computed.
STREAM_BATCH_BYTES = 32 * MIB
CRC_BATCH_BYTES = 16 * MIB
CRC_PIECE_BYTES = 4 * MIB
# Characters of a file of changes, which is written by hand.
CHANGES_CHARACTERS = 1 << 20
# The largest difference of logits that counts as rounding, divided by the largest logit.
TRIAL_TOLERANCE_RATIO = 1e-5

# --- a conversion by several processes ------------------------------------------------------------------------------

# How long process 0 waits for the others to join and for one that is silent, and how often each gives a sign of life.
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

AFFINE_PIECES_COUNT = 1 << 16
"""Pieces of one parameter's affine map."""

AFFINE_COMPARED_COUNT = 1 << 22
"""Pairs of pieces that are compared where ranks divide what they hold in common differently."""

TENSOR_ELEMENTS = 1 << 62
"""More elements than any tensor has; their number still fits into 64 bits."""


def metadata_bytes(file_bytes: int) -> int:
    """The most memory that reading a file's metadata (pickles, headers, manifests; no tensors) may take, in bytes."""
    return METADATA_FACTOR * file_bytes + METADATA_FREE


def check_json(path: str, raw: bytes) -> None:
    """Raise DamagedCheckpoint if parsing JSON text would take more than its `metadata_bytes`. Called before parsing.

    The estimate is generous, as Python keeps values: 240 bytes for an object, 72 for a list, 56 for a text in addition
    to its letters.
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
    """How many processors this process may use: those that it may run on, limited by its control group's quota."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(here, processor_quota())))


def ranks_here() -> int:
    """How many ranks run on this machine, as the launcher says."""
    try:
        return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1), 1)
    except ValueError:
        return 1


def chunks_at_once(most: int) -> int:
    """How many chunks of a local file to read at once, at most so many."""
    return 1 if processors() // ranks_here() <= CHUNKS_ONE_BY_ONE_PROCESSORS_COUNT else most


def digesters() -> int:
    """Processes that digest a rank's snapshot: its part of the processors but one, which the rank itself uses."""
    return max(min(processors() // ranks_here() - 1, DIGESTERS_MAX_COUNT), 1)


@functools.cache
def processor_quota() -> float:
    """The processor time that this process's control groups allow, in processors."""
    from pathlib import Path  # late: the commands' --help needs none of it

    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    return control_group_quota(Path("/sys/fs/cgroup"), lines)


def control_group_quota(root: Path, groups: list[str]) -> float:
    """How many processors control groups allow; infinite if none sets a limit.

    root: where the hierarchies are mounted.
    groups: the lines of ``/proc/self/cgroup``.

    What counts is the smallest limit of a group and the groups above it. Version 2 keeps a limit in ``cpu.max``, and
    version 1 keeps it in two files.
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
