"""An engine's snapshots in memory: after which steps, and where a load finds them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from ucp.deepspeed.config import Config
from ucp.deepspeed.live import LiveEngine
from ucp.deepspeed.live.hold import hold_updates, let_forward_go
from ucp.job import ranks
from ucp.memory import recovery
from ucp.memory.tier import Tier
from ucp.printable import logger
from ucp.saving.save import SaveReport
from ucp.storage.locations import is_remote

log = logger(__name__)


class Snapshots:
    """One engine's. done: gets the report of each."""

    def __init__(self, engine: Any, config: Config, done: Callable[[SaveReport], None]) -> None:
        self._engine, self._config = engine, config
        self.tier = Tier(config.memory.options(), done)
        self._folder: str | None = None
        self._warned = False
        self._taken = 0
        if self.tier.options.run is not None:
            self.name_after(self.tier.options.run)

    def name_after(self, folder: str | os.PathLike[str]) -> None:
        """The run saves to this folder, or loads from it: its memory is called after it. Collective."""
        self._folder = os.fspath(folder)
        live = ranks.all_or_none(lambda: LiveEngine(self._engine))
        self.tier.attach(folder, live.nbytes_to_save)

    def follow(self) -> None:
        """Take a snapshot after every so many'th optimizer step."""
        engine, every = self._engine, self.tier.options.every
        if not every:
            return
        original = engine.step

        @functools.wraps(original)
        def step(_: Any, *args: Any, **kwargs: Any) -> Any:
            before = engine.global_steps
            result = original(*args, **kwargs)
            if engine.global_steps != before and engine.global_steps % every == 0:
                self._take_by_itself()
            return result

        engine.step = MethodType(step, engine)

    def take(self, client_state: Mapping[str, Any]) -> bool:
        """Begin a snapshot of the state as it is now. Collective."""
        engine = self._engine
        live = ranks.all_or_none(lambda: LiveEngine(engine))
        live.place(self._config.choice())
        source = ranks.all_or_none(lambda: live.source(client_state))
        hold_updates(engine, engine.ucp.hold)
        let_forward_go(engine, engine.ucp.is_copying)
        begun = self.tier.snapshot(source, f"global_step{engine.global_steps}")
        self._taken += begun
        return begun

    def source(self, folder: str | os.PathLike[str], tag: str | int | None) -> tuple[str, str | int | None]:
        """Where a load from this folder reads, and the tag there: from memory, if no tag is asked for and what the
        memory has is no older than what the folder has. Collective."""
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
