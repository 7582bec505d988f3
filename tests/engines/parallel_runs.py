"""Engines under model parallelism that train, save and resume, whichever kind it is. Jobs for ranks.

A case (`pipe_runs.PipeCase`, `tp_runs.TpCase`) names its rig: the module that builds its engine, trains it and gathers
the truth about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from tests.engines import releases
from tests.engines.kept import Kept
from tests.engines.pool import RankPool
from tests.engines.runs import STEPS
from tests.engines.truth import Truth


class Rig(Protocol):
    """What a case's module offers. FURTHER: steps after the save; PRELOAD: as for `RankPool.attempt`."""

    FURTHER: int
    PRELOAD: tuple[str, ...]

    def build_engine(self, case: Any, section: dict[str, Any] | None = None) -> Any:
        """A fresh engine; with ``section`` (the config's "ucp") one of this project's."""

    def continue_training(self, engine: Any, case: Any, from_step: int, steps: int) -> list[float]:
        """Run ``steps`` optimizer steps; the losses, averaged over the global batch. Collective."""

    def gather(self, engine: Any) -> Truth | None:
        """The truth on rank 0; None on the others. Collective."""

    def client_state(self, case: Any) -> dict[str, Any]:
        """What is given to the save."""


class ParallelCase(Protocol):
    RIG: str

    @property
    def world_size(self) -> int: ...


def rig_of(case: ParallelCase) -> Rig:
    rig: Any = import_module(case.RIG)
    return rig


@dataclass(frozen=True, eq=False)
class ParallelRun:
    """A run: truths on rank 0 only. further: losses of the steps after the save (or the load)."""

    case: Any
    folder: str
    tag: str
    losses: tuple[float, ...]
    further: tuple[float, ...]
    truth: Truth | None
    truth_after: Truth | None
    client_state: Any = None


def train(case: Any, folder: str, section: dict[str, Any] | None = None, further: int | None = None) -> ParallelRun:
    """Train, save, train on. further: steps after the save, by default the rig's."""
    rig = rig_of(case)
    engine = rig.build_engine(case, section)
    losses = rig.continue_training(engine, case, 0, STEPS)
    truth = rig.gather(engine)
    tag = f"global_step{STEPS}"
    more = releases.saved_beside(engine.module) if section is None else {}
    engine.save_checkpoint(folder, tag, client_state=rig.client_state(case) | more)
    after = rig.continue_training(engine, case, STEPS, rig.FURTHER if further is None else further)
    if section is not None:
        engine.ucp.wait()
    return ParallelRun(case, folder, tag, tuple(losses), tuple(after), truth, rig.gather(engine))


def resume(case: Any, folder: str, section: dict[str, Any] | None = None, trained: int = 0) -> ParallelRun:
    """Load into a fresh engine, or one that has trained on other data, and train on."""
    rig = rig_of(case)
    engine = rig.build_engine(case, section)
    rig.continue_training(engine, case, 50, trained)
    path, client_state = engine.load_checkpoint(folder)
    if path is None:
        raise FileNotFoundError(f"nothing was loaded from {folder}")
    truth = rig.gather(engine)
    after = rig.continue_training(engine, case, STEPS, rig.FURTHER)
    return ParallelRun(case, folder, "", (), tuple(after), truth, rig.gather(engine), client_state)


class ParallelSources:
    """Runs of cases, each trained once and kept until the session ends. Treat the folders as read-only."""

    def __init__(self, pool: RankPool, root: Path) -> None:
        self.pool = pool
        self._runs = Kept(root)

    def get(self, case: Any, section: dict[str, Any] | None = None) -> ParallelRun:
        """The run of ``case`` as rank 0 knows it; with ``section`` one of this project's engine, which saves so."""

        def make(folder: str) -> ParallelRun:
            preload = rig_of(case).PRELOAD
            return self.pool.run(train, case, folder, section, world_size=case.world_size, preload=preload)[0]

        run: ParallelRun = self._runs.get((case, section), make)
        return run
