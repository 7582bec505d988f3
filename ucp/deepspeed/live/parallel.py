"""A live engine under tensor and pipeline parallelism: this rank's slots as parts of the whole model's tensors.

Every rank knows only its local tensors. The ranks tell each other names and shapes, the spec (or the model itself) says
how these make whole tensors, and every slot is lifted into them. None of this happens without model parallelism and
padding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ucp.deepspeed.live import releases
from ucp.deepspeed.live.pipeline import declared_info
from ucp.errors import Unsupported
from ucp.formats.deepspeed.experts import CAPTURES, group_places
from ucp.formats.shared.apart import states_apart
from ucp.geometry import Blocks, Shape, compose, numel, whole
from ucp.job import ranks
from ucp.loading.spec_names import config_of
from ucp.loading.target import Group, Member, Placement, Slot
from ucp.parallel.mesh import Coordinate, Layout
from ucp.spec.places import Placed, Placements, held_first
from ucp.spec.resolve import find_placements
from ucp.spec.select import Choice


@dataclass(frozen=True)
class RankTensors:
    """One rank's local tensors: name -> (shape, kind), at its coordinate, and the names in each param group.

    of_experts: for each group, whether DeepSpeed made it for experts.
    """

    at: Coordinate
    tensors: Mapping[str, tuple[Shape, str]]
    groups: tuple[tuple[str, ...], ...]
    of_experts: tuple[bool, ...]


class PlacedSlots:
    """Where this rank's local tensors lie in the whole model's.

    slots: everything that this rank holds, for loading. elsewhere: as in `Target`. groups: the names in each param
    group, from all parts of the model. own_groups: which of these are this rank's. has_all: whether those are all.
    some_lack: whether some rank lacks some. whole: this rank's local names -> the whole tensors' shapes. names_of_all:
    of all tensors of the model.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        tables: Sequence[RankTensors],
        of_rank: Sequence[int],
        placements: Placements,
        experts: Collection[str],
    ) -> None:
        self._at = tables[of_rank[ranks.rank()]].at
        self._placements = placements
        self._first = held_first(placements, apart=experts)
        self._holders = {
            name: tuple(
                r
                for r, t in enumerate(of_rank)
                if (tables[t].at == self._at or name in experts) and name in tables[t].tensors
            )
            for name in tables[of_rank[ranks.rank()]].tensors
        }
        self._held = {n for t in tables for n, (shape, _) in t.tensors.items() if numel(shape)}
        places = _places_of_groups(tables)
        self.own_groups = places[of_rank[ranks.rank()]]
        count = max(map(len, places))
        self.has_all, self.some_lack = len(self.own_groups) == count, min(map(len, places)) < count
        self.slots = tuple(self._lifted(slot, first_only=False) for slot in slots if not self._is_void(slot))
        own = {m.name for s in self.slots for m in s.members}
        kinds = {
            placed.name: "padding" if placed.padding else kind
            for table in tables
            for name, (shape, kind) in table.tensors.items()
            if numel(shape) or name not in self._held
            for placed in placements[table.at, name]
        }
        self.groups = _all_groups(tables, places, placements)
        self.whole = {local: places[0].shape for (at, local), places in placements.items() if at == self._at}
        self.names_of_all = tuple(kinds)
        self.elsewhere = {name: kind for name, kind in kinds.items() if name not in own}

    def names(self, local: Sequence[str]) -> tuple[str, ...]:
        """The names that these local tensors have in the whole model."""
        return tuple(placed.name for name in local for placed in self._placements[self._at, name])

    def to_save(self, slots: Sequence[Slot]) -> list[Slot]:
        """The local slots, cut down to what this rank has to write: what no earlier part of the model holds.

        Raises Unsupported for a parameter that the spec says to average, since no rank holds the average.
        """
        self.refuse_averages()
        return [self._lifted(slot, first_only=True) for slot in slots if not self._is_void(slot)]

    def refuse_averages(self) -> None:
        """Raise Unsupported if the spec says to average a parameter or a state."""
        averaged = [placed.name for places in self._placements.values() for placed in places if placed.average]
        if averaged:
            raise Unsupported(
                f"'{averaged[0]}' is the average of its copies by the spec, and ranks save only what they hold; "
                'nothing was saved; "ucp": {"save": {"format": "deepspeed"}} keeps every copy'
            )

    def _is_void(self, slot: Slot) -> bool:
        """Whether this part holds nothing of what others hold. DeepSpeed takes empty shards out of the optimizer."""
        return all(m.name in self._held and not numel(m.shape) for m in slot.members)

    def _lifted(self, slot: Slot, first_only: bool) -> Slot:
        placed = {state: self._placement(slot, slot.placement(state), first_only) for state in ("param", *slot.placed)}
        weights = placed.pop("param")
        members = []
        at = 0
        for local in slot.members:
            for place in self._placements[self._at, local.name]:
                members.append(Member(place.name, place.shape, weights.blocks[at], place.padding))
                at += 1
        here = self._holders[slot.members[0].name]
        holders = tuple(r for r in slot.holders if r in here)
        group = None if slot.group is None else self.own_groups[slot.group]
        return slot._replace(members=tuple(members), placed=placed, holders=holders, group=group)

    def _placement(self, slot: Slot, placement: Placement, first_only: bool) -> Placement:
        blocks: list[Blocks] = []
        holders: list[tuple[int, ...]] = []
        for local, own, held_by in zip(slot.members, placement.blocks, placement.holders, strict=True):
            key = (self._at, local.name)
            for place, first in zip(self._placements[key], self._first[key], strict=True):
                outer = place.blocks.take(first) if first_only else place.blocks
                blocks.append(compose(own, outer, local.shape, place.shape)[0])
                holders.append(tuple(r for r in held_by if r in self._holders[local.name]))
        return Placement(placement.length, tuple(blocks), tuple(holders))


