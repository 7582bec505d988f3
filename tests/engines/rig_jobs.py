"""Jobs that the rig's own tests run on ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Collection

import torch
import torch.distributed as dist


def add_ranks(offset: int) -> tuple[int, int, float]:
    """This rank, the world size, and the sum over ranks of rank + offset."""
    import deepspeed

    total = torch.tensor(float(dist.get_rank() + offset))
    deepspeed.comm.all_reduce(total)
    return deepspeed.comm.get_rank(), deepspeed.comm.get_world_size(), total.item()


def refuse(ranks: Collection[int]) -> str:
    """Raise on ``ranks``; the others wait for everyone, for ever if some have raised."""
    if dist.get_rank() in ranks:
        raise LookupError(f"rank {dist.get_rank()} refuses")
    while len(ranks):
        time.sleep(0.1)
    return "fine"


def exit_at_once(rank: int, code: int) -> None:
    """Have ``rank`` vanish without a word."""
    if dist.get_rank() == rank:
        os._exit(code)
    time.sleep(60)


def say(text: str) -> None:
    """Print, then fail."""
    print(text)
    raise RuntimeError("said it")


def leave_a_mark() -> int:
    """Change a module global; how often this process has done so."""
    import deepspeed.utils.groups as groups

    groups.rig_marks = getattr(groups, "rig_marks", 0) + 1
    return groups.rig_marks
