"""Stage 3 without an optimizer (DeepSpeedZeRoOffload): an engine that only computes. Its weights are cut as frozen
ones are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ucp.deepspeed.live import releases
from ucp.deepspeed.live.base import drop_secondary_copies, wait_for_gathers
from ucp.loading.target import Group, Loaded, Slot, Weights


class WeightsOnly:
    @staticmethod
    def fits(optimizer: Any) -> bool:
        return releases.OFFLOAD.has(optimizer)

    def __init__(self, engine: Any) -> None:
        self._offload = engine.optimizer
        self._module = engine.module

    def make_slots(self, keys: Iterator[int]) -> list[Slot]:
        return []

    def groups(self) -> Sequence[Group]:
        return ()

    def live(self, key: int) -> tuple[torch.Tensor, Mapping[str, Any]]:
        raise KeyError(key)

    def is_in_memory(self, key: int) -> bool:
        raise KeyError(key)

    def weights(self) -> Iterator[Weights]:
        """Nothing, since there are no masters."""
        return iter(())

    def begin(self) -> None:
        """Partition every parameter that is gathered now, so that there are only pieces and no other copies."""
        self._offload.partition_all_parameters()

    def put(self, loaded: Loaded) -> None:
        pass

    def finish(self) -> None:
        """Gather the parameters again that stay whole on every rank."""
        drop_secondary_copies(self._module.parameters())
        persistent = self._offload.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
            wait_for_gathers(persistent)

    def set_options(self, options: Mapping[int, Mapping[str, Any]]) -> None:
        pass
