"""A job for a rank: models whose layers are alike, registered and optimized in one order and another."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Alike(nn.Module):
    """Three layers of one shape that are registered in this order and computed in that of their names."""

    def __init__(self, order: str) -> None:
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in "abc":
            x = torch.tanh(getattr(self, name)(x))
        return x


def resumed(stage: int, dtype: str, folder: str) -> dict[str, tuple[list[float], str]]:
    """How losses go on after a stock save of the plain model, by what has changed since; and the error, if there is
    one; '': without a load. 'sorted': of an optimizer made of the names in alphabetical order, on both sides."""
    from ucp.errors import UcpError

    out = {}
    for optimized in ("", "sorted"):
        running = _engine(stage, dtype, "abc", optimized, seed=1, bound=False)
        _train(running, range(3))
        running.save_checkpoint(f"{folder}/{optimized or 'plain'}", "t")
        out[optimized] = _train(running, range(3, 6)), ""
    tries = {"same": ("abc", "", "plain"), "registered otherwise": ("bac", "", "plain")}
    tries |= {"sorted on both sides": ("abc", "sorted", "sorted"), "sorted before": ("abc", "", "sorted")}
    for what, (order, optimized, saved) in tries.items():
        engine = _engine(stage, dtype, order, optimized, seed=2, bound=True)
        try:
            engine.load_checkpoint(f"{folder}/{saved}", "t")
        except UcpError as error:
            out[what] = [], error.whole
        else:
            out[what] = _train(engine, range(3, 6)), ""
    return out


def _engine(stage: int, dtype: str, order: str, optimized: str, *, seed: int, bound: bool) -> Any:
    import deepspeed

    import ucp.deepspeed

    torch.manual_seed(seed)
    module = Alike(order)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "steps_per_print": 10**6,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if bound:
        config["ucp"] = {"enabled": True}
    named = module.named_parameters()
    parameters = [p for _, p in (sorted(named) if optimized else named)]
    initialize = ucp.deepspeed.initialize if bound else deepspeed.initialize
    return initialize(model=module, model_parameters=parameters, config=config)[0]


def _train(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(4, 6, generator=generator) for _ in range(2))
        loss = (engine(x.to(next(engine.parameters()).dtype)) - y).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses
