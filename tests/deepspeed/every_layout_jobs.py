"""Jobs for ranks: one small model under every kind of parallelism, by the rig of pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed

from tests.engines import pipe_runs, sequences
from tests.engines.configs import make_config
from tests.engines.parallel_runs import ParallelRun
from tests.engines.pipe_runs import PipeCase
from tests.engines.pipe_truth import gather
from tests.engines.runs import STEPS
from tests.engines.truth import Truth


def build_engine(pipe: PipeCase, sp: int, section: dict[str, Any] | None) -> Any:
    """As of the rig; with ``sp`` ranks of sequence parallelism (Ulysses), all with the whole sequence."""
    if sp == 1:
        return pipe_runs.build_engine(pipe, section)
    import ucp.deepspeed

    mesh = sequences.mesh(sp, stock=section is None)
    model = pipe_runs.build_model(pipe)
    config = make_config(pipe.case) | ({} if section is None else {"ucp": {"enabled": True, **section}})
    initialize = deepspeed.initialize if section is None else ucp.deepspeed.initialize
    engine, *_ = initialize(model=model, config=config, mpu=mesh, model_parameters=list(model.parameters()))
    return engine


def train_sequence_parallel(pipe: PipeCase, sp: int, folder: str) -> ParallelRun:
    """Train and save with DeepSpeed's own save."""
    engine = build_engine(pipe, sp, None)
    losses = pipe_runs.continue_training(engine, pipe, 0, STEPS)
    truth = gather(engine)
    engine.save_checkpoint(folder)
    return ParallelRun(pipe, folder, "", tuple(losses), (), truth, None)


def load_each(pipe: PipeCase, sp: int, folders: Sequence[str], section: dict[str, Any]) -> list[Truth | None]:
    """What one engine holds after each of these loads (rank 0)."""
    engine = build_engine(pipe, sp, section)
    out = []
    for folder in folders:
        engine.load_checkpoint(folder)
        out.append(gather(engine))
    return out
