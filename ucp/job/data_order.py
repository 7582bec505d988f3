"""One global order of the training data, whatever the number of ranks: the rule by which a resumed run goes on.

Samples are numbered through all epochs; number n is the n-th of the order, which depends on the seed alone. A step
takes as many consecutive numbers as the global batch has, in micro-steps of which every rank takes an equal part, one
after the other. So how far a run has come is one number, how many samples it has seen, and a run that goes on from
there, on however many ranks, sees each following sample once and in the same global order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from ucp.errors import BadArgument


class GlobalOrder(Sampler[int]):
    """A sampler for one rank's DataLoader: this rank's indices into the data set, without end.

    length: samples in the data set. batch: of one rank in a micro-step (the DataLoader's batch_size). seen: samples
    that all ranks together have seen (``engine.ucp.samples_seen``). shuffle: a new permutation for every epoch. The
    last batch of an epoch is filled up from the next one, so that none is dropped.
    """

    def __init__(
        self, length: int, batch: int, *, rank: int, world: int, seen: int = 0, seed: int = 0, shuffle: bool = True
    ) -> None:
        if length < 1 or batch < 1 or seen < 0 or not 0 <= rank < world:
            raise BadArgument(
                f"{length} samples cannot be given to rank {rank} of {world} in batches of {batch} after {seen} seen"
            )
        self._length, self._batch = length, batch
        self._rank, self._world = rank, world
        self._seen, self._seed, self._shuffle = seen, seed, shuffle

    def __iter__(self) -> Iterator[int]:
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        start = self._seen + self._rank * self._batch
        while True:
            for number in range(start, start + self._batch):
                if number // self._length != epoch:
                    epoch = number // self._length
                    order = self._order(epoch)
                yield int(order[number % self._length])
            start += self._world * self._batch

    def _order(self, epoch: int) -> torch.Tensor:
        if not self._shuffle:
            return torch.arange(self._length)
        generator = torch.Generator().manual_seed(self._seed + epoch)
        return torch.randperm(self._length, generator=generator)
