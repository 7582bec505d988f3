"""Jobs for the ranks: engines whose optimizers keep states of other shapes than the weights', and plain programs."""

from __future__ import annotations

from typing import Any

import pytorch_optimizer  # here, so that ranks are forked from a process that has it
import torch
import torch.distributed as dist
from torch import nn
from transformers.optimization import Adafactor

from tests.engines.eight_bits import EightBits

STEPS, FURTHER = range(3), range(3, 6)


def optimizer_of(name: str, module: nn.Module) -> torch.optim.Optimizer:
    params = list(module.parameters())
    if name == "transformers' Adafactor":
        return Adafactor(params)
    if name in ("Shampoo", "SOAP", "CAME"):
        made: torch.optim.Optimizer = getattr(pytorch_optimizer, name)(params)
        return made
    if name == "EightBits":
        return EightBits(params)
    if name == "AdamW8bit":
        import bitsandbytes

        of_eight_bits: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(params, lr=1e-2, min_8bit_size=1)
        return of_eight_bits
    kind: type[torch.optim.Optimizer] = getattr(torch.optim, name)
    return kind(params, lr=1e-2)  # type: ignore[call-arg]


def model(name: str, seed: int, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    bias = name != "Muon"  # which takes matrices alone
    return nn.Sequential(
        nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 8, bias=bias), nn.Tanh(), nn.Linear(8, outputs, bias=bias)
    )


def engine(name: str, stage: int, dtype: str, seed: int, stock: bool = False, changes: Any = None) -> Any:
    import deepspeed

    import ucp.deepspeed

    module = model(name, seed, outputs=3 if dtype == "fp32" else 1)  # of one row, factors have one element
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8 // dist.get_world_size(),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**6,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if not stock:
        config["ucp"] = {"enabled": True, "load": {"prove": "always", **({"changes": changes} if changes else {})}}
    initialize = deepspeed.initialize if stock else ucp.deepspeed.initialize
    return initialize(model=module, optimizer=optimizer_of(name, module), config=config)[0]


def train(engine: Any, dtype: str, steps: range) -> list[float]:
    losses = []
    world, rank = dist.get_world_size(), dist.get_rank()
    for step in steps:
        data = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        own = data[rank * 8 // world : (rank + 1) * 8 // world].to(
            getattr(torch, dtype.replace("fp32", "float32").replace("bf16", "bfloat16"))
        )
        loss = engine(own).float().square().mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / world)
    return losses


def held(engine: Any) -> dict[str, torch.Tensor]:
    """The optimizer's states as they lie in it, by parameter and flat name. At stage 0 they are whole."""
    out: dict[str, torch.Tensor] = {}
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    masters = [p for group in inner.param_groups for p in group["params"]]
    names = [name for name, _ in engine.module.named_parameters()]
    for name, master in zip(names, masters, strict=True):
        for key, value in inner.state[master].items():
            for i, one in enumerate(value) if isinstance(value, list) else ((None, value),):
                if isinstance(one, torch.Tensor) and one.dim():
                    out[f"{name}:{key}" if i is None else f"{name}:{key}.{i}"] = one.detach().clone()
    return out


def saved(name: str, stage: int, dtype: str, folder: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Save in our format and as DeepSpeed does, and train on."""
    running, stock = engine(name, stage, dtype, 1), engine(name, stage, dtype, 1, stock=True)
    for one, place in ((running, "ours"), (stock, "theirs")):
        train(one, dtype, STEPS)
        one.save_checkpoint(f"{folder}/{place}", "t")
    running.ucp.wait()
    return held(running) if stage == 0 else {}, train(running, dtype, FURTHER)


def resumed(name: str, stage: int, dtype: str, source: str, stock: bool = False, changes: Any = None) -> Any:
    """What an engine that has not stepped gets, and its losses; or the refusal and whether it left the engine alone."""
    from ucp.errors import UcpError

    fresh = engine(name, stage, dtype, 2, stock, changes)
    try:
        fresh.load_checkpoint(source)
    except UcpError as error:
        inner = getattr(fresh.optimizer, "optimizer", fresh.optimizer)
        return f"{type(error).__name__}: {error}", not any(inner.state.values())
    return held(fresh) if stage == 0 else {}, train(fresh, dtype, FURTHER)


def plain(name: str, source: str, folder: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """A program without DeepSpeed goes on from an engine's checkpoint, and saves one."""
    import ucp

    module = model(name, 3)
    optimizer = optimizer_of(name, module)
    ucp.load_training(source, model=module, optimizer=optimizer, rng=False)
    out: dict[str, torch.Tensor] = {}
    for key, p in module.named_parameters():
        for state, value in optimizer.state[p].items():
            for i, one in enumerate(value) if isinstance(value, list) else ((None, value),):
                if isinstance(one, torch.Tensor) and one.dim():
                    out[f"{key}:{state}" if i is None else f"{key}:{state}.{i}"] = one.detach().clone()
    ucp.save_training(folder, model=module, optimizer=optimizer, step=3)
    losses = []
    for step in FURTHER:
        data = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        loss = module(data).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return out, losses
