"""Runs of engines that draw their data by `GlobalOrder`, from where `engine.ucp.samples_seen` says that it stands."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

import ucp.deepspeed
from tests.engines import moe, pipe_runs, releases, tp_runs
from tests.engines.models import GLOBAL_BATCH
from tests.engines.moe import MoeCase
from tests.engines.pipe_runs import PipeCase
from tests.engines.resume import continue_training
from tests.engines.tp_runs import TpCase

LENGTH = 1000


@dataclass(frozen=True)
class Drawn:
    """Of one rank. seen: by ``samples_seen`` (DeepSpeed's count, of a stock engine), at the start and at the end;
    numbers: its samples, in the order of the data set; part: its data-parallel rank. warnings: of the load."""

    seen: tuple[int, int]
    numbers: tuple[int, ...]
    part: int
    warnings: tuple[str, ...]


def run(case: TpCase | PipeCase | MoeCase, folder: str, steps: int, load: bool, stock: bool = False) -> Drawn:
    """Load, if there is something, train some steps, save. stock: by DeepSpeed alone."""
    section = None if stock else {"save": {"async": False}}
    module: Any = tp_runs if isinstance(case, TpCase) else pipe_runs
    if isinstance(case, MoeCase):
        how = ("deepspeed:initialize",) if stock else (moe.INITIALIZE, {"ucp": {"enabled": True, **(section or {})}})
        engine = moe.build_engine(case, *how)
    else:
        engine = module.build_engine(case, section)
    warnings: list[str] = []
    if load:
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("ucp").addHandler(handler)
        engine.load_checkpoint(folder)

    def seen() -> int:
        return int(engine.global_samples if stock else engine.ucp.samples_seen)

    begun = seen()
    sp = case.sp if isinstance(case, TpCase) else 1
    part = dist.get_rank(engine.seq_data_parallel_group) // sp
    if not stock and (engine.ucp.data_rank, engine.ucp.data_world) != (part, case.case.dp):
        raise AssertionError(f"data rank {engine.ucp.data_rank} of {engine.ucp.data_world}")
    micro = GLOBAL_BATCH // case.case.dp
    order = iter(
        ucp.deepspeed.GlobalOrder(LENGTH, micro, rank=part, world=case.case.dp, seen=begun, seed=1, shuffle=False)
    )
    numbers = [next(order) for _ in range(steps * case.case.accumulation * micro)]
    if isinstance(case, MoeCase):
        continue_training(engine, case.case, 0, steps)
    else:
        module.continue_training(engine, case, 0, steps)
    beside = releases.saved_beside(engine.module) if stock else {}
    engine.save_checkpoint(folder, f"global_step{engine.global_steps}", client_state=beside)
    return Drawn((begun, seen()), tuple(numbers), part, tuple(warnings))
