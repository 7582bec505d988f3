"""Jobs that run on the ranks: engines that are snapshotted in memory, killed, and resumed from it."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

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
