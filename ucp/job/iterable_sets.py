"""Iterable data sets of Hugging Face's ``datasets``: whether a state is a position in one stream that all ranks share.

``split_dataset_by_node`` divides a data set in one of two ways (datasets/iterable_dataset.py). Where the ranks divide
its shards evenly, each rank reads shards of its own, and its state says nothing to another number of ranks. Otherwise
each rank reads the whole stream, in steps of as many examples as there are ranks, and takes one of each step. The state
is then the end of a step, which is one position for all ranks; other ranks divide what follows. The state of a data set
that is not divided is a position, too, but an undivided one is read in pieces of its files, and its state counts these:
in a divided one, the same state would mean another place (datasets 4.4.1: at the end of the piece). So neither becomes
the other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WHOLE, EXAMPLES, SHARDS = "whole", "examples", "shards"
"""What each rank reads: all of the data set, every n-th example, or shards of its own."""

_BUFFER = "BufferShuffledExamplesIterable"


@dataclass(frozen=True)
class StreamOf:
    """How ranks read an iterable data set. divided: one of the words above. replicas: among how many it is divided.
    shards: those of the whole data set. workers: of the loader. buffered: whether a buffer shuffles its examples."""

    divided: str
    replicas: int
    shards: int
    workers: int
    buffered: bool


def stream_of(loader: Any) -> StreamOf | None:
    """What is known of a loader that is such a data set, or torchdata's loader over one. None for any other."""
    module = sys.modules.get("datasets")
    if module is None:
        return None
    dataset, workers = loader, 0
    if not isinstance(loader, module.IterableDataset):
        dataset, workers = getattr(loader, "dataset", None), int(getattr(loader, "num_workers", 0))
    if not isinstance(dataset, module.IterableDataset):
        return None
    node = getattr(dataset, "_distributed", None)
    examples = getattr(dataset, "_ex_iterable", None)
    shards = getattr(examples, "num_shards", None)
    if shards is None:
        return None  # a release that keeps this elsewhere: nothing is known
    replicas = 1 if node is None else int(node.world_size)
    divided = WHOLE if replicas == 1 else SHARDS if shards % replicas == 0 else EXAMPLES
    return StreamOf(divided, replicas, int(shards), workers, _is_buffered(examples))


def fault(old: Sequence[StreamOf | None], live: StreamOf, states: Sequence[Any]) -> str | None:
    """Why these states are no position for other ranks; None if they are one. states: equal, one for each rank."""
    found = {one for one in old if one is not None}
    if len(found) != 1 or None in old:
        return "it does not say how its ranks divided the iterable data set"
    (before,) = found
    if before.shards != live.shards:
        return f"its iterable data set had {before.shards} shards, and this one has {live.shards}"
    for one in (before, live):
        if one.divided == SHARDS:
            return (
                f"of the iterable data set's {one.shards} shards, which {one.replicas} ranks divide evenly, each reads "
                "its own: that is no position (with shards that the ranks can't divide evenly, they share one stream)"
            )
        if one.workers:
            return f"{one.workers} workers of a loader divide the iterable data set's shards, which is no position"
    if before.divided != live.divided:
        return (
            f"{before.replicas} rank{'' if before.replicas == 1 else 's'} divided the iterable data set's stream, and "
            f"now {live.replicas} do; `datasets` reads a stream that is not divided in another way, and its state "
            "means another place there"
        )
    if any(state != states[0] for state in states):
        return "its ranks had come to different places of the iterable data set"
    if before.buffered or live.buffered:
        return "the examples in the iterable data set's shuffle buffer are no part of its state, and would be lost"
    return None


def _is_buffered(examples: Any) -> bool:
    """Whether a shuffle buffer is among the things that a data set's examples pass through."""
    inner = [getattr(examples, "ex_iterable", None), *(getattr(examples, "ex_iterables", None) or ())]
    return type(examples).__name__ == _BUFFER or any(_is_buffered(one) for one in inner if one is not None)
