"""A job for a rank: engines that resume with other hyperparameters on purpose, and what the load's report says."""

from __future__ import annotations

from typing import Any

from tests.engines.build import build_engine
from tests.engines.configs import Case
from tests.engines.resume import continue_training
from ucp.errors import UcpError

SCHEDULER = {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 1e-2, "warmup_type": "linear"}}


def resume(folder: str) -> tuple[list[Any], list[str]]:
    """Save an engine with a scheduler; for each way to load it again the groups' hyperparameters, the scheduler's step
    and the report's changes, then what is refused."""
    case = Case(stage=1, dp=1)

    def engine(load: dict[str, Any], scheduled: bool = True) -> Any:
        extra: dict[str, Any] = {"ucp": {"enabled": True, "load": load}}
        if scheduled:
            extra["scheduler"] = SCHEDULER
        return build_engine(case, "ucp.deepspeed:initialize", extra)

    first = engine({})
    continue_training(first, case, 0, 3)
    first.save_checkpoint(folder)
    first.ucp.wait()
    found: list[Any] = []
    for load, scheduled in (
        ({}, True),
        ({"override": {"weight_decay": 0.3}, "lr_scheduler": "reset"}, True),
        ({"override": {"lr": 5e-4}}, False),
    ):
        again = engine(load, scheduled)
        again.load_checkpoint(folder)
        group = again.optimizer.param_groups[0]
        step = again.lr_scheduler.last_batch_iteration if scheduled else None
        found.append((group["lr"], group["weight_decay"], step, again.ucp.last_load.changes, str(again.ucp.last_load)))
    refused = []
    for load, scheduled in (({"override": {"lr": 1.0}}, True), ({"override": {"colour": 1.0}}, False)):
        try:
            engine(load, scheduled).load_checkpoint(folder)
        except UcpError as error:
            refused.append(error.whole)
    return found, refused
