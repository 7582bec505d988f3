"""Jobs that run on the ranks: engines that are snapshotted in memory, killed, and resumed from it."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from tests.engines import pipe_runs, pipe_truth
from tests.engines.build import build_engine
from tests.engines.configs import Case
from tests.engines.resume import continue_training
from tests.engines.truth import Truth, gather
from ucp.storage.kept import places

ON: dict[str, Any] = {"enabled": True, "redundancy": 0}


def at_home(keepers: str, nodes: Sequence[str]) -> None:
    """This rank's node, and where keepers are looked for."""
    os.environ[places.FOLDER] = keepers
    os.environ[places.NODE] = nodes[dist.get_rank()]


def build(case: Case, memory: Mapping[str, Any]) -> Any:
    return build_engine(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True, "memory": {**ON, **memory}}})


def train(
    case: Case,
    folder: str,
    keepers: str,
    nodes: Sequence[str],
    steps: int,
    memory: Mapping[str, Any],
    *,
    end: bool = False,
    killed: bool = False,
) -> Truth | None:
    """Resume from the folder's memory if there is any, train so many steps, and the truth after the last one.

    end: leave normally. killed: by SIGKILL, when the last snapshot is in.
    """
    at_home(keepers, nodes)
    engine = build(case, memory)
    engine.load_checkpoint(folder)
    continue_training(engine, case, engine.global_steps, steps)
    truth = gather(engine)
    engine.ucp.wait()
    dist.barrier()
    if end:
        engine.ucp.memory.tier.end()
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    return truth


def train_parallel(
    pipe: pipe_runs.PipeCase, folder: str, keepers: str, nodes: Sequence[str], spec: str, steps: int
) -> tuple[str | None, Truth | None]:
    """Under any kind of parallelism: resume from memory if there is any, train so many steps; path and truth."""
    at_home(keepers, nodes)
    engine = pipe_runs.build_engine(pipe, {"memory": ON, "spec": spec})
    path, _ = engine.load_checkpoint(folder)
    pipe_runs.continue_training(engine, pipe, engine.global_steps, steps)
    truth = pipe_truth.gather(engine)
    engine.ucp.wait()
    dist.barrier()
    return path, truth


def lose_keeper(case: Case, folder: str, keepers: str, nodes: Sequence[str]) -> tuple[Truth | None, int]:
    """Train, lose a keeper, train on; the truth after all, and how many steps were done."""
    at_home(keepers, nodes)
    engine = build(case, {"redundancy": 1})
    engine.load_checkpoint(folder)
    continue_training(engine, case, 0, 1)
    engine.ucp.wait()
    if dist.get_rank() == 0:
        os.kill(next(note.pid for note in places.notes() if note.node == "b"), signal.SIGKILL)
    dist.barrier()
    continue_training(engine, case, 1, 2)
    engine.ucp.wait()
    truth = gather(engine)
    dist.barrier()
    return truth, engine.global_steps


def resume(
    case: Case, folder: str, keepers: str, nodes: Sequence[str], memory: Mapping[str, Any], *, end: bool = False
) -> tuple[str | None, int, Truth | None]:
    """What a load finds: the path, the step, and the truth."""
    at_home(keepers, nodes)
    engine = build(case, memory)
    path, _ = engine.load_checkpoint(folder)
    truth = gather(engine)
    dist.barrier()
    if end:
        engine.ucp.memory.tier.end()
    return path, engine.global_steps, truth


def fsdp(folder: str, keepers: str, steps: int, sharded: bool) -> tuple[int, dict[str, Any]]:
    """FSDP2 or plain torch: resume from memory if there is any, train, snapshot; the step, and the whole state."""
    import torch
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    from ucp.torchdist.memory import MemorySnapshots

    at_home(keepers, ("a", "b"))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 3))
    if sharded:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    memory = MemorySnapshots(folder)
    report = memory.load_training(model=model, optimizer=optimizer)
    start = 0 if report is None else report.step or 0
    for step in range(start, start + steps):
        torch.manual_seed(step)
        model(torch.randn(4, 6)).square().mean().backward()
        memory.hold()
        optimizer.step()
        optimizer.zero_grad()
        memory.snapshot(step + 1, model=model, optimizer=optimizer)
    memory.wait()
    options = StateDictOptions(full_state_dict=True)
    states = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    whole = {f"{name}:{key}": value for name, held in states.items() for key, value in held.items()}
    whole.update(get_model_state_dict(model, options=options))
    dist.barrier()
    return start, whole
