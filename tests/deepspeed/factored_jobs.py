"""Jobs for the ranks: a GPT that tensor parallelism cuts, under Adafactor, whose factors have some of its axes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.deepspeed.apart_jobs import held, optimizer_of
from tests.engines import models, tp_models

STEPS, FURTHER = range(2), range(2, 5)


def engine(name: str, seed: int, spec: str | None, save: str) -> Any:
    """At stage 0, in fp32, with the whole job as tensor-parallel ranks."""
    import ucp.deepspeed

    world = dist.get_world_size()
    mesh = tp_models.Mesh(world) if world > 1 else None
    module = tp_models.Gpt(seed, mesh and mesh.tp_group, spec is None)
    own = {"async": False} if save == "universal" else {}
    section: dict[str, Any] = {"enabled": True, "save": {"format": save, **own}, "load": {"prove": "always"}}
    config = {
        "train_micro_batch_size_per_gpu": models.GLOBAL_BATCH,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**6,
        "ucp": section | ({"spec": spec} if spec else {}),
    }
    return ucp.deepspeed.initialize(model=module, optimizer=optimizer_of(name, module), config=config, mpu=mesh)[0]


def is_common(name: str, key: str) -> bool:
    """Whether tensor-parallel ranks hold this factor in common: of the axis that is not cut."""
    by_columns = name.endswith(("dense.weight", "dense_4h_to_h.weight"))
    return ("row" in key) if by_columns else ("col" in key)


def alike(running: Any) -> None:
    """Make the factors that ranks hold in common those of the whole parameter, as an optimizer would that knows of the
    other ranks: the means of squares over its parts are averaged."""
    state = getattr(running.optimizer, "optimizer", running.optimizer).state
    for name, p in running.module.named_parameters():
        for key, value in state[p].items():
            factor = isinstance(value, torch.Tensor) and value.dim() and value.shape != p.shape
            if factor and is_cut(name) and is_common(name, key):
                dist.all_reduce(value)
                value /= dist.get_world_size()


def is_cut(name: str) -> bool:
    return any(part in name for part in ("query_key_value", "dense", "word_embeddings"))


def train(running: Any, steps: range, common: bool) -> list[float]:
    losses = []
    for step in steps:
        tokens, labels = (t[:, :4].contiguous() for t in models.batch("odd", step, 0, 1))
        loss = running(tokens, labels)
        running.backward(loss)
        running.step()
        if common and dist.get_world_size() > 1:
            alike(running)
        losses.append(float(loss.detach()))
    return losses


def saved(name: str, common: bool, spec: str | None, save: str, folder: str) -> Any:
    """States of this rank, and losses of three further steps; or the refusal."""
    from ucp.errors import UcpError

    running = engine(name, 1, spec, save)
    train(running, STEPS, common)
    try:
        running.save_checkpoint(folder, "t", client_state={"args": dict(tp_models.ARGS)})
    except UcpError as error:
        return f"{type(error).__name__}: {error}"
    return held(running), train(running, FURTHER, common)


def resumed(name: str, common: bool, spec: str | None, save: str, folder: str, again: str = "") -> Any:
    """What an engine that has not stepped gets on these ranks, which may save it again, and its further losses."""
    from ucp.errors import UcpError

    fresh = engine(name, 2, spec, save)
    try:
        fresh.load_checkpoint(folder)
    except UcpError as error:
        return f"{type(error).__name__}: {error}"
    assert fresh.ucp.last_load.proof is not None
    if again:
        fresh.save_checkpoint(again, "t", client_state={"args": dict(tp_models.ARGS)})
    return held(fresh), train(fresh, FURTHER, common)
