"""Engines that train and save: the sources of the tests' checkpoints, each with the truth about it.

``train``, ``resume_native`` and the like run on the ranks (``RankPool.run(train, case, folder, world_size=case.dp)``);
``Sources`` runs them once per case and session.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.engines import models
from tests.engines.configs import OPERATORS, OPTIMIZERS, Case, make_config, parameter_groups
from tests.engines.lion import Lion
from tests.engines.pool import RankPool
from tests.engines.resume import continue_training
from tests.engines.truth import Truth, gather

STEPS = 3  # before the save
FURTHER = 2  # steps of the same run after the save: what an exact resume must reproduce
CLIENT_STATE = {"note": "from the client", "numbers": [1, 2.5, None], "nested": {"epoch": 4}}


@dataclass(frozen=True)
class Run:
    """What a training run left: on rank 0 everything; the other ranks know the losses only."""

    case: Case
    folder: str
    tag: str
    steps: int
    losses: tuple[float, ...]  # of the steps before the save
    further: tuple[float, ...]  # of the steps after it
    truth: Truth | None  # at the save
    truth_after: Truth | None  # after the further steps


def build_model(case: Case) -> torch.nn.Module:
    """The module that ``case`` trains, before DeepSpeed sees it."""

    def build() -> torch.nn.Module:
        model = models.build(
            case.model, seed=case.seed, frozen=case.frozen, tied=case.tied, buffers=case.buffers, cube=case.cube
        )
        return models.Wrapped(model) if case.wrapped else model

    if case.zero_init:
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=make_config(case)):
            return build()
    return build()


def build_engine(case: Case, initialize: Any = None, extra: dict[str, Any] | None = None) -> Any:
    """A fresh engine. ``initialize`` stands in for ``deepspeed.initialize``; ``extra`` is merged into the config."""
    import deepspeed

    model = build_model(case)
    groups = parameter_groups(case, model)
    parameters = groups[0]["params"] if case.groups == 1 else groups
    arguments: dict[str, Any] = {"model": model, "config": make_config(case) | (extra or {})}
    if case.optimizer == "lion_reference":
        arguments["optimizer"] = Lion(parameters, **OPTIMIZERS[case.optimizer][1])
    else:
        arguments["model_parameters"] = parameters
    engine, *_ = (initialize or deepspeed.initialize)(**arguments)
    return engine


def train(case: Case, folder: str, tag: str | None = None, steps: int = STEPS, further: int = FURTHER) -> Run:
    """Train ``steps`` steps, save under ``tag`` ("global_step<steps>"), then train ``further`` steps. On a rank."""
    engine = build_engine(case)
    losses = continue_training(engine, case, 0, steps)
    tag = tag or f"global_step{steps}"
    truth = gather(engine)
    engine.save_checkpoint(folder, tag, client_state=dict(CLIENT_STATE))
    after = continue_training(engine, case, steps, further)
    truth_after = gather(engine) if further else truth
    return Run(case, folder, tag, steps, tuple(losses), tuple(after), truth, truth_after)


def resume_native(case: Case, folder: str, tag: str | None, steps: int, further: int = FURTHER) -> Run:
    """Load a checkpoint into a fresh engine with DeepSpeed's own loader, then train on. On a rank."""
    engine = build_engine(case)
    path, client_state = engine.load_checkpoint(folder, tag)
    if path is None:
        raise FileNotFoundError(f"DeepSpeed found nothing to load in {folder}")
    for key, value in CLIENT_STATE.items():
        if client_state.get(key) != value:
            raise ValueError(f"client state {key!r}: {client_state.get(key)!r} instead of {value!r}")
    truth = gather(engine)
    after = continue_training(engine, case, steps, further)
    return Run(case, folder, tag or "", steps, (), tuple(after), truth, gather(engine) if further else truth)


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

    def __init__(self, pool: RankPool, root: str | os.PathLike[str] | None = None) -> None:
        self.pool = pool
        self._root = Path(root if root is not None else tempfile.mkdtemp(prefix="sources-"))
        self._runs: dict[tuple[Case, int], Run] = {}

    def get(self, case: Case, steps: int = STEPS, timeout: float = 120.0) -> Run:
        """The run of ``case``, with rank 0's knowledge, made now unless it was before."""
        key = (case, steps)
        if key not in self._runs:
            folder = str(self._root / f"{len(self._runs):03d}")
            runs = self.pool.run(
                train, case, folder, steps=steps, world_size=case.dp, timeout=timeout, preload=preload_for(case)
            )
            self._runs[key] = runs[0]
        return self._runs[key]

    def copy(self, case: Case, to: str | os.PathLike[str]) -> Run:
        """A copy of the run's folder at ``to``, for tests that damage it."""
        run = self.get(case)
        shutil.copytree(run.folder, to)
        return Run(run.case, os.fspath(to), *(getattr(run, name) for name in list(Run.__dataclass_fields__)[2:]))

    def close(self) -> None:
        """Remove all folders."""
        shutil.rmtree(self._root, ignore_errors=True)
