"""The ``mpu`` of sequence parallelism (Ulysses): DeepSpeed's own since 0.17; before it, what Megatron-DeepSpeed had.

0.17's own has no `get_model_parallel_rank`, by which DeepSpeed's save names its files, so that stock runs save with the
other. 0.18's own names files that DeepSpeed does not find again, and that are read here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist

from tests.engines.tp_models import Slices


def mesh(size: int, stock: bool = False) -> Any:
    """Groups of ``size`` ranks in a row share each sequence. Once per process. stock: DeepSpeed's own save is used."""
    try:
        own = importlib.import_module("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    except ModuleNotFoundError:
        return SequenceMesh(size)
    if stock and not hasattr(own, "get_model_parallel_rank"):
        return SequenceMesh(size)
    own.initialize_sequence_parallel(size)
    return own


def building(found: Any, config: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """In which a program of these releases builds its model at stage 3: else weights are cut over fewer ranks than the
    optimizer's states."""
    if not isinstance(found, SequenceMesh) or config["zero_optimization"]["stage"] < 3:
        return nullcontext()
    import deepspeed

    group = found.get_sequence_data_parallel_group()
    return deepspeed.zero.Init(config_dict_or_path=dict(config), mpu=found, sequence_data_parallel_group=group)


class SequenceMesh:
    """As a Megatron-DeepSpeed program gives it to DeepSpeed 0.15 and 0.16: no tensor and no pipeline parallelism."""

    def __init__(self, size: int) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        rows = [range(start, start + size) for start in range(0, world, size)]
        columns = [range(place, world, size) for place in range(size)]
        groups = {ranks: dist.new_group(list(ranks)) for ranks in (*rows, *columns)}
        self._sequence = next(groups[ranks] for ranks in rows if rank in ranks)
        self._data = next(groups[ranks] for ranks in columns if rank in ranks)
        self._both = dist.new_group(list(range(world)))

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_group(self) -> None:
        return None

    def get_data_parallel_group(self) -> Any:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)

    def get_sequence_parallel_group(self) -> Any:
        return self._sequence

    def get_sequence_parallel_rank(self) -> int:
        return dist.get_rank(self._sequence)

    def get_sequence_parallel_world_size(self) -> int:
        return dist.get_world_size(self._sequence)

    def get_sequence_data_parallel_group(self) -> Any:
        return self._both

    def get_sequence_data_parallel_rank(self) -> int:
        return dist.get_rank(self._both)

    def get_sequence_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._both)


class SlicedSequences(Slices, SequenceMesh):
    """The same over slices of tensor parallelism: neighbours are slices, groups of these share a sequence."""

    def __init__(self, tp: int, size: int) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()

        def own(lists: list[list[int]]) -> Any:
            groups = [dist.new_group(ranks) for ranks in lists]
            return next(group for group, ranks in zip(groups, lists, strict=True) if rank in ranks)

        def of_slice(first: int, count: int, step: int) -> list[int]:
            return list(range(first, first + count * step, step))

        self.tp_group = own([of_slice(first, tp, 1) for first in range(0, world, tp)])
        self._sequence = own([of_slice(first + k, size, tp) for first in range(0, world, tp * size) for k in range(tp)])
        self._data = own([list(range(k, world, tp * size)) for k in range(tp * size)])
        self._both = own([list(range(k, world, tp)) for k in range(tp)])
