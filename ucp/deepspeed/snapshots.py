"""An engine's snapshots in memory: after which steps, and where a load finds them."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

from ucp.deepspeed.config import Config
from ucp.deepspeed.live import LiveEngine
from ucp.deepspeed.live.hold import hold_updates, let_forward_go
from ucp.job import ranks
from ucp.job.timings import record_event, record_snapshot
from ucp.memory import recovery
from ucp.memory.tier import Tier
from ucp.printable import logger
from ucp.saving.save import SaveReport
from ucp.storage.locations import is_remote

log = logger(__name__)


class Snapshots:
    """The snapshots of one engine."""

    def __init__(self, engine: Any, config: Config) -> None:
        self._engine, self._config = engine, config
        self.tier = Tier(config.memory.options(), self.record)
        self._folder: str | None = None
        self._warned = False
        self._taken = 0
        self._rank, self._world = ranks.rank(), ranks.world_size()
        self._load_began = time.monotonic()
        self._loaded: tuple[float, float, float] | None = None
        if self.tier.options.run is not None:
            self.name_after(self.tier.options.run)

    def name_after(self, folder: str | os.PathLike[str]) -> None:
        """Name the run's memory after this folder, which it saves to or loads from. Collective."""
        self._folder = os.fspath(folder)
        live = ranks.all_or_none(lambda: LiveEngine(self._engine))
        self.tier.attach(folder, live.nbytes_to_save)

    def follow(self) -> None:
        """Take a snapshot after every so many'th optimizer step."""
        engine, every = self._engine, self.tier.options.every
        original = engine.step

        @functools.wraps(original)
        def step(_: Any, *args: Any, **kwargs: Any) -> Any:
            before = engine.global_steps
            result = original(*args, **kwargs)
            if self._loaded is not None and engine.global_steps != before:
                self._tell_of_first_step()
            if every and engine.global_steps != before and engine.global_steps % every == 0:
                self._take_by_itself()
            return result

        engine.step = MethodType(step, engine)

    def record(self, report: SaveReport) -> None:
        """Record the timings of a finished snapshot, if the config wants them."""
        if self._config.metrics and self._folder is not None:
            record_snapshot(report, self._folder, self._rank, self._world)

    def _tell_of_first_step(self) -> None:
        """Record how long the restart took from the process's start to the first step, phase by phase."""
        loaded, self._loaded = self._loaded, None
        if not self._config.metrics or self._folder is None or loaded is None:
            return
        engine, report = self._engine, self._engine.ucp.last_load
        now = time.monotonic()
        seconds = {"before load": loaded[0], "load": loaded[1] - loaded[2], "first step": now - loaded[1]}
        read = {} if report is None else {f"load, {stage}": took for stage, took in report.seconds.items()}
        more = {"step": engine.global_steps, "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))}
        from_ = "" if report is None else report.path
        record_event(self._folder, "resumed", self._rank, self._world, {**seconds, **read}, source=from_, **more)

    def loading(self) -> None:
        """Note that a load begins now."""
        self._load_began = time.monotonic()

    def loaded(self) -> None:
        """Note that a load is done."""
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - _born() - (time.monotonic() - self._load_began)
        self._loaded = (age, time.monotonic(), self._load_began)

    def take(self, client_state: Mapping[str, Any]) -> bool:
        """Begin a snapshot of the state as it is now. Collective. Returns whether one was begun."""
        if not self.tier.is_due():
            return False
        engine = self._engine
        live = ranks.all_or_none(lambda: LiveEngine(engine))
        live.place(self._config.choice(), to_save=True)
        source = ranks.all_or_none(lambda: live.source(client_state, late=True))
        hold_updates(engine, engine.ucp.hold)
        let_forward_go(engine, engine.ucp.is_copying)
        begun = self.tier.snapshot(source, f"global_step{engine.global_steps}")
        self._taken += begun
        return begun

    def source(self, folder: str | os.PathLike[str], tag: str | int | None) -> tuple[str, str | int | None]:
        """Where a load from this folder reads, and the tag there. It reads from memory if no tag is asked for and the
        memory's snapshot is no older than the folder's checkpoint. Collective."""
        self.loading()
        self.name_after(folder)
        if tag is not None:
            return os.fspath(folder), tag
        return recovery.source(self.tier, folder)

    def _take_by_itself(self) -> None:
        if self.tier.run is None:
            if not self._warned and ranks.rank() == 0:
                log.warning(
                    'nothing is kept in memory yet: load_checkpoint or save_checkpoint names the run, or "memory": '
                    '{"run": ...} does'
                )
            self._warned = True
            return
        begun = self.take(self._engine.ucp.client_state())
        each = self.tier.options.persist_every
        if begun and each and self._taken % each == 0 and self._folder is not None and not is_remote(self._folder):
            self._engine.save_checkpoint(self._folder, client_state=dict(self._engine.ucp.client_state()))


def _born() -> float:
    """When this process was started, in seconds since boot."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")
