"""Jobs that run on the ranks: real engines that save in the universal format, and what became of it."""

from __future__ import annotations

import mmap
import os
import random
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.engines import models
from tests.engines.build import build_engine
from tests.engines.configs import Case
from tests.engines.load_jobs import build_target
from tests.engines.resume import continue_training
from tests.engines.runs import CLIENT_STATE, FURTHER, STEPS
from tests.engines.truth import Truth, compare, gather
from tests.saving.save_jobs import Death, fork_writers, instrument

SAVE: dict[str, Any] = {"save": {"async": False}}


@dataclass(frozen=True, eq=False)
class Saved:
    """A run that saved, went on, and was resumed in the same layout by an engine of another seed.

    Truths on rank 0 only.

    draws: numbers that this rank's generators gave right after the save; resumed_draws: right after the load.
    """

    losses: tuple[float, ...]
    further: tuple[float, ...]
    truth: Truth | None
    truth_after: Truth | None
    draws: tuple[float, ...]
    returned: Any
    written: int
    nbytes: int
    resumed_further: tuple[float, ...] = ()
    resumed: Truth | None = None
    resumed_after: Truth | None = None
    resumed_draws: tuple[float, ...] = ()
    client_state: Mapping[str, Any] = field(default_factory=dict)


def draws() -> tuple[float, ...]:
    """One number of each generator; of the device's, too, where there is one."""
    found = (torch.rand(()).item(), float(np.random.rand()), random.random())
    return (*found, torch.rand((), device="cuda").item()) if on_device() else found


def on_device() -> bool:
    return dist.get_backend() == "nccl"


def unequal_generators() -> None:
    """Different on every rank, and each somewhere within its stream."""
    rank = dist.get_rank()
    torch.manual_seed(100 + rank)
    np.random.seed(200 + rank)
    random.seed(300 + rank)
    torch.randn(7 + rank)
    if on_device():
        torch.randn(5 + rank, device="cuda")
    np.random.randn(3)


def save_and_resume(case: Case, folder: str, tag: str | None = None, steps: int = STEPS) -> Saved:
    """Train, save, go on; then load into a fresh engine of the same layout and go on again."""
    engine = build_engine(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True, **SAVE}})
    losses = continue_training(engine, case, 0, steps)
    unequal_generators()
    truth = gather(engine)
    client_state = {**CLIENT_STATE, "rank": dist.get_rank(), "table": torch.arange(3) + dist.get_rank()}
    returned = engine.save_checkpoint(folder, tag, client_state=client_state)
    drawn = draws()
    report = engine.ucp.last_save
    further = continue_training(engine, case, steps, FURTHER)
    after = gather(engine)
    other = build_target(case.but(seed=5), SAVE)
    path, found = other.load_checkpoint(folder)
    if path is None:
        raise FileNotFoundError(folder)
    resumed_draws = draws()
    resumed = gather(other)
    resumed_further = continue_training(other, case, steps, FURTHER)
    return Saved(
        tuple(losses),
        tuple(further),
        truth,
        after,
        drawn,
        returned,
        report.written,
        report.nbytes,
        tuple(resumed_further),
        resumed,
        gather(other),
        resumed_draws,
        found,
    )


def save_twice(case: Case, folder: str) -> list[list[str]]:
    """The folder's names after saves under one tag, without `latest`, and of another step by default tags."""
    engine = build_engine(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True, **SAVE}})
    names = []
    for tag, latest in (("pytorch_model", False), ("pytorch_model", True), (None, True), (None, True)):
        continue_training(engine, case, len(names), 1)
        engine.save_checkpoint(folder, tag, save_latest=latest)
        names.append(sorted(os.listdir(folder)))
    return names


def save_without_frozen(case: Case, folder: str) -> None:
    engine = build_engine(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True, **SAVE}})
    continue_training(engine, case, 0, 1)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)


def refused_saves(case: Case, folder: str, good: str) -> list[tuple[str, str]]:
    """The errors of saves that cannot be done; and that the engine saves well after them."""
    engine = build_engine(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True, **SAVE}})
    continue_training(engine, case, 0, 1)
    rank = dist.get_rank()
    attempts: list[dict[str, Any]] = [
        {"save_dir": good, "tag": "a/b"},
        {"save_dir": good, "client_state": {"socket": object()}},
        {"save_dir": good, "client_state": {"socket": object()} if rank else {}},
        {"save_dir": os.path.join(folder, "file", "below")},
    ]
    found = []
    for attempt in attempts:
        try:
            engine.save_checkpoint(**attempt)
        except Exception as error:  # noqa: BLE001 - it is what the test is about
            found.append((type(error).__name__, error.whole))
        else:
            found.append(("", ""))
    engine.save_checkpoint(good)
    return found


