"""One global order of the training data, whatever the number of ranks: the rule by which a resumed run goes on.

Samples are numbered through all epochs; number n is the n-th of the order, which depends on the seed alone. A step
takes as many consecutive numbers as the global batch has, in micro-steps of which every rank takes an equal part, one
after the other. So how far a run has come is one number, how many samples it has seen, and a run that goes on from
there, on however many ranks, sees each following sample once and in the same global order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Sampler

from ucp.errors import BadArgument, Mismatch


class GlobalOrder(Sampler[int]):
    """A sampler for one rank's DataLoader: this rank's indices into the data set, without end.

    The last batch of an epoch is filled up from the next one, so that none is dropped.

    Parameters
    ----------
    length
        Samples in the data set.
    batch
        Samples of one rank in a micro-step (the DataLoader's batch_size).
    rank, world
        This rank among those that get different data, and how many these are.
    seen
        Samples that all ranks together have seen (``engine.ucp.samples_seen``).
    seed, shuffle
        A new permutation for every epoch, by the seed; without shuffle the data set's own order.
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
        self._given = 0  # of this rank's, since ``seen``
        self._goes_on = False  # the next iterator goes on after those, once a state was loaded

    def __iter__(self) -> Iterator[int]:
        if not self._goes_on:
            self._given = 0
        self._goes_on = False
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        step, inside = divmod(self._given, self._batch)
        start = self._seen + (step * self._world + self._rank) * self._batch
        while True:
            for number in range(start + inside, start + self._batch):
                if number // self._length != epoch:
                    epoch = number // self._length
                    order = self._order(epoch)
                self._given += 1
                yield int(order[number % self._length])
            inside = 0
            start += self._world * self._batch

    def state_dict(self) -> dict[str, Any]:
        """How far all ranks have come, for torchdata's StatefulDataLoader; it is the same on every rank."""
        return {
            "seen": self._seen,
            "given": self._given,
            "batch": self._batch,
            "world": self._world,
            "length": self._length,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the ranks that saved had come, with any number of them. Raises Mismatch as `check_state` does."""
        self.check_state(state)
        seen, given = int(state["seen"]), int(state["given"])
        if (state["batch"], state["world"]) != (self._batch, self._world):
            seen, given = seen + given * int(state["world"]), 0
        self._seen, self._given, self._goes_on = seen, given, True

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise Mismatch where the order is another one, or ranks were within a micro-step and are divided anew."""
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise Mismatch(f"the state of the samples' order lacks {', '.join(missing)}; it is not GlobalOrder's")
        for key, own in (("length", self._length), ("seed", self._seed), ("shuffle", self._shuffle)):
            if state[key] != own:
                raise Mismatch(f"the order of samples is another one: its {key} was {state[key]}, and it is {own}")
        given, batch, world = state["given"], state["batch"], state["world"]
        if (batch, world) != (self._batch, self._world) and given % batch:
            raise Mismatch(
                f"each of {world} ranks had drawn {given} samples, which is no whole number of batches of {batch}, "
                f"so {self._world} ranks in batches of {self._batch} cannot go on"
            )

    def _order(self, epoch: int) -> torch.Tensor:
        if not self._shuffle:
            return torch.arange(self._length)
        generator = torch.Generator().manual_seed(self._seed + epoch)
        return torch.randperm(self._length, generator=generator)
