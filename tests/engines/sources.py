"""Engines that train and save: the sources of the tests' checkpoints, each with the truth about it."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from tests.engines.build import build_engine, build_model
from tests.engines.configs import OPERATORS, Case
from tests.engines.kept import Kept
from tests.engines.pool import RankPool
from tests.engines.resume import continue_training
from tests.engines.resume import resume as resume_native
from tests.engines.runs import CLIENT_STATE, FURTHER, STEPS, Run
from tests.engines.truth import gather

__all__ = [
    "CLIENT_STATE",
    "FURTHER",
    "STEPS",
    "Run",
    "Sources",
    "build_engine",
    "build_model",
    "preload_for",
    "resume_native",
    "train",
]


def train(case: Case, folder: str, tag: str | None = None, steps: int = STEPS, further: int = FURTHER) -> Run:
    """Train ``steps`` steps, save under ``tag`` ("global_step<steps>"), then train ``further`` steps. For ranks."""
    engine = build_engine(case)
    losses = continue_training(engine, case, 0, steps)
    tag = tag or f"global_step{steps}"
    truth = gather(engine)
    engine.save_checkpoint(folder, tag, client_state=dict(CLIENT_STATE))
    after = continue_training(engine, case, steps, further)
    truth_after = gather(engine) if further else truth
    return Run(case, folder, tag, steps, tuple(losses), tuple(after), truth, truth_after)


def preload_for(case: Case) -> tuple[str, ...]:
    """What the ranks of ``case`` need beforehand (``RankPool.attempt``'s ``preload``)."""
    needed = []
    if case.model == "llama":
        needed.append("transformers.models.llama.modeling_llama")
    if case.optimizer in OPERATORS:
        needed.append(f"operator:{OPERATORS[case.optimizer]}")
    return tuple(needed)


class Sources:
    """Checkpoints of cases, each made once and kept until the session ends. Treat the folders as read-only."""

    def __init__(self, pool: RankPool, root: Path) -> None:
        self.pool = pool
        self._runs = Kept(root)

    def get(self, case: Case, steps: int = STEPS, timeout: float = 120.0) -> Run:
        """The run of ``case``, with rank 0's knowledge, made now unless it was before."""

        def make(folder: str) -> Run:
            return self.pool.run(
                train, case, folder, steps=steps, world_size=case.dp, timeout=timeout, preload=preload_for(case)
            )[0]

        run: Run = self._runs.get((case, steps), make)
        return run

    def copy(self, case: Case, to: str | os.PathLike[str]) -> Run:
        """A copy of the run's folder at ``to``, for tests that damage it."""
        run = self.get(case)
        shutil.copytree(run.folder, to)
        return dataclasses.replace(run, folder=os.fspath(to))