def save_in_background(case: Case, folder: str) -> tuple[Truth | None, Truth | None, list[float], list[str]]:
    """Two saves while training goes on, the second still under way when the process group is destroyed.

    Returns the truths at both saves, the losses, and what the folder has in the end.
    """
    section: dict[str, Any] = {"save": {}}
    engine = build_engine(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True, **section}})
    losses = continue_training(engine, case, 0, 2)
    first = gather(engine)
    engine.save_checkpoint(folder)
    losses += continue_training(engine, case, 2, 2)
    second = gather(engine)
    engine.save_checkpoint(folder)
    if engine.ucp.last_save.tag != "global_step2":
        raise ValueError(f"the second save did not wait for the first: {engine.ucp.last_save}")
    losses += continue_training(engine, case, 4, 1)
    dist.barrier()
    dist.destroy_process_group()
    engine.ucp.wait()
    if engine.ucp.last_save.tag != "global_step4":
        raise ValueError(f"the second save was not finished: {engine.ucp.last_save}")
    return first, second, losses, sorted(os.listdir(folder))


@dataclass(frozen=True, eq=False)
class Lazily:
    """Truths (rank 0 only) at the saves by tag, and the seconds that calls took: copying takes ``SLOW`` at least.

    waits: of DeepSpeed's timer for the whole device, each with whether a copy was under way."""

    truths: Mapping[str, Truth | None]
    seconds: Mapping[str, float]
    waits: list[bool]


SLOW = 0.4


def save_lazily(case: Case, folder: str) -> Lazily:
    """Saves whose copy is slow, each followed by another way to change what is being copied."""
    import deepspeed.utils.timer

    from ucp.saving.staging import Copying

    arriving = Copying.arriving

    def slowly(*args: Any) -> Iterator[int]:
        time.sleep(SLOW)
        yield from arriving(*args)

    Copying.arriving = slowly  # type: ignore[method-assign]
    engine = build_engine(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True}})
    continue_training(engine, case, 0, 2)
    waits: list[bool] = []
    accelerator = deepspeed.utils.timer.get_accelerator
    deepspeed.utils.timer.get_accelerator = lambda: _Waiting(accelerator(), engine, waits)
    # DeepSpeed's stage 3 sets parameters only that all ranks share evenly.
    param = engine.module.cube
    ways: dict[str, Any] = {"step": lambda: continue_training(engine, case, 2, 1)}
    if case.stage:
        whole = torch.zeros(param.ds_shape if case.stage == 3 else param.shape)
        ways["safe_set"] = lambda: deepspeed.utils.safe_set_full_fp32_param(param, whole)
        ways["safe_set_state"] = lambda: deepspeed.utils.safe_set_full_optimizer_state(param, whole, "exp_avg")
    ways["load"] = lambda: engine.load_checkpoint(folder, "step")
    truths, seconds = {}, {}
    for tag, change in ways.items():
        if truths:  # masters that were set by hand are not yet in the module
            engine.load_checkpoint(folder, "step")
        truths[tag] = gather(engine)
        clock = time.perf_counter()
        engine.save_checkpoint(folder, tag)
        seconds[f"save {tag}"] = time.perf_counter() - clock
        clock = time.perf_counter()
        change()
        seconds[tag] = time.perf_counter() - clock
    engine.ucp.wait()
    continue_training(engine, case, 2, 1)
    deepspeed.utils.timer.get_accelerator = accelerator
    dist.barrier()
    return Lazily(truths, seconds, waits)


class _Waiting:
    """DeepSpeed's accelerator, which notes when it is waited for."""

    def __init__(self, real: Any, engine: Any, waits: list[bool]) -> None:
        self._real, self._engine, self._waits = real, engine, waits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def synchronize(self) -> None:
        self._waits.append(self._engine.ucp.saver.is_copying())


def failure_in_background(case: Case, folder: str, failing: int) -> list[tuple[str, str]]:
    """One rank cannot flush: what every rank is told at the next save, and that the one after it works."""
    from ucp.saving import writer

    section: dict[str, Any] = {"save": {}}
    engine = build_engine(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True, **section}})
    continue_training(engine, case, 0, 1)
    engine.save_checkpoint(folder)
    engine.ucp.wait()
    if dist.get_rank() == failing:

        def fail(*args: Any) -> None:
            raise OSError("the disk is gone")

        engine.ucp.saver.dismiss()
        fork_writers(lambda: setattr(writer, "write", fail))
    continue_training(engine, case, 1, 1)
    engine.save_checkpoint(folder)
    told = []
    try:
        engine.save_checkpoint(folder, "again")
    except Exception as error:  # noqa: BLE001 - it is what the test is about
        told.append((type(error).__name__, error.whole))
    if dist.get_rank() == failing:
        engine.ucp.saver.dismiss()
        fork_writers()
    engine.save_checkpoint(folder, "again")
    path, _ = engine.load_checkpoint(folder)  # waits
    return [*told, ("", os.path.basename(path))]


def plain_losses(case: Case, steps: int) -> list[float]:
    """Those of a run that saves nothing."""
    return continue_training(build_engine(case), case, 0, steps)


