"""Training a live engine from a given step on, on the batches that an uninterrupted run would see."""

from __future__ import annotations

from typing import Any

import torch

from tests.engines import models
from tests.engines.build import build_engine
from tests.engines.configs import Case
from tests.engines.runs import CLIENT_STATE, FURTHER, Run
from tests.engines.truth import gather


def continue_training(engine: Any, case: Case, from_step: int, steps: int, tp: int = 1) -> list[float]:
    """Run ``steps`` optimizer steps; the losses, averaged over all ranks (the same numbers on each). Collective.

    tp: so many neighbouring ranks get the same batches."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank() // tp, dist.get_world_size() // tp
    losses = []
    for step in range(from_step, from_step + steps):
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        for micro in range(case.accumulation):
            tokens, labels = models.batch(case.model, step * case.accumulation + micro, rank, world_size)
            tokens, labels = tokens.to(engine.device), labels.to(engine.device)
            loss = models.loss(case.model, engine, tokens, labels)
            engine.backward(loss)
            engine.step()
            total += loss.detach().double()
        dist.all_reduce(total)
        losses.append(total.item() / (dist.get_world_size() * case.accumulation))
    return losses


def resume(
    case: Case,
    folder: str,
    tag: str | None,
    steps: int,
    further: int = FURTHER,
    *,
    initialize: str = "deepspeed:initialize",
    extra: dict[str, Any] | None = None,
    before: int = 0,
    load: dict[str, Any] | None = None,
    client_state: dict[str, Any] = CLIENT_STATE,
) -> Run:
    """Load a checkpoint into an engine of ``case``, then train on from ``steps``. A job for ranks.

    ``initialize`` and ``extra`` as for ``build_engine``: DeepSpeed alone by default. ``before`` steps are trained
    first, on other batches, so that the load meets used state. ``load`` are further arguments of
    ``load_checkpoint``; ``client_state`` is what it must return, at least. Raises FileNotFoundError where nothing was
    loaded, ValueError where the client state is wrong.
    """
    engine = build_engine(case, initialize, extra)
    if before:
        continue_training(engine, case, 1000, before)
    path, found = engine.load_checkpoint(folder, tag, **(load or {}))
    if path is None:
        raise FileNotFoundError(f"nothing was loaded from {folder}")
    for key, value in client_state.items():
        if found.get(key) != value:
            raise ValueError(f"client state {key!r}: {found.get(key)!r} instead of {value!r}")
    truth = gather(engine)
    after = continue_training(engine, case, steps, further)
    return Run(case, folder, tag or "", steps, (), tuple(after), truth, gather(engine) if further else truth)
