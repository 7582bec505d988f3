"""Jobs for ranks: a pipeline whose last step is one of plain SGD, so that the weights' change is its gradient; and
engines that load a repaired checkpoint whose filled layers are a param group of their own."""

from __future__ import annotations

import torch.distributed as dist

import ucp
import ucp.deepspeed
from tests.engines import pipe_runs
from tests.engines.configs import make_config
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


def in_groups(
    case: PipeCase, folder: str, spec: str, filled: tuple[str, ...]
) -> tuple[Truth | None, list[float], dict[str, float], list[float]]:
    """An engine of the plain module in whose second param group these parameters are, or in one group without them,
    that loads what was repaired and trains on: the truth after the load, each group's learning rate, each parameter's
    step count by what it saves then, and the losses."""
    model = pipe_runs.build_model(case)
    own = [parameter for name, parameter in model.named_parameters() if name.startswith(filled)] if filled else []
    rest = [parameter for parameter in model.parameters() if not any(parameter is one for one in own)]
    groups = [{"params": rest}, {"params": own}] if own else rest
    section = {"enabled": True, "spec": spec, "load": {"allow_approximate": True}}
    config = make_config(case.case) | {"ucp": section}
    engine, *_ = ucp.deepspeed.initialize(model=model, config=config, model_parameters=groups)
    engine.load_checkpoint(folder)
    truth = pipe_runs.gather(engine)
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    engine.save_checkpoint(f"{folder}-again")
    engine.ucp.wait()
    dist.barrier()
    with ucp.open(f"{folder}-again", allow_approximate=True) as again:
        steps = {name: float(info.scalars["step"]) for name, info in again.parameters.items() if info.scalars}
    return truth, rates, steps, pipe_runs.continue_training(engine, case, 3, 3)