def save_at(case: Case, folder: str, steps: int, death: Death | None, background: bool) -> int:
    """Train and save; a rank dies on the way as ``death`` says. Returns how many operations on files there were.

    In the background they are the writer's, and either it dies or, where the operation's number is odd, the rank.
    """
    counters = mmap.mmap(-1, 8 * dist.get_world_size())
    # Where another rank dies, the first one waits in vain.
    timeout = 1.0 if death is not None and death.rank else 60.0
    section = {"enabled": True, "save": {"async": background, "timeout": timeout}}
    engine = build_engine(case, "ucp.deepspeed:initialize", {"ucp": section})
    continue_training(engine, case, 0, steps)
    rank, trainer = dist.get_rank(), os.getpid()
    if background:
        victim = trainer if death is not None and death.operation % 2 else None
        fork_writers(lambda: instrument(rank, death, counters, victim))
    else:
        instrument(rank, death, counters)
    engine.save_checkpoint(folder)
    engine.ucp.wait()
    return struct.unpack_from("<q", counters, 8 * rank)[0]


def resume_and_save(case: Case, folder: str) -> None:
    engine = build_target(case.but(seed=5), SAVE)
    if engine.load_checkpoint(folder)[0] is None:
        raise FileNotFoundError(folder)
    continue_training(engine, case, engine.global_steps, 1)
    engine.save_checkpoint(folder)


def save_and_keep_two(case: Case, folder: str) -> list[str]:
    section = {"save": {"keep_last": 2}}
    engine = build_engine(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True, **section}})
    for step in range(4):
        continue_training(engine, case, step, 1)
        engine.save_checkpoint(folder)
    engine.ucp.wait()
    dist.barrier()  # the first rank's wait includes the removals
    return sorted(os.listdir(folder))


def to_a_url(case: Case, url: str, environment: Mapping[str, str]) -> Truth | None:
    """Train, save behind a URL in the background, go on; what was saved (rank 0)."""
    os.environ.update(environment)
    engine = build_engine(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True}})
    continue_training(engine, case, 0, STEPS)
    truth = gather(engine)
    engine.save_checkpoint(url)
    continue_training(engine, case, STEPS, 1)
    engine.ucp.wait()
    return truth


def from_a_url(case: Case, url: str, environment: Mapping[str, str]) -> Truth | None:
    """What a fresh engine has after loading (rank 0)."""
    os.environ.update(environment)
    engine = build_target(case, SAVE)
    engine.load_checkpoint(url)
    return gather(engine)


def loads_of_damaged(case: Case, folder: str, flips: int) -> tuple[dict[str, int], list[str], list[str]]:
    """Load a checkpoint after each of so many single bits were flipped at random places of every file.

    Returns how many loads were refused by file, the flips that were not, and what the refused loads have changed.
    """
    from ucp.errors import UcpError

    engine = build_target(case.but(seed=5))
    before = gather(engine)
    randomly = random.Random(3)
    refused: dict[str, int] = {}
    missed = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        with open(path, "rb") as stream:
            good = stream.read()
        for _ in range(flips):
            at, bit = randomly.randrange(len(good)), randomly.randrange(8)
            with open(path, "wb") as stream:
                stream.write(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            try:
                engine.load_checkpoint(os.path.dirname(folder), os.path.basename(folder))
            except UcpError:
                refused[name] = refused.get(name, 0) + 1
            else:
                missed.append(f"{name}, bit {bit} of byte {at}")
        with open(path, "wb") as stream:
            stream.write(good)
    after = gather(engine)
    changed = [] if before is None or after is None else compare(before, after)
    if engine.load_checkpoint(os.path.dirname(folder), os.path.basename(folder))[0] is None:
        raise FileNotFoundError(folder)
    return refused, missed, changed


def read_on(case: Case, folder: str, length: int, steps: int, resume: bool) -> list[list[int]]:
    """Train steps on the data in the global order, from where the checkpoint was if ``resume``, and save; returns the
    indices that this rank read, step by step."""
    from ucp.deepspeed import GlobalOrder

    engine = build_engine(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True}})
    if resume:
        engine.load_checkpoint(folder)
    batch = engine.train_micro_batch_size_per_gpu()
    order = GlobalOrder(
        length, batch, rank=dist.get_rank(), world=dist.get_world_size(), seen=engine.ucp.samples_seen, seed=9
    )
    loader = iter(torch.utils.data.DataLoader(torch.arange(length), batch, sampler=order))
    read: list[list[int]] = []
    for step in range(steps):
        read.append([])
        for micro in range(case.accumulation):
            read[-1] += next(loader).tolist()
            tokens, labels = models.batch(case.model, step + micro, dist.get_rank(), dist.get_world_size())
            engine.backward(models.loss(case.model, engine, tokens, labels))
            engine.step()
    engine.save_checkpoint(folder)
    engine.ucp.wait()
    return read
