"""Jobs for the ranks: a GPT that tensor parallelism cuts, under Adafactor, whose factors have some of its axes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.deepspeed.apart_jobs import held, optimizer_of
from tests.engines import models, pipe_runs, tp_models
from tests.engines.configs import Case, make_config

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


def saved(name: str, common: bool, spec: str | None, save: str, folder: str, theirs: str = "") -> Any:
    """States of this rank, and losses of three further steps; or the refusal. theirs: where DeepSpeed itself saves
    then, and the refusal comes last."""
    from ucp.errors import UcpError

    running, said = engine(name, 1, spec, save), ""
    train(running, STEPS, common)
    state = {"args": dict(tp_models.ARGS)}
    try:
        running.save_checkpoint(folder, "t", client_state=state)
    except UcpError as error:
        said = f"{type(error).__name__}: {error}"
        if not theirs:
            return said
        type(running).save_checkpoint(running, theirs, "t", client_state=state)
    found = held(running), train(running, FURTHER, common)
    return (*found, said) if theirs else found


def saved_and_resumed(name: str, folder: str) -> Any:
    """`saved`, and `resumed` by another engine of the same ranks."""
    return saved(name, True, None, "universal", folder), resumed(name, True, None, "universal", folder)


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


def in_stages(name: str, seed: int, source: str = "", ours: str = "", theirs: str = "") -> Any:
    """A pipeline of these ranks at stage 0 trains, or goes on from a checkpoint; states of this rank, and the losses of
    three further steps; or the refusal. ours, theirs: where it is saved, in our format and in DeepSpeed's."""
    import ucp.deepspeed
    from ucp.errors import UcpError

    pipe = pipe_runs.PipeCase(pp=dist.get_world_size(), case=Case(stage=0, dp=1, accumulation=2, seed=seed))
    module = pipe_runs.build_model(pipe)
    section = {"enabled": True, "save": {"async": False}, "load": {"prove": "always"}}
    config = {k: v for k, v in make_config(pipe.case).items() if k != "optimizer"} | {"ucp": section}
    running = ucp.deepspeed.initialize(model=module, optimizer=optimizer_of(name, module), config=config)[0]
    try:
        if source:
            running.load_checkpoint(source)
            assert running.ucp.last_load.proof.complete
        else:
            pipe_runs.continue_training(running, pipe, 0, len(STEPS))
    except UcpError as error:
        return f"{type(error).__name__}: {error}"
    if ours:
        running.save_checkpoint(ours, "t")
    if theirs:
        type(running).save_checkpoint(running, theirs, "t")
    return held(running), pipe_runs.continue_training(running, pipe, len(STEPS), len(FURTHER))
