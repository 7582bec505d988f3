"""The experts of a live engine: this rank's slots as parts of the whole model's tensors.

Every rank knows which experts it holds and how many there are, so nothing is exchanged. A slot lists the experts of all
ranks, so that all ranks come to the same decisions; other ranks' experts have no elements in it. The rules are in
`ucp.formats.deepspeed.experts`. Beside tensor parallelism (AutoEP with AutoTP) experts are spread over all ranks, also
over those that share a slice of the data, and are not cut otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ucp.deepspeed.live import releases
from ucp.errors import Unsupported
from ucp.formats.deepspeed.experts import Experts, expert_of, ordered
from ucp.geometry import Blocks, compose, empty
from ucp.loading.target import Group, Member, Placement, Slot


class LiveExperts:
    """Which experts this rank of an engine holds. ep: the largest number of ranks over which a layer's experts are
    spread."""

    def __init__(self, engine: Any) -> None:
        held: dict[str, int] = {}
        stacks: dict[str, list[list[int]]] = {}
        self._group: dict[str, str] = {}  # a layer's list of experts, or a stack: the name of its process groups
        for name, layer in engine.module.named_modules() if engine.has_moe_layers else ():
            prefix = f"{name}." if name else ""
            if releases.MOE.has(layer):
                experts = f"{prefix}deepspeed_moe.experts.deepspeed_experts"
                held[experts] = layer.num_local_experts
                self._group[experts] = layer.expert_group_name
            elif releases.AUTOEP.has(layer):
                ranks = sorted(layer.expert_placement_descriptor["ranks"], key=lambda found: found["rank"])
                for weight, _ in layer.experts.named_parameters():
                    stacks[f"{prefix}experts.{weight}"] = [list(found["experts"]) for found in ranks]
                    self._group[f"{prefix}experts.{weight}"] = layer.ep_group_name
        self._experts = Experts(held, stacks)
        self.ep = max((_size(group) for group in self._group.values()), default=1)

    def lift(self, slot: Slot) -> Slot:
        """The slot with the whole model's names and shapes. A slot without experts comes back as it is.

        Raises Unsupported for a slot with both experts and other parameters, since different ranks hold those.
        """
        if not any(self._group_of(member.name) for member in slot.members):
            return slot
        if slot.holders:
            found = {self._group_of(member.name) for member in slot.members}
            if len(found) > 1:
                raise Unsupported(
                    f"'{slot.members[0].name}' and the rest of its param group, experts and others, are stepped as one "
                    "tensor; give experts a param group of their own "
                    "(split_params_into_different_moe_groups_for_optimizer)"
                )
            slot = slot._replace(holders=_holders(next(iter(found))))
        lifted = {state: self._lifted(slot, slot.placement(state)) for state in ("param", *slot.placed)}
        members, weights = lifted["param"]
        own = tuple(m._replace(blocks=b) for m, b in zip(members, weights.blocks, strict=True))
        return slot._replace(members=own, placed={state: lifted[state][1] for state in slot.placed})

    def in_slots(self, slots: Sequence[Slot]) -> frozenset[str]:
        """The names of the experts' tensors in lifted slots. Tensor parallelism does not cut these."""
        return frozenset(m.name for slot in slots for m in slot.members if self._group_of(m.name))

    def names(self, group: Group) -> Group:
        """A param group with the experts of all ranks, in the order of a rank that holds them all."""
        names = (name for local in group.names for name in self._names(local))
        return replace(group, names=tuple(ordered(dict.fromkeys(names))))

    def _names(self, local: str) -> list[str]:
        group = self._group_of(local)
        count = _size(group) if group else 1
        return [self._experts.name(local, rank) for rank in range(count)]

    def _group_of(self, local: str) -> str:
        """The name of the process groups of the experts that a tensor belongs to; '' if it belongs to no expert."""
        expert = expert_of(local)
        return self._group.get(expert.layer if expert else local, "")

    def _lifted(self, slot: Slot, placement: Placement) -> tuple[list[Member], Placement]:
        members: list[Member] = []
        blocks: list[Blocks] = []
        holders: list[tuple[int, ...]] = []
        for local, own, held_by in zip(slot.members, placement.blocks, placement.holders, strict=True):
            group = self._group_of(local.name)
            mine = _groups()._get_expert_parallel_rank(group) if group else 0
            placed = self._experts.place(local.name, local.shape, mine)
            for name in dict.fromkeys(self._names(local.name)):
                here = name == placed.name
                members.append(Member(name, placed.shape, empty(len(placed.shape)), local.padding))
                blocks.append(_inside(own, placed.blocks, local, placed.shape) if here else members[-1].blocks)
                holders.append(held_by if here else ())
        return members, Placement(placement.length, tuple(blocks), tuple(holders))


def _inside(own: Blocks, outer: Blocks, local: Member, shape: Sequence[int]) -> Blocks:
    return compose(own, outer, local.shape, tuple(shape))[0]


def _groups() -> Any:
    """DeepSpeed's module of process groups."""
    return releases.EXPERT_GROUPS.load()


def _size(group: str) -> int:
    """The number of ranks over which experts are spread."""
    return int(_groups()._get_expert_parallel_world_size(group))


def _holders(group: str) -> tuple[int, ...]:
    """The global ranks that hold the same experts as this one."""
    return tuple(torch.distributed.get_process_group_ranks(_groups()._get_expert_data_parallel_group(group)))
