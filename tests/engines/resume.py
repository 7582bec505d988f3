"""Training a live engine from a given step on, on the batches that an uninterrupted run would see."""

from __future__ import annotations

from typing import Any

import torch

from tests.engines import models
from tests.engines.configs import Case


def continue_training(engine: Any, case: Case, from_step: int, steps: int) -> list[float]:
    """Run ``steps`` optimizer steps; the losses, averaged over all ranks (the same number on each). Collective."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(from_step, from_step + steps):
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(case.accumulation):
            tokens, labels = models.batch(case.model, step * case.accumulation + micro, rank, world_size)
            loss = models.loss(case.model, engine, tokens, labels)
            engine.backward(loss)
            engine.step()
            total += loss.detach().double()
        dist.all_reduce(total)
        losses.append(total.item() / (world_size * case.accumulation))
    return losses
