"""One global order of the training data for any number of ranks: the rule by which a resumed run continues.

Samples are numbered through all epochs. Number n is the n-th of the order, which depends only on the seed. A step takes
as many consecutive numbers as the global batch has samples, in micro-steps. Of each micro-step every rank takes an
equal part, one after the other. So a run's progress is one number: how many samples it has seen. A run that continues
from there, on any number of ranks, sees each following sample once, in the same global order.
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
        How many samples the data set has.
    batch
        How many samples one rank takes in a micro-step (the DataLoader's batch_size).
    rank, world
        This rank's number among the ranks that get different data, and how many these are.
    seen
        How many samples all ranks together have seen (``engine.ucp.samples_seen``).
    seed, shuffle
        With shuffle there is a new permutation for every epoch, by the seed. Without it, the data set's own order.

    Raises
    ------
    BadArgument
        For numbers that are not possible.
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
        self._given = 0  # how many samples this rank was given since ``seen``
        self._goes_on = False  # whether the next iterator continues after those, since a state was loaded

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
        """The progress of all ranks, for torchdata's StatefulDataLoader. It is the same on every rank."""
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
        """Continue where the ranks that saved were, with any number of ranks. Raises Mismatch as `check_state` does."""
        self.check_state(state)
        seen, given = int(state["seen"]), int(state["given"])
        if (state["batch"], state["world"]) != (self._batch, self._world):
            seen, given = seen + given * int(state["world"]), 0
        self._seen, self._given, self._goes_on = seen, given, True

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise Mismatch for a state of another order, or of ranks within a micro-step if their division changes."""
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
