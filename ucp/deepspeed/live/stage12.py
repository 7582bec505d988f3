"""Stages 1 and 2 (DeepSpeedZeroOptimizer) and BF16_Optimizer: one flat partition per param group.

A parameter's place is its offset in the group's flat buffer, taken from the optimizer's own list in its flat order
(``round_robin_bit16_groups``), never from ``_hp_mapping``, which is wrong under ``round_robin_gradients``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ucp.deepspeed.live import releases
from ucp.deepspeed.live.base import check_groups, put_states, set_group_options, state_dtypes
from ucp.deepspeed.live.expects import live_group
from ucp.geometry import empty, numel, whole
from ucp.loading.target import Group, Loaded, Member, Placement, Slot, Weights
from ucp.parallel.zero import flat_offsets, flat_partition, own_flat_partition
from ucp.storage.dtypes import from_torch


def whole_in_partition(members: Sequence[Member], holders: Sequence[tuple[int, ...]]) -> Placement:
    """A placement of whole parameters, end to end without padding: those that this rank's partition holds a part of."""
    blocks, at = [], 0
    for member in members:
        held = len(member.blocks) > 0
        blocks.append(whole(member.shape, at) if held else empty(len(member.shape)))
        at += numel(member.shape) if held else 0
    return Placement(at, tuple(blocks), tuple(holders))


class Stage12:
    @staticmethod
    def fits(optimizer: Any) -> bool:
        return releases.STAGE12.has(optimizer) or releases.BF16.has(optimizer)

    def __init__(self, engine: Any) -> None:
        self._zero = engine.optimizer
        self._names = engine.param_names
        self._inner: torch.optim.Optimizer = self._zero.optimizer
        self._keys: list[int] = []
        if releases.BF16.has(self._zero):
            self._flats: Sequence[torch.Tensor] = self._zero.fp32_groups_flat_partition
            self._params: Sequence[Sequence[torch.nn.Parameter]] = self._zero.bf16_groups
            self._offsets: Sequence[Sequence[int]] = [flat_offsets([p.numel() for p in g])[0] for g in self._params]
        else:
            self._flats = self._zero.single_partition_of_fp32_groups
            self._params = self._zero.round_robin_bit16_groups
            self._offsets = [releases.offsets_in_flat(self._zero, g) for g in range(len(self._flats))]
        check_groups(self._inner, len(self._flats))

    def make_slots(self, keys: Iterator[int]) -> list[Slot]:
        slots = []
        for g, flat in enumerate(self._flats):
            group = self._zero.real_dp_process_group[g]
            rank, size = torch.distributed.get_rank(group), flat.numel()
            places = [(tuple(p.shape), at) for p, at in zip(self._params[g], self._offsets[g], strict=True)]
            members = tuple(
                Member(self._names[p], shape, own_flat_partition(shape, at, size, rank))
                for p, (shape, at) in zip(self._params[g], places, strict=True)
            )
            self._keys.append(next(keys))
            states = state_dtypes(self._inner.state.get(flat, {}), size)
            placed = {}
            if self._keeps_whole_momentum(g):
                globally = torch.distributed.get_process_group_ranks(group)
                cuts = [flat_partition(shape, at, size) for shape, at in places]
                holders = [tuple(globally[r] for r in np.unique(cut.buffers).tolist()) for cut in cuts]
                placed["momentum_buffer"] = whole_in_partition(members, holders)
                states |= state_dtypes(self._inner.state.get(flat, {}), placed["momentum_buffer"].length)
            slots.append(Slot(self._keys[-1], "parameter", size, from_torch(flat.dtype), members, g, states, placed))
        return slots

    def _keeps_whole_momentum(self, g: int) -> bool:
        """Whether each rank keeps the whole momentum of every matrix that its partition touches. Muon does at stages 1
        and 2 without offload, since it orthogonalises whole matrices (``stage_1_and_2.py: _muon_momentum_buffer``)."""
        stage12 = releases.STAGE12.has(self._zero) and not self._zero.cpu_offload
        return stage12 and bool(self._inner.param_groups[g].get("use_muon"))

    def groups(self) -> list[Group]:
        return [
            live_group([self._names[p] for p in params], self._inner, options)
            for params, options in zip(self._params, self._inner.param_groups, strict=True)
        ]

    def live(self, key: int) -> tuple[torch.Tensor, Mapping[str, Any]]:
        flat = self._flats[self._keys.index(key)]
        return flat, self._inner.state.get(flat, {})

    def is_in_memory(self, key: int) -> bool:
        return True

    def weights(self) -> Iterator[Weights]:
        for g, flat in enumerate(self._flats):
            group = self._zero.real_dp_process_group[g]
            rank, size = torch.distributed.get_rank(group), flat.numel()
            globally = tuple(torch.distributed.get_process_group_ranks(group))
            for param, at in zip(self._params[g], self._offsets[g], strict=True):
                shape = tuple(param.shape)
                masters = own_flat_partition(shape, at, size, rank)
                yield Weights(self._names[param], globally, shape, flat, masters, param.detach(), whole(shape))

    def begin(self) -> None:
        pass

    def put(self, loaded: Loaded) -> None:
        for g, (key, flat) in enumerate(zip(self._keys, self._flats, strict=True)):
            if (key, "param") in loaded.tensors:
                loaded.tensors.fill(key, "param", flat.data)
            put_states(self._inner, flat, key, loaded, self._inner.param_groups[g])

    def finish(self) -> None:
        """Round the masters into the model, and let DeepSpeed's per-parameter views find the new states."""
        self._zero._hp_optimizer_states_linked = False
        if all(self._inner.state.get(flat) for flat in self._flats):
            self._zero._lazy_init_hp_params_optimizer_state()
        self._zero.update_lp_params()

    def set_options(self, options: Mapping[int, Mapping[str, Any]]) -> None:
        for g, values in options.items():
            set_group_options(self._inner.param_groups[g], values)
