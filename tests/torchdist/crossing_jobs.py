"""Jobs for ranks: the models of the pipelines' and the tensor-parallel engines' tests as plain modules under FSDP2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ucp
from tests.engines import models, pipe_runs, tp_runs
from tests.engines.configs import OPTIMIZERS, Case, parameter_groups
from tests.engines.fsdp import State, state_of
from tests.engines.pipe_runs import PipeCase
from tests.engines.runs import STEPS
from tests.engines.tp_runs import TpCase


@dataclass(frozen=True, eq=False)
class Crossing:
    """What an FSDP2 run held after a load, and the losses of its steps after that. by_dcp: what another one held after
    stock ``dcp.load``."""

    state: State
    by_dcp: State
    step: int | None
    clip_grad: float | None
    further: tuple[float, ...]


def through(like: PipeCase | TpCase, source: str, target: str, further: int, spec: str | None = None) -> Crossing:
    """Load a DeepSpeed checkpoint into the plain module under FSDP2 on all ranks, save it as ``target``, train on for
    ``further`` steps.

    like: the case whose plain module, accumulation and param groups this run has; its weights are seeded anew.
    """
    plain = like.but(pp=0, tp=1, seed=7) if isinstance(like, PipeCase) else like.but(tp=1, seed=7)
    model, optimizer = _sharded(plain)
    report = ucp.load_training(source, model=model, optimizer=optimizer, spec=spec)
    state = state_of(model, optimizer)
    ucp.save_training(
        target, model=model, optimizer=optimizer, step=report.step, samples=report.samples, extra=report.extra
    )
    by_dcp = _by_dcp(plain.but(seed=8), source, spec)
    return Crossing(
        state, by_dcp, report.step, report.clip_grad, tuple(_train(model, optimizer, plain, report.clip_grad, further))
    )


def _sharded(plain: PipeCase | TpCase) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.fsdp import fully_shard

    model = pipe_runs.build_model(plain) if isinstance(plain, PipeCase) else tp_runs.build_model(plain, None)
    for block in model.blocks if isinstance(plain, PipeCase) else model.model.layers:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    options = {k: v for k, v in OPTIMIZERS["adamw"][1].items() if k != "torch_adam"}
    return model, torch.optim.AdamW(parameter_groups(plain.case, model), **options, foreach=False)


def _by_dcp(plain: PipeCase | TpCase, source: str, spec: str | None) -> State:
    """The same by stock torch.distributed.checkpoint, for which our reader opens the checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    import ucp.dcp

    model, optimizer = _sharded(plain)
    weights, states = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optim": states}
    dcp.load(loaded, storage_reader=ucp.dcp.StorageReader(source, spec=spec, model=model))
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    return state_of(model, optimizer)


def _train(model: nn.Module, optimizer: Any, plain: PipeCase | TpCase, clip: float | None, steps: int) -> list[float]:
    case: Case = plain.case
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(STEPS, STEPS + steps):
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(case.accumulation):
            tokens, labels = models.batch("odd", step * case.accumulation + micro, rank, world)
            loss = _loss(model, plain, tokens, labels) / case.accumulation
            loss.backward()
            total += loss.detach().double()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item() / world)
    return losses


def _loss(model: nn.Module, plain: PipeCase | TpCase, tokens: Tensor, labels: Tensor) -> Tensor:
    found: Tensor = (
        model(tokens, labels) if isinstance(plain, PipeCase) else tp_runs.loss_of(model, plain, tokens, labels)
    )
    return found
