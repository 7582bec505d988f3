"""A saver without DeepSpeed: ranks that are plain processes, and states of random fragments that they hold."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import multiprocessing
import os
import signal
import struct
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ucp
from ucp.catalog import ParameterInfo, TrainingState
from ucp.errors import UcpError
from ucp.geometry import Blocks, box, empty, flat_ranges, numel
from ucp.parallel.mesh import Layout
from ucp.saving import commit, writer
from ucp.saving.background import Saver
from ucp.saving.commit import Session
from ucp.saving.save import write_share
from ucp.saving.source import Holding, Source
from ucp.storage import atomic, disk
from ucp.storage.dtypes import from_torch

# Prime sizes, one element, none at all, no dimension, three of them; one longer than a digest's chunk.
MODEL: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "embed.weight": ((613, 211), torch.float32),
    "wide": ((1 << 18, 3), torch.bfloat16),
    "gain": ((1,), torch.float32),
    "none": ((0, 4), torch.float32),
    "scale": ((), torch.float64),
    "cube": ((3, 5, 7), torch.float16),
    "flags": ((11,), torch.bool),
    "counts": ((4, 2), torch.int64),
}


def values(seed: int, small: bool = False) -> dict[tuple[str, str], torch.Tensor]:
    """Every logical tensor of a state, whole: what was saved, for tests to compare with."""
    out = {}
    random = np.random.default_rng(seed)
    for name, (shape, dtype) in MODEL.items():
        if small and len(shape) == 2:
            shape = (shape[0] % 100, shape[1])
        for state in ("param", "exp_avg"):
            raw = random.integers(0, 2 if dtype == torch.bool else 100, numel(shape)).astype(np.float64)
            out[name, state] = torch.from_numpy(raw).to(dtype).reshape(shape)
    return out


def digest(tensors: dict[tuple[str, str], torch.Tensor]) -> str:
    """One digest of all tensors: names, shapes, types and bits."""
    out = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        out.update(repr((key, tuple(tensor.shape), tensor.dtype)).encode())
        out.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


def digest_of(folder: Path, tag: str | None = None) -> str:
    """The digest of what `ucp.open` finds there."""
    with ucp.open(folder, tag=tag) as checkpoint:
        return digest({key: checkpoint.read(*key) for key in checkpoint.catalog.tensors})


def source(tensors: dict[tuple[str, str], torch.Tensor], rank: int, world: int, seed: int = 0) -> Source:
    """What one of ``world`` ranks holds, by a cut that depends on the tensor: the same on every rank.

    Some are cut flat at random places (with padding in the buffer), some by columns (so that their elements do not lie
    densely), some are held whole by all ranks, and some by a part of them.
    """
    random = np.random.default_rng(seed)
    infos, holdings = {}, []
    for (name, state), tensor in tensors.items():
        shape = tuple(tensor.shape)
        infos.setdefault(name, ParameterInfo(name, shape, {}, "parameter", {"step": seed + 3}, (f"tied.{name}",)))
        way = random.integers(0, 4)
        holders: tuple[int, ...] = (rank,)
        if way == 0 and shape and numel(shape):
            cuts = np.sort(random.integers(0, numel(shape) + 1, world - 1))
            low, high = [0, *cuts.tolist()][rank], [*cuts.tolist(), numel(shape)][rank]
            pad = int(random.integers(1, 9))
            memory = torch.cat([torch.ones(pad, dtype=tensor.dtype), tensor.reshape(-1)[low:high]])
            blocks = flat_ranges(shape, [low], [high], [pad])
        elif way == 1 and len(shape) == 2 and shape[1] >= world:
            low, high = shape[1] * rank // world, shape[1] * (rank + 1) // world
            memory, blocks = _columns(tensor, low, high)
        else:
            holders = tuple(range(world)) if way < 3 else tuple(range(world // 2, world))
            blocks = box([0] * len(shape), shape) if numel(shape) and rank in holders else empty(len(shape))
            memory = tensor.clone() if rank in holders else torch.zeros(0, dtype=tensor.dtype)
        holdings.append(Holding(name, state, shape, from_torch(tensor.dtype), memory, blocks, holders))
    return Source(
        Layout(dp=world, zero=1),
        infos,
        holdings,
        TrainingState(global_steps=seed, client_state={"seed": seed, "table": torch.arange(5) + seed}),
        {"rank": rank, "rng": np.arange(3) + rank, "mine": torch.full((2,), float(rank))},
    )


def _columns(tensor: torch.Tensor, low: int, high: int) -> tuple[torch.Tensor, Blocks]:
    """Columns of a matrix that lie in a buffer wider than they are."""
    rows, width = tensor.shape[0], high - low + 2
    memory = torch.zeros(rows, width, dtype=tensor.dtype)
    memory[:, 1:-1] = tensor[:, low:high]
    return memory, box([0, low], [rows, high - low], 1, [width, 1])


# --- ranks as processes ----------------------------------------------------------------------------------------------

# What a save does to files, by the functions that it calls: a moment to die at lies before each of them.
OPERATIONS = ("open", "pwrite", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


@dataclass(frozen=True)
class Death:
    """A rank kills itself, or all ranks (``everyone``), before its n-th operation on files."""

    rank: int
    operation: int
    everyone: bool = False


@dataclass(frozen=True)
class Ended:
    """What became of a save. code: the first rank's exit code, negative where a signal killed it; text: its error.
    operations: how many operations on files each rank did; -1 where it died as ``death`` says."""

    code: int
    text: str
    operations: tuple[int, ...]


def save(
    folder: Path,
    tag: str,
    made: list[Source],
    *,
    death: Death | None = None,
    kill_all_after: float | None = None,
    hangs: int | None = None,
    timeout: float = 20.0,
) -> Ended:
    """Save on ranks that are processes of their own; returns once all of them have ended.

    kill_all_after: seconds until SIGKILL for all of them. hangs: a rank that never begins.
    """
    counters = mmap.mmap(-1, 8 * len(made))
    reading, writing = os.pipe()
    leader = os.fork()
    if leader == 0:
        os.close(reading)
        os.setpgid(0, 0)
        _in_child(lambda: _first(folder, tag, made, death, hangs, counters, timeout), writing)
    os.close(writing)
    if kill_all_after is not None:
        time.sleep(kill_all_after)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1])
    if hangs is not None:
        os.killpg(leader, signal.SIGKILL)
    text = b""
    while part := os.read(reading, 1 << 16):  # ends when the last rank has
        text += part
    os.close(reading)
    return Ended(code, text.decode(), struct.unpack(f"<{len(made)}q", counters[:]))


def save_in_background(folder: Path, tag: str, made: Source, death: Death | None, trainer_dies: bool = False) -> Ended:
    """As `save`, by one rank's `Saver` and its writer, whose operations count: both die, or the writer alone.

    trainer_dies: the training process is killed instead, by its writer, which is to end by itself.
    """
    counters = mmap.mmap(-1, 16)  # the second number is the writer's
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:

        def change() -> None:
            struct.pack_into("<q", counters, 8, os.getpid())
            instrument(0, death, counters, os.getppid() if trainer_dies else None)

        def work() -> None:
            fork_writers(change)
            saver = Saver()
            saver.save(made, folder, tag)
            saver.hold()
            saver.wait()

        os.setpgid(0, 0)
        _in_child(work, writing)
    os.close(writing)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reading, "rb") as errors:
        text = errors.read().decode()
    count, process = struct.unpack("<qq", counters[:])
    deadline = time.monotonic() + 20
    while process and atomic.is_alive(process):
        if time.monotonic() > deadline:
            raise AssertionError("the writer goes on without its training process")
        time.sleep(0.001)
    return Ended(code, text, (count,))


class Forked:
    """A writer that is a fork of this process, so that it starts at once and what a test has changed counts there."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        code = self._wait(0)
        assert code is not None
        return code

    def _wait(self, how: int) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, how)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code


