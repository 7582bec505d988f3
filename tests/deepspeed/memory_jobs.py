"""Jobs for ranks: what a load takes in memory, of the host and of a device, beyond what is live after it."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tests.loading.memory_program import anonymous

WIDTH, LAYERS = 1536, 8
"""19M weights: 75 MB in fp32, and twice as much of Adam's states."""
MEMORY = 64 << 20
WAYS = ("zero1", "zero3", "fsdp")


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def _engine(stage: int, device: str = "cpu") -> Any:
    import ucp.deepspeed

    model = _model().to(device)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "ucp": {"enabled": True, "save": {"async": False}, "load": {"memory": MEMORY}},
    }
    return ucp.deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def make(folder: str, device: str = "cpu") -> None:
    engine = _engine(1, device)
    engine.backward(engine(torch.ones(1, WIDTH, device=device)).sum())
    engine.step()
    engine.save_checkpoint(folder)


@dataclass(frozen=True)
class Took:
    """Of one rank, in bytes: its peak of anonymous memory and what was left of it, both beyond what there was before;
    the same of its device. states: what the optimizer has that it had not before."""

    strategy: str
    peak: int
    left: int
    device_peak: int
    device_left: int
    states: int


def load(folder: str, way: str, device: str = "cpu") -> Took:
    """Into a new optimizer, which has no states yet."""
    if way == "fsdp":
        fill, optimizer = _fsdp(folder, device)
    else:
        engine = _engine(int(way[-1]), device)
        optimizer = engine.optimizer.optimizer

        def fill() -> Any:
            engine.load_checkpoint(folder)
            return engine.ucp.last_load

    before = peak = anonymous()
    on_device = _on_device(device, anew=True)
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.001):
            peak = max(peak, anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    report = fill()
    over.set()
    watching.join()
    left = anonymous() - before
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    states = sum(getattr(value, "_local_tensor", value).nbytes for value in held)
    device_peak = torch.cuda.max_memory_allocated() - on_device if device == "cuda" else 0
    return Took(report.strategy, peak - before, left, device_peak, _on_device(device) - on_device, states)


def _on_device(device: str, anew: bool = False) -> int:
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    if anew:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _fsdp(folder: str, device: str) -> tuple[Any, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import ucp

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    model = _model().to(device)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    path = os.path.join(folder, "global_step1")

    def fill() -> Any:
        return ucp.load_training(path, model=model, optimizer=optimizer, rng=False, memory=MEMORY).tensors

    return fill, optimizer
