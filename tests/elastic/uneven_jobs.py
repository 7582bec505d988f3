"""A job on the ranks: steps of one global batch, divided as the config says, by an engine of the plugin."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

BATCH, FEATURES, STEPS = 10, 7, 3


def steps(folder: str, seen_before: int = 0) -> tuple[list[float], dict[str, torch.Tensor], list[list[int]], int]:
    """Go on from the folder's checkpoint for some steps, and save; the losses of all ranks, the weights, this rank's
    samples by step, and how many the engine counts."""
    import ucp.deepspeed

    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    config = {
        "train_batch_size": BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000,
        "ucp": {"enabled": True, "elastic": {"micro": [1, 2], "uneven": True}},
    }
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(FEATURES, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
    engine, *_ = ucp.deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    engine.load_checkpoint(folder)
    assert engine.ucp.samples_seen == seen_before
    how = engine.ucp.fitted
    order = ucp.deepspeed.GlobalBatches(
        64, how.counts, rank=dist.get_rank(), seen=engine.ucp.samples_seen, seed=3, shuffle=True
    )
    batches = iter(order)
    losses, drawn = [], []
    for _ in range(STEPS):
        total, numbers = torch.zeros((), dtype=torch.float64), []
        for _ in range(how.accumulation):
            chosen = next(batches)
            x = torch.stack([torch.randn(FEATURES, generator=torch.Generator().manual_seed(n)) for n in chosen])
            loss = (engine(x).squeeze(-1) - x.sum(-1)).square().mean() * how.weight(len(chosen))
            engine.backward(loss)
            engine.step()
            total += loss.detach().double()
            numbers += chosen
        dist.all_reduce(total)
        losses.append(total.item() / (how.dp * how.accumulation))
        drawn.append(numbers)
    engine.save_checkpoint(folder)
    engine.ucp.wait()
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return losses, weights, drawn, engine.ucp.samples_seen


def per_sample(with_dropout: bool, rng: str) -> list[float]:
    """What an engine's generator for a sample draws."""
    import ucp.deepspeed

    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    elastic = {"rng": rng, "seed": 5}
    config = {
        "train_batch_size": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
        "ucp": {"enabled": True, "elastic": elastic},
    }
    drop = torch.nn.Dropout(0.1) if with_dropout else torch.nn.Dropout(0.0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(FEATURES, 1), drop)
    engine, *_ = ucp.deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    return torch.rand(3, generator=engine.ucp.generator(7, "crop")).tolist()
