"""Stage 3 (DeepSpeedZeroOptimizer_Stage3): one flat partition per subgroup, of every parameter's ceil-sized piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ucp.deepspeed.live import releases, swapped
from ucp.deepspeed.live.base import (
    check_groups,
    drop_secondary_copies,
    put_masters,
    put_states,
    set_group_options,
    state_dtypes,
    wait_for_gathers,
)
from ucp.deepspeed.live.expects import live_group
from ucp.errors import Unsupported
from ucp.loading.target import Group, Loaded, Member, Slot, Weights
from ucp.parallel.zero import ceil_size, own_ceil_partition
from ucp.storage.dtypes import from_torch


class Stage3:
    @staticmethod
    def fits(optimizer: Any) -> bool:
        return releases.STAGE3.has(optimizer)

    def __init__(self, engine: Any) -> None:
        self._zero = engine.optimizer
        self._names = engine.param_names
        self._inner: torch.optim.Optimizer = self._zero.optimizer
        self._flats: Sequence[torch.Tensor] = self._zero.fp32_partitioned_groups_flat
        self._keys: list[int] = []
        check_groups(self._inner, 1 + max(self._zero.sub_group_to_group_id.values(), default=-1))

    def make_slots(self, keys: Iterator[int]) -> list[Slot]:
        slots = []
        for s, flat in enumerate(self._flats):
            members, at = [], 0
            for param in self._zero.fp16_groups[s]:
                name, shape, piece = self._names[param], tuple(param.ds_shape), param.partition_numel()
                group = param.ds_process_group
                dp, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
                if piece != ceil_size(param.ds_numel, dp):
                    raise Unsupported(
                        f"'{name}' has {piece} elements on this rank, where stage 3 cuts {param.ds_numel} over {dp} "
                        f"ranks into {ceil_size(param.ds_numel, dp)}; this kind of partition is not supported"
                    )
                members.append(Member(name, shape, own_ceil_partition(shape, at, dp, rank)))
                at += piece
            self._keys.append(next(keys))
            count = swapped.length(self._zero, s) if swapped.is_swapped(self._zero, s) else flat.numel()
            states = state_dtypes(self._subgroup(s)[1], count)
            index = self._zero.sub_group_to_group_id[s]
            slots.append(
                Slot(self._keys[-1], "parameter", count, from_torch(flat.dtype), tuple(members), index, states)
            )
        return slots

    def groups(self) -> list[Group]:
        names: list[list[str]] = [[] for _ in self._inner.param_groups]
        for s, params in enumerate(self._zero.fp16_groups):
            names[self._zero.sub_group_to_group_id[s]] += [self._names[p] for p in params]
        return [live_group(n, self._inner, options) for n, options in zip(names, self._inner.param_groups, strict=True)]

    def live(self, key: int) -> tuple[torch.Tensor, Mapping[str, Any]]:
        return self._subgroup(self._keys.index(key))

    def _subgroup(self, s: int) -> tuple[torch.Tensor, Mapping[str, Any]]:
        if swapped.is_swapped(self._zero, s):
            return swapped.view(self._zero, s)
        return self._flats[s], self._stepping(s).state.get(self._flats[s], {})

    def _stepping(self, s: int) -> torch.optim.Optimizer:
        """The optimizer that steps a subgroup. Under partial offload (``offload_optimizer.ratio``) a second one steps
        those that stay on the device, and has their states; Muon's stay with the first."""
        own = vars(self._zero)  # a release without a second optimizer has none of these
        second: torch.optim.Optimizer | None = own.get("backup_optimizer")
        if second is None or (own.get("use_muon") and own["sub_groups_using_muon"][s]):
            return self._inner
        return self._inner if own["subgroup_to_device"][s] == "cpu" else second

    def is_in_memory(self, key: int) -> bool:
        return not swapped.is_swapped(self._zero, self._keys.index(key))

    def weights(self) -> Iterator[Weights]:
        for s in range(len(self._flats)):
            at, flat = 0, self._subgroup(s)[0]
            for param in self._zero.fp16_groups[s]:
                group, shape, piece = param.ds_process_group, tuple(param.ds_shape), param.partition_numel()
                dp, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
                masters, own = (own_ceil_partition(shape, start, dp, rank) for start in (at, 0))
                at += piece
                globally = tuple(torch.distributed.get_process_group_ranks(group))
                if param.ds_tensor.numel() == piece:  # otherwise it is offloaded to NVMe
                    live = param.ds_tensor.detach()
                    yield Weights(self._names[param], globally, shape, flat, masters, live, own)

    def begin(self) -> None:
        """Partition every parameter that is gathered now, so that there are only pieces and no other copies."""
        self._zero.checkpoint_event_prologue()

    def check_room(self) -> None:
        """Raise DestinationError if states that are to be loaded have no room on the disk they are offloaded to."""
        if any(swapped.is_swapped(self._zero, s) for s in range(len(self._flats))):
            groups = self.groups()
            swapped.check_room(self._zero, lambda s: groups[self._zero.sub_group_to_group_id[s]].expects or ())

    def put(self, loaded: Loaded) -> None:
        for s, (key, flat) in enumerate(zip(self._keys, self._flats, strict=True)):
            if swapped.is_swapped(self._zero, s):
                swapped.put(self._zero, s, key, loaded)
                continue
            group = self._inner.param_groups[self._zero.sub_group_to_group_id[s]]
            if (key, "param") in loaded.tensors:
                put_masters(flat, key, loaded)
            put_states(self._stepping(s), flat, key, loaded, group)

    def finish(self) -> None:
        """Round the masters into the model's pieces, and gather the parameters again that stay whole on every rank."""
        for s, flat in enumerate(self._flats):
            if flat.numel():
                self._zero._reassign_or_swap_out_partitioned_parameters(s)
        drop_secondary_copies(self._names)
        self._zero.checkpoint_event_epilogue()
        wait_for_gathers(self._zero.persistent_parameters)

    def set_options(self, options: Mapping[int, Mapping[str, Any]]) -> None:
        for g, values in options.items():
            set_group_options(self._inner.param_groups[g], values)
