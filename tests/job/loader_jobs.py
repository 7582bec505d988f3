"""What ranks do with torchdata's loader and `ucp.save_training`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

import ucp

LENGTH = 240


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(dist.get_rank(), LENGTH, dist.get_world_size()))


def _loader(stream: bool) -> StatefulDataLoader[int]:
    if stream:
        return StatefulDataLoader(Stream(), batch_size=4)
    data = Numbers()
    return StatefulDataLoader(data, batch_size=4, sampler=StatefulDistributedSampler(data, shuffle=False))


def save(path: str, steps: int, stream: bool = False) -> list[int]:
    """This rank's samples of so many steps."""
    loader = _loader(stream)
    batches = iter(loader)
    seen = [int(n) for _ in range(steps) for n in next(batches)]
    ucp.save_training(path, model=torch.nn.Linear(2, 2), dataloader=loader)
    return seen


def load(path: str, stream: bool = False) -> list[int]:
    """This rank's samples of the rest of the epoch."""
    loader = _loader(stream)
    ucp.load_training(path, model=torch.nn.Linear(2, 2), dataloader=loader)
    return [int(n) for batch in loader for n in batch]
