"""The norm of each layer's gradient, by which a repair weighs the neighbours of a lost layer (`ucp.repair`).

A gradient lives from the end of a backward pass to the optimizer's step. It is measured then, every so many steps, and
every save has the last measurement. Only the proportions of the layers count, so a loss scale need not be removed.
"""

from __future__ import annotations

import functools
import math
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist

from ucp.catalog import bare
from ucp.deepspeed.live import releases
from ucp.layers import layer_of


class GradientNorms:
    """Measures an engine's gradients before every ``every``-th step of its optimizer."""

    def __init__(self, engine: Any, every: int) -> None:
        self._engine, self._every = engine, every
        self._squares: dict[str, float] = {}
        if engine.optimizer is not None:
            self._measure_before(engine.optimizer)

    def _measure_before(self, optimizer: Any) -> None:
        original = optimizer.step

        @functools.wraps(original)
        def step(_: Any, *args: Any, **kwargs: Any) -> Any:
            if (self._engine.global_steps + 1) % self._every == 0:
                self._squares = _squares(self._engine.module)
            return original(*args, **kwargs)

        # It has to be a bound method: torch's schedulers expect this of an optimizer's step.
        optimizer.step = MethodType(step, optimizer)

    def merged(self) -> dict[str, float]:
        """Layer's name -> its norm, for the layers of all stages. {} before the first measurement. Collective."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (_place(self._engine), self._squares))
        total: dict[str, float] = {}
        for _, squares in sorted(dict(everyone).items()):
            for layer, square in squares.items():
                total[layer] = total.get(layer, 0.0) + square
        return {layer: math.sqrt(square) for layer, square in total.items()}


def _place(engine: Any) -> tuple[int, int]:
    """The rank's pipeline stage and tensor-parallel number. Data-parallel ranks with the same ones have measured the
    same."""
    grid = getattr(engine.module, "_grid", None) or getattr(engine, "mpu", None)
    if grid is None:
        return 0, 0
    stage = grid.get_pipe_parallel_rank() if hasattr(grid, "get_pipe_parallel_rank") else 0
    if hasattr(grid, "get_slice_parallel_rank"):
        return stage, grid.get_slice_parallel_rank()
    return stage, grid.get_tensor_model_parallel_rank() if hasattr(grid, "get_tensor_model_parallel_rank") else 0


@torch.no_grad()
def _squares(module: torch.nn.Module) -> dict[str, float]:
    """The sum of squares of each layer's gradient, whole over the data-parallel ranks. Collective among those."""
    out: dict[str, float] = {}
    for name, param in module.named_parameters():
        found = layer_of(bare(name)) if param.requires_grad else None
        if found is None:
            continue
        gradient = _gradient(param)
        if gradient is not None:
            layer = str(found[0])
            out[layer] = out.get(layer, 0.0) + float(gradient.detach().double().square().sum())
    return out


def _gradient(param: torch.nn.Parameter) -> torch.Tensor | None:
    """A parameter's whole gradient, averaged over the data-parallel ranks and accumulated over micro-steps."""
    # For stages 1 and 2: `safe_get_full_grad` prefers ``param.grad``, which under pipelines has only one micro-step.
    if hasattr(param, "get_full_hp_grad") and not hasattr(param, "ds_id"):
        found: torch.Tensor = param.get_full_hp_grad()
        return found
    gradient: torch.Tensor | None = releases.GRADIENTS.load().safe_get_full_grad(param)
    return gradient
