"""One global order of the training data for any number of ranks: the rule by which a resumed run continues.

Samples are numbered through all epochs. Number n is the n-th of the order, which depends only on the seed. A step takes
as many consecutive numbers as the global batch has samples, in micro-steps. Of each micro-step every rank takes an
equal part, one after the other. So a run's progress is one number: how many samples it has seen. A run that continues
from there, on any number of ranks, sees each following sample once, in the same global order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch.utils.data import Sampler

from ucp.errors import BadArgument, Mismatch
from ucp.printable import logger

log = logger(__name__)

NO_END = "epoch_length=len(data) gives it epochs"


class GlobalOrder(Sampler[int]):
    """A sampler for one rank's DataLoader: this rank's indices into the data set.

    Without ``epoch_length`` it has no end. With it, each iterator ends with its epoch, the first one with the rest of
    the epoch that ``seen`` lies in, and ``len()`` says how many samples the next iterator gives. The last batch of an
    epoch is filled up from the next one, so that none is dropped.

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
    epoch_length
        How many samples all ranks together see in an epoch, such as ``len(data)``. None: there are no epochs.
    seed, shuffle
        With shuffle there is a new permutation for every epoch, by the seed. Without it, the data set's own order.

    Raises
    ------
    BadArgument
        For numbers that are not possible.
    """

    def __init__(
        self,
        length: int,
        batch: int,
        *,
        rank: int,
        world: int,
        seen: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        epoch_length: int | None = None,
    ) -> None:
        if length < 1 or batch < 1 or seen < 0 or not 0 <= rank < world:
            raise BadArgument(
                f"{length} samples cannot be given to rank {rank} of {world} in batches of {batch} after {seen} seen"
            )
        if epoch_length is not None and epoch_length < 1:
            raise BadArgument(f"an epoch of {epoch_length} samples is none; epoch_length is at least 1, or None")
        if length < batch * world and rank == 0:
            log.warning(
                "the data set has %d samples, fewer than the %d that %d ranks take at once: a step sees some of them "
                "twice",
                length,
                batch * world,
                world,
            )
        self._length, self._batch, self._epoch_length = length, batch, epoch_length
        self._rank, self._world = rank, world
        self._seen, self._seed, self._shuffle = seen, seed, shuffle
        self._given = 0  # how many samples this rank was given since ``seen``
        self._begin = 0  # ``given`` where the next iterator begins
        self._goes_on = False  # whether the next iterator continues after those, since a state was loaded

    def __iter__(self) -> Iterator[int]:
        if not self._goes_on:
            self._given = self._begin
        self._goes_on = False
        end, told = self._end(), False
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        step, inside = divmod(self._given, self._batch)
        start = self._seen + (step * self._world + self._rank) * self._batch
        while end is None or start - self._rank * self._batch < end:
            for number in range(start + inside, start + self._batch):
                if number // self._length != epoch:
                    epoch = number // self._length
                    order = self._order(epoch)
                self._given += 1
                yield int(order[number % self._length])
            inside = 0
            start += self._world * self._batch
            if end is None and not told and start - self._rank * self._batch - self._seen >= self._length:
                told = self._tell_of_no_end()
        self._begin = self._given

    def __len__(self) -> int:
        """How many samples of this rank the next iterator gives. Raises TypeError without ``epoch_length``."""
        end = self._end()
        if end is None:
            raise TypeError(f"this order has no end and so no length; {NO_END}")
        left = end - self._start(self._begin)
        return -(-left // (self._world * self._batch)) * self._batch - self._begin % self._batch

    @property
    def epoch(self) -> int:
        """The epoch of the next iterator; 0 where there are no epochs."""
        if self._epoch_length is None:
            return 0
        return self._start(self._begin) // self._epoch_length

    def set_epoch(self, epoch: int) -> None:
        """Have the next iterator give this epoch, as torch's DistributedSampler does. Where that is the one that is
        under way, nothing changes, so that a resumed run goes on in its midst. Without epochs it does nothing."""
        if self._epoch_length is None or epoch == self.epoch:
            return
        if epoch < self.epoch:
            if self._rank == 0:
                log.warning("the samples' order goes back from epoch %d to epoch %d", self.epoch, epoch)
            self._seen, self._begin = epoch * self._epoch_length, 0
        else:
            steps = -(-(epoch * self._epoch_length - self._seen) // (self._world * self._batch))
            self._begin = steps * self._batch
        self._given, self._goes_on = self._begin, False

    def _start(self, given: int) -> int:
        """The number of the first sample that all ranks together take after this rank was given so many."""
        return self._seen + given // self._batch * self._world * self._batch

    def _end(self) -> int | None:
        """The number before which the micro-steps of the next iterator begin; None without epochs."""
        return None if self._epoch_length is None else (self.epoch + 1) * self._epoch_length

    def _tell_of_no_end(self) -> bool:
        if self._rank == 0:
            log.warning("the samples' order goes on with the data set's next epoch, without end; %s", NO_END)
        return True

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
        self._begin = given if self._epoch_length is not None else 0

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
        return _order(self._length, self._seed, self._shuffle, epoch)


class GlobalBatches(Sampler[list[int]]):
    """The same order in batches that need not be alike: a batch sampler for one rank's DataLoader, without end.

    Parameters
    ----------
    length, rank, seen, seed, shuffle
        As for `GlobalOrder`.
    counts
        How many samples each rank takes in a micro-step, which has the number given, from 0 on
        (`ucp.elastic.Fitted.counts`).

    Raises
    ------
    BadArgument
        For numbers that are not possible.
    """

    def __init__(
        self,
        length: int,
        counts: Callable[[int], Sequence[int]],
        *,
        rank: int,
        seen: int = 0,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if length < 1 or seen < 0 or not 0 <= rank < len(counts(0)):
            raise BadArgument(f"{length} samples cannot be given to rank {rank} of {len(counts(0))} after {seen} seen")
        self._length, self._counts, self._rank = length, counts, rank
        self._seen, self._seed, self._shuffle = seen, seed, shuffle

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        start = self._seen
        for micro_step in count():
            each = self._counts(micro_step)
            first = start + sum(each[: self._rank])
            batch = []
            for number in range(first, first + each[self._rank]):
                if number // self._length != epoch:
                    epoch = number // self._length
                    order = _order(self._length, self._seed, self._shuffle, epoch)
                batch.append(int(order[number % self._length]))
            yield batch
            start += sum(each)


def _order(length: int, seed: int, shuffle: bool, epoch: int) -> torch.Tensor:
    """The order of an epoch."""
    if not shuffle:
        return torch.arange(length)
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed + epoch))
