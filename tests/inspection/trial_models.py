"""What ``ucp-spec check --model`` is given: makers of a rank's module."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from tests.engines.tp_models import Gpt


def gpt(tp: int, rank: int) -> nn.Module:
    """The GPT that cuts itself, over the group of all ranks."""
    return Gpt(9, dist.group.WORLD if tp > 1 else None)


def other(tp: int, rank: int) -> nn.Module:
    """A model of other sizes."""
    return nn.Linear(3, 4)
