"""Jobs for ranks: what other programs wrote, resumed in live DeepSpeed engines and under FSDP2.

Each target is built once and takes one checkpoint after the other, so that every load but the first meets a run that
has trained on with another state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ucp
from tests.engines import truth
from tests.engines.build import build_engine
from tests.engines.fsdp import STEPS, Live, Mesh, State, state_of
from tests.engines.resume import continue_training
from tests.formats import odd_programs, strategies
from tests.formats.strategies import FURTHER, ROW, ZERO, Truth

TARGETS = ("zero1", "zero3", "fsdp2")


@dataclass(frozen=True)
class LlamaRun:
    """How a framework's program trains the tiny Llama: what a run that takes over does alike.

    wrapped: the model is ``model`` of a module. norms_apart: normalisations are a param group of their own. scheduler:
    ``linear``, as the Trainer's; ``exponential``; or ``twice``, as Accelerate steps it, once for every rank.
    """

    wrapped: bool = False
    norms_apart: bool = False
    scheduler: str = "exponential"


@dataclass(frozen=True, eq=False)
class Resumed:
    """What a target held after a load, and the losses of its further steps. step: as the load reports it. state: with
    buffers and param groups, where that was asked."""

    truth: Truth
    further: tuple[float, ...]
    step: int | None = None
    state: State | None = None


Source = tuple[LlamaRun, str]


def llama_goes_on(target: str, sources: Mapping[str, Source]) -> dict[str, Resumed]:
    """Each source's checkpoint in a target like its program. The truth is whole on rank 0."""
    targets: dict[LlamaRun, Any] = {}
    found = {}
    for name, (run, path) in sources.items():
        if run not in targets:
            targets[run] = _Sharded(run) if target == "fsdp2" else _Zero(run, int(target[-1]))
        found[name] = targets[run].resume(path)
    return found


class _Zero:
    """The Llama in a DeepSpeed engine."""

    def __init__(self, run: LlamaRun, stage: int) -> None:
        import ucp.deepspeed

        self.run, self.model = run, _model(run)
        config = copy.deepcopy(ZERO)
        config["zero_optimization"]["stage"] = stage
        self.engine, *_ = ucp.deepspeed.initialize(
            model=self.model,
            optimizer=torch.optim.AdamW(_groups(run, self.model), lr=7.0),
            lr_scheduler=_scheduler(run),
            config={**config, "ucp": {"enabled": True}},
        )

    def resume(self, path: str) -> Resumed:
        self.engine.load_checkpoint(path)
        held = truth.gather(self.engine)
        whole = {} if held is None else {n: {**s, **_counted(held.scalars[n])} for n, s in held.params.items()}
        return Resumed(whole, tuple(self._losses()), self.engine.global_steps)

    def _losses(self) -> list[float]:
        rows, losses = _rows(), []
        for _ in range(FURTHER):
            loss = _loss(self.run, self.engine, rows)
            self.engine.backward(loss)
            self.engine.step()
            if self.run.scheduler == "twice":
                self.engine.lr_scheduler.step()
            losses.append(loss.item())
        return losses


class _Sharded:
    """The Llama under FSDP2."""

    def __init__(self, run: LlamaRun) -> None:
        from torch.distributed.fsdp import fully_shard

        self.run, self.model = run, _model(run)
        for layer in (self.model.model if run.wrapped else self.model).model.layers:  # type: ignore[union-attr]
            fully_shard(layer)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(_groups(run, self.model), lr=7.0)
        self.scheduler = _scheduler(run)(self.optimizer)

    def resume(self, path: str) -> Resumed:
        loaded = ucp.load_training(
            path, model=self.model, optimizer=self.optimizer, lr_scheduler=self.scheduler, rng=False
        )
        held = state_of(self.model, self.optimizer).params
        rows, losses = _rows(), []
        for _ in range(FURTHER):
            loss = _loss(self.run, self.model, rows)
            loss.backward()
            self.optimizer.step()
            for _ in range(2 if self.run.scheduler == "twice" else 1):
                self.scheduler.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return Resumed(held, tuple(losses), loaded.step)


def _model(run: LlamaRun) -> nn.Module:
    model: nn.Module = strategies.llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    if not run.wrapped:
        return model
    outer = _Outer()
    outer.model = model
    return outer


class _Outer(nn.Module):
    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def _groups(run: LlamaRun, model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    if not run.norms_apart:
        return [{"params": [p for _, p in named]}]
    return [{"params": [p for n, p in named if ("norm" in n) == norms]} for norms in (False, True)]


def _scheduler(run: LlamaRun) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    schedulers = torch.optim.lr_scheduler
    if run.scheduler == "linear":
        return lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: max(0.0, (5 - step) / 5))
    return lambda optimizer: schedulers.ExponentialLR(optimizer, 0.9)


def _rows() -> Tensor:
    return torch.arange(ROW).expand(2, ROW)


def _loss(run: LlamaRun, model: Any, rows: Tensor) -> Tensor:
    found: Tensor = model(input_ids=rows, labels=rows).loss
    return found


def _counted(scalars: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(float(value)) for name, value in scalars.items()}


def odd_goes_on(target: str, sources: Mapping[str, str]) -> dict[str, Resumed]:
    """The same for checkpoints of the odd model, whose batches differ from rank to rank. sources: paths by name;
    torchtitan's scheduler has a state of its own kind."""
    targets: dict[bool, Any] = {}
    found = {}
    for name, path in sources.items():
        titan = name == "torchtitan"
        if titan not in targets:
            scheduler = odd_programs.titan_scheduler if titan else odd_programs.step_scheduler
            targets[titan] = _odd_fsdp(scheduler) if target == "fsdp2" else _odd_engine(int(target[-1]), scheduler)
        resume = _resume_fsdp if target == "fsdp2" else _resume_engine
        found[name] = resume(targets[titan], path)
    return found


def _odd_engine(stage: int, scheduler: Callable[[Any], Any]) -> Any:
    case = odd_programs.ZERO1.but(stage=stage, seed=5)
    return build_engine(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True}}, lr_scheduler=scheduler)


def _resume_engine(engine: Any, path: str) -> Resumed:
    engine.load_checkpoint(path)
    held, step = odd_programs.state_of_engine(engine), engine.global_steps
    return Resumed(held.params, tuple(continue_training(engine, odd_programs.ZERO1, STEPS, FURTHER)), step, held)


def _odd_fsdp(scheduler: Callable[[Any], Any]) -> Live:
    live = Live(Mesh(dp=2, seed=7))
    live.scheduler = scheduler(live.optimizer)
    return live


def _resume_fsdp(live: Live, path: str) -> Resumed:
    loaded = ucp.load_training(path, model=live.model, optimizer=live.optimizer, lr_scheduler=live.scheduler, rng=False)
    held = live.state()
    return Resumed(held.params, tuple(live.train(STEPS, FURTHER, scheduler=True)), loaded.step, held)