def fork_writers(change: Callable[[], None] = lambda: None) -> None:
    """From now on let writers of this process be forks of it, after ``change`` in each of them."""
    ends: list[Connection] = []

    def pipe() -> tuple[Connection, Connection]:
        ends[:] = multiprocessing.Pipe()
        return ends[0], ends[1]

    def start(theirs: Connection, memory: int, digesters: int) -> Forked:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                ends[0].close()  # that the training process has closed it is to be seen
                change()
                writer.main(theirs.fileno(), memory, parent, digesters)
            finally:
                os._exit(9)
        return Forked(pid)

    writer.Pipe, writer.start_process = pipe, start  # type: ignore[assignment]


def _in_child(work: Callable[[], None], errors: int) -> None:
    """Run in a forked process, which ends here."""
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    except UcpError as error:
        code = 3
        os.write(errors, f"{type(error).__name__}: {error}".encode())
    except BaseException:  # noqa: BLE001 - it is told to the parent
        os.write(errors, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _first(
    folder: Path, tag: str, made: list[Source], death: Death | None, hangs: int | None, counters: Any, timeout: float
) -> None:
    instrument(0, death, counters)
    session = commit.begin(folder, tag, len(made))
    for rank in range(1, len(made)):
        if os.fork() == 0:
            _in_child(lambda: _other(session, rank, made[rank], death, hangs, counters), 2)  # noqa: B023
    try:
        write_share(session, 0, made[0])
    except UcpError:
        commit.abandon(session)
        raise
    commit.commit(session, timeout=timeout)


def _other(session: Session, rank: int, made: Source, death: Death | None, hangs: int | None, counters: Any) -> None:
    if rank == hangs:
        time.sleep(600)
    instrument(rank, death, counters)
    try:
        write_share(session, rank, made)
    except UcpError as error:
        commit.leave_failure(session, rank, error)


def instrument(rank: int, death: Death | None, counters: Any, victim: int | None = None) -> None:
    """Count this process's operations on files, and die before the one that ``death`` names.

    victim: the process that dies then instead of this one, which stops there."""
    limit = death.operation if death is not None and death.rank == rank else None
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == limit:
                struct.pack_into("<q", counters, 8 * rank, -1)
                if death is not None and death.everyone:
                    os.killpg(0, signal.SIGKILL)
                os.kill(victim or os.getpid(), signal.SIGKILL)
                time.sleep(60)
            count += 1
            struct.pack_into("<q", counters, 8 * rank, count)
            return original(*args, **kwargs)

        return call

    for name in OPERATIONS:
        # A rank was forked from the first one, whose functions count already.
        original = getattr(os, name)
        setattr(os, name, counted(getattr(original, "original", original)))
        getattr(os, name).original = getattr(original, "original", original)
    exchange = disk.rename_with  # the system call that Python lacks
    disk.rename_with = counted(getattr(exchange, "original", exchange))
    disk.rename_with.original = getattr(exchange, "original", exchange)
