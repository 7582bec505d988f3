"""A job for a rank: engines with optimizers that other packages bring, saved and resumed."""

from __future__ import annotations

from typing import Any

import prodigyopt
import pytorch_optimizer  # here, so that ranks are forked from a process that has it
import torch
from torch import nn

STEPS, FURTHER = range(3), range(3, 6)


def resumed(name: str, stage: int, folder: str) -> dict[str, tuple[list[float], str]]:
    """How losses go on after each way of saving and loading, and the error where there is one; '': without any."""
    import ucp
    from ucp.errors import UcpError

    ours, theirs = f"{folder}/ours", f"{folder}/theirs"
    running = _engine(name, stage, seed=1, bound=True)
    _train(running, STEPS)
    running.save_checkpoint(ours, "t")
    running.ucp.wait()
    out = {"": (_train(running, FURTHER), "")}
    stock = _engine(name, stage, seed=1, bound=False)
    _train(stock, STEPS)
    stock.save_checkpoint(theirs, "t")
    for way, source, bound in (("ours", ours, True), ("theirs", theirs, True), ("converted", f"{folder}/made", False)):
        engine = _engine(name, stage, seed=2, bound=bound)
        try:
            if way == "converted":
                ucp.convert(ours, source, to="deepspeed", layout=f"dp=1,zero={stage}")
            engine.load_checkpoint(source)
        except UcpError as error:
            out[way] = [], error.whole
        else:
            out[way] = _train(engine, FURTHER), ""
    return out


def _engine(name: str, stage: int, *, seed: int, bound: bool) -> Any:
    import deepspeed

    import ucp.deepspeed

    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = getattr(prodigyopt if name == "Prodigy" else pytorch_optimizer, name)(module.parameters())
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**6,
    }
    if bound:
        config["ucp"] = {"enabled": True}
    initialize = ucp.deepspeed.initialize if bound else deepspeed.initialize
    return initialize(model=module, optimizer=optimizer, config=config)[0]


def _train(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        loss = (engine(torch.randn(4, 6, generator=generator)) - torch.randn(4, 3, generator=generator)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses
