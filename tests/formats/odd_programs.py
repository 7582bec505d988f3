"""Jobs for ranks: runs of the odd model that other libraries save and resume, each by its own means.

Every run takes the same steps on the same batches. It returns what it held when it was saved, and the losses of the
steps that a second run takes after the library's own resume.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.engines import models
from tests.engines.build import build_engine
from tests.engines.configs import OPTIMIZERS, Case, parameter_groups
from tests.engines.fsdp import STEPS, Live, Mesh, State, state_of
from tests.engines.resume import continue_training
from tests.formats.foreign_jobs import FURTHER, Run, accelerate_saves, torch_checkpointing_saves

MESH = Mesh(dp=2)
ZERO1 = Case(groups=2, config=(("gradient_clipping", 0.0),))
TITAN = (
    "torchtitan.components.checkpointer.dcp",
    "torchtitan.components.optimizer",
    "torchtitan.components.dataloader",
)


def all_of_them(folder: str) -> dict[str, tuple[str, Run]]:
    """What each library has left, by name: where it lies, and what it was. For two ranks."""
    place = Path(folder)
    accelerate = accelerate_saves(f"{folder}/accelerate", MESH)
    return {
        **{f"accelerate-{form}": (f"{folder}/accelerate/{form}", accelerate) for form in ("dcp", "ranks", "full")},
        "torch-checkpointing": (
            f"{folder}/torch_checkpointing/told",
            torch_checkpointing_saves(f"{folder}/torch_checkpointing", MESH),
        ),
        "torchtitan": (f"{folder}/titan/checkpoint/step-{STEPS}", torchtitan(place / "titan")),
        "dcp-numbers": (f"{folder}/numbers", numbers(place / "numbers")),
        "file": (f"{folder}/run.pt", one_file(place / "run.pt")),
        "deepspeed-universal": (f"{folder}/universal/{UNIVERSAL}", universal(place / "universal")),
    }


def torchtitan(folder: Path) -> Run:
    """torchtitan's checkpoint manager, with its optimizers, schedulers and data loader."""
    live, manager = _titan(folder, MESH)
    live.train(0, STEPS, scheduler=True)
    assert manager.save(STEPS)
    held = _titan_state(live)
    again, manager = _titan(folder, Mesh(dp=2, seed=9))
    again.train(0, 1, scheduler=True)
    assert manager.load()
    return Run(held, tuple(again.train(STEPS, FURTHER, scheduler=True)))


def _titan(folder: Path, mesh: Mesh) -> tuple[Live, Any]:
    from torch.utils.data import IterableDataset
    from torchtitan.components.checkpointer.dcp import CheckpointManager
    from torchtitan.components.dataloader import ParallelAwareDataloader
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.components.optimizer.optimizer import ParamGroupConfig

    class Words(IterableDataset[int]):
        def __init__(self) -> None:
            self.at = 0

        def __iter__(self) -> Iterator[int]:
            while True:
                self.at += 1
                yield self.at

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    class TrainState:
        """What torchtitan's Trainer keeps of itself."""

        step = STEPS

        def state_dict(self) -> dict[str, int]:
            return {"step": self.step, "ntokens_seen": 60 * self.step}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.step = state["step"]

    live: Any = Live(mesh)
    options = {k: v for k, v in OPTIMIZERS["adamw"][1].items() if k != "torch_adam"} | {"betas": (0.9, 0.98)}
    plain = {**options, "weight_decay": 0.0}
    config = OptimizersContainer.Config(
        implementation="for-loop",
        param_groups=[
            ParamGroupConfig(pattern="bias|gain|norm|shift", optimizer_name="AdamW", optimizer_kwargs=plain),
            ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=options),
        ],
    )
    live.optimizer = OptimizersContainer(config, model_parts=[live.model])
    live.scheduler = titan_scheduler(live.optimizer)
    loader = ParallelAwareDataloader(Words(), dist.get_rank(), dist.get_world_size(), batch_size=4)
    next(iter(loader))
    manager = CheckpointManager(
        CheckpointManager.Config(enable=True, interval=1),
        dataloader=loader,
        model_parts=[live.model],
        optimizers=live.optimizer,
        lr_schedulers=live.scheduler,
        states={"train_state": TrainState()},
        sd_adapter=None,
        base_folder=str(folder),
    )
    return live, manager


def titan_scheduler(optimizers: Any) -> Any:
    """torchtitan's schedulers over its optimizers, or over one of torch's."""
    from torchtitan.components.optimizer import LRSchedulersContainer

    several = optimizers if hasattr(optimizers, "optimizers") else [optimizers]
    return LRSchedulersContainer(several, lambda step: math.pow(0.9, step))


def _titan_state(live: Any) -> State:
    (optimizer,) = live.optimizer.optimizers
    return state_of(live.model, optimizer, live.full)


def numbers(folder: Path) -> Run:
    """DCP of what module and optimizer themselves call their state: the optimizer's has numbers for names."""
    import torch.distributed.checkpoint as dcp

    live = Live(MESH)
    live.train(0, STEPS, scheduler=True)
    dcp.save(_by_numbers(live), checkpoint_id=str(folder))
    held = live.state()
    again = Live(Mesh(dp=2, seed=9))
    again.train(0, 1)
    loaded = _by_numbers(again)
    dcp.load(loaded, checkpoint_id=str(folder))
    again.model.load_state_dict(loaded["model"])
    again.optimizer.load_state_dict(loaded["optimizer"])
    again.scheduler.load_state_dict(loaded["lr_scheduler"])
    return Run(held, tuple(again.train(STEPS, FURTHER, scheduler=True)))


def _by_numbers(live: Live) -> dict[str, Any]:
    return {
        "model": live.model.state_dict(),
        "optimizer": live.optimizer.state_dict(),
        "lr_scheduler": live.scheduler.state_dict(),
        "step": STEPS,
    }


def one_file(path: Path) -> Run:
    """A program of torch alone, under DistributedDataParallel, whose first rank saves one file."""
    run = Replicated(0)
    run.train(0, STEPS)
    if dist.get_rank() == 0:
        torch.save(run.saved(), path)
    dist.barrier()
    held = state_of(run.model, run.optimizer)
    again = Replicated(9)
    again.train(0, 1)
    loaded = torch.load(path)
    again.model.load_state_dict(loaded["model"])
    again.optimizer.load_state_dict(loaded["optimizer"])
    again.scheduler.load_state_dict(loaded["scheduler"])
    return Run(held, tuple(again.train(STEPS, FURTHER)))


class Replicated:
    """The odd model under DistributedDataParallel."""

    def __init__(self, seed: int) -> None:
        self.model = models.build("odd", seed=seed)
        self.wrapped = nn.parallel.DistributedDataParallel(self.model)
        options = {k: v for k, v in OPTIMIZERS["adamw"][1].items() if k != "torch_adam"} | {"betas": (0.9, 0.98)}
        self.optimizer = torch.optim.AdamW(parameter_groups(ZERO1, self.model), **options, foreach=False)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)

    def saved(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": STEPS,
            "best": 0.5,
        }

    def train(self, first: int, count: int) -> list[float]:
        losses = []
        for step in range(first, first + count):
            tokens, labels = models.batch("odd", step, dist.get_rank(), dist.get_world_size())
            loss = models.loss("odd", self.wrapped, tokens, labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            total = loss.detach().double().clone()
            dist.all_reduce(total)
            losses.append(total.item() / dist.get_world_size())
        return losses


UNIVERSAL = "global_step3_universal"


def universal(folder: Path) -> Run:
    """DeepSpeed's own converter, and its own resume with ``load_universal``. That leaves buffers as they are
    (engine.py: ``_load_checkpoint``), so they are brought by hand."""
    from deepspeed.checkpoint.ds_to_universal import main

    engine = _engine(ZERO1)
    continue_training(engine, ZERO1, 0, STEPS)
    held = state_of_engine(engine)
    buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    engine.save_checkpoint(str(folder), f"global_step{STEPS}")
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / UNIVERSAL).mkdir()
        arguments = {
            "input_folder": str(folder / f"global_step{STEPS}"),
            "output_folder": str(folder / UNIVERSAL),
            "num_extract_workers": 1,
            "num_merge_workers": 1,
            "keep_temp_folder": False,
            "strict": True,
            "inject_missing_state": True,
        }
        main(argparse.Namespace(**arguments))
    dist.barrier()
    again = _engine(ZERO1.but(seed=9), {"checkpoint": {"load_universal": True}})
    again.load_checkpoint(str(folder), UNIVERSAL)
    for name, buffer in again.module.named_buffers():
        buffer.copy_(buffers[name])
    return Run(held, tuple(continue_training(again, ZERO1, STEPS, FURTHER)))


def _engine(case: Case, extra: dict[str, Any] | None = None) -> Any:
    return build_engine(case, extra=extra, lr_scheduler=step_scheduler)


def step_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def state_of_engine(engine: Any) -> State:
    """What an engine holds; empty but on the first rank. Collective."""
    from tests.engines.truth import gather

    held = gather(engine)
    if held is None:
        return State({}, {}, ())
    steps = {name: {key: torch.tensor(float(n)) for key, n in found.items()} for name, found in held.scalars.items()}
    return State({n: {**states, **steps[n]} for n, states in held.params.items()}, held.buffers, held.groups)
