"""A job for ranks: a pipeline whose last step is one of plain SGD, so that the weights' change is its gradient."""

from __future__ import annotations

from tests.engines import pipe_runs
from tests.engines.pipe_runs import PipeCase
from tests.engines.truth import Truth


def step_and_save(case: PipeCase, folder: str) -> tuple[Truth | None, Truth | None]:
    """The truth before and after the last step ahead of the save (on rank 0)."""
    engine = pipe_runs.build_engine(case, {"save": {"gradient_norms": 3, "async": False}})
    pipe_runs.continue_training(engine, case, 0, 2)
    before = pipe_runs.gather(engine)
    pipe_runs.continue_training(engine, case, 2, 1)
    after = pipe_runs.gather(engine)
    engine.save_checkpoint(folder, "last", client_state={"mine": 1})
    return before, after