def layout_of(engine: Any) -> Layout:
    """The engine's mesh. Its data-parallel ranks include those of sequence parallelism, which hold the same state."""
    tp, pp = 1, 1
    if engine.mp_world_size > 1:
        mesh = releases.MESH.load()
        tp = mesh.bwc_tensor_model_parallel_world_size(engine.mpu)
        pp = mesh.bwc_pipeline_parallel_world_size(engine.mpu)
    return Layout(dp=engine.seq_dp_world_size, tp=tp, pp=pp, zero=engine.zero_optimization_stage())


def _places_of_groups(tables: Sequence[RankTensors]) -> list[tuple[int, ...]]:
    """Which of all param groups each part has. Raises Unsupported if a part lacks others than those of experts."""
    every = max(tables, key=lambda table: len(table.groups))
    out = []
    for table in tables:
        places = group_places(table.of_experts, every.of_experts)
        if places is None:
            raise Unsupported(
                f"the optimizer has {len(table.groups)} param groups on {table.at} and {len(every.groups)} on "
                f"{every.at}; divide it so that every part has parameters of every group but those of experts, since "
                "DeepSpeed drops empty ones"
            )
        out.append(tuple(places))
    return out


def _all_groups(
    tables: Sequence[RankTensors], places: Sequence[Sequence[int]], placements: Placements
) -> tuple[tuple[str, ...], ...]:
    """The names in each param group, from all parts of the model."""
    names: list[dict[str, None]] = [{} for _ in range(max(map(len, places)))]
    for table, own in zip(tables, places, strict=True):
        for g, group in zip(own, table.groups, strict=True):
            names[g].update(dict.fromkeys(placed.name for name in group for placed in placements[table.at, name]))
    return tuple(tuple(group) for group in names)


def place_slots(
    engine: Any, slots: Sequence[Slot], groups: Sequence[Group], choice: Choice, experts: Collection[str] = ()
) -> PlacedSlots | None:
    """Lift the slots of every rank. None if the model is neither cut nor padded. Collective.

    experts: the names of their tensors, which the slots have as parts of the whole model's already.

    Raises on every rank: SpecError and Mismatch if the spec does not fit, Unsupported if there is none.
    """
    layout = layout_of(engine)
    stage, slice_ = divmod(releases.model_parallel_rank(engine), layout.tp)
    own = RankTensors(
        Coordinate(slice_, stage),
        {m.name: (m.shape, s.kind) for s in slots for m in s.members},
        tuple(g.names for g in groups),
        tuple(bool(g.options.get("moe")) for g in groups),
    )
    if layout.tp * layout.pp == 1:
        alike = ranks.all_or_none(lambda: _placements(engine, [own], layout, choice, experts))
        if all(len(places) == 1 for places in alike.values()):
            return None
    tables, of_rank = ranks.distinct(own)
    return ranks.all_or_none(
        lambda: PlacedSlots(slots, tables, of_rank, _placements(engine, tables, layout, choice, experts), experts)
    )


def _placements(
    engine: Any, tables: Sequence[RankTensors], layout: Layout, choice: Choice, experts: Collection[str]
) -> Placements:
    parts: dict[Coordinate, dict[str, Shape]] = {}
    factors: dict[str, tuple[str, str]] = {}
    buffers: set[str] = set()
    not_cut = experts if layout.tp > 1 else ()
    whole_already: dict[tuple[Coordinate, str], tuple[Placed, ...]] = {}
    for table in tables:
        cut = {name: shape for name, (shape, _) in table.tensors.items() if name not in not_cut}
        parts.setdefault(table.at, {}).update(cut)
        whole_already |= {
            (table.at, name): (Placed(name, shape, whole(shape)),)
            for name, (shape, _) in table.tensors.items()
            if name not in cut
        }
        factors |= states_apart(table.tensors, table.tensors)
        buffers |= {name for name, (_, kind) in table.tensors.items() if kind == "buffer"}
    info = declared_info(engine.module)
    section = "autotp" if releases.tensor_parallel_size(engine) > 1 else "megatron"
    config = partial(config_of, engine.module)
    found = find_placements(choice, info, config, parts, layout, buffers, section, CAPTURES, factors)
    if found is None:
        raise Unsupported(
            f"tensor parallelism cuts this model ({type(engine.module).__name__}), and nothing says how; name a "
            'spec in "ucp": {"spec": ...} of the DeepSpeed config, or write a draft with \'ucp-spec infer CHECKPOINT\''
        )
    for placed in (placed for places in found.values() for placed in places if placed.scale != 1):
        raise Unsupported(
            f"this model keeps '{placed.name}' multiplied by {placed.scale:g} (its affine map's scale); such "
            "checkpoints are read, but no such engine is filled or saved"
        )
    return {**found, **whole_already}
