"""A state dict of torch.distributed as a source for the saver: who holds what, and what differs between the ranks.

The ranks tell each other what they hold, in a few bytes for each entry: which region of a tensor (ranks with the same
region share the work of writing it), and a digest of what is not sharded. This shows which values are each rank's own,
such as a random number generator's state. Every rank's value is then kept, though all have the same name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from ucp.catalog import ParameterInfo, ParamGroup, TrainingState
from ucp.errors import SaveFailed
from ucp.formats.shared.roles import OUTSIDE, PARAM, VALUES, Roles, StateEntry, assign, param_groups
from ucp.geometry import Blocks, Shape, empty
from ucp.job import ranks
from ucp.parallel.mesh import Layout
from ucp.saving.late import LateNumbers
from ucp.saving.source import Holding, Source
from ucp.storage import plain
from ucp.storage.dtypes import from_torch
from ucp.torchdist.dtensors import blocks_of, is_dtensor, layout_of, local_tensor
from ucp.torchdist.state_dicts import flatten, storage_key

Key = tuple[str, str]


@dataclass(frozen=True)
class _TensorFacts:
    """What a rank says about a tensor. region: a digest of its boxes. content: a digest of its bytes, if it is not
    sharded. memory: the first name of the same memory; "" for a tensor without elements, which cannot show it. trained:
    an optimizer updates it. outside: it may not belong to the model."""

    shape: Shape
    dtype: str
    kind: str
    region: bytes
    content: bytes | None
    memory: str
    trained: bool
    outside: bool


@dataclass(frozen=True)
class _RankFacts:
    """What a rank says about its state dict."""

    tensors: dict[Key, _TensorFacts]
    scalars: dict[str, dict[str, Any]]
    groups: list[tuple[tuple[str, ...], bytes]]
    values: dict[str, bytes]
    layout: Layout
    outside: list[str]


@dataclass(frozen=True, eq=False)
class _Local:
    """This rank's state dict, taken apart."""

    facts: _RankFacts
    tensors: dict[Key, torch.Tensor]
    blocks: dict[Key, Blocks]
    entry_of: dict[Key, str]
    groups: list[ParamGroup]
    values: dict[str, Any]
    late: LateNumbers | None = None


def make_source(
    state_dict: Mapping[str, Any],
    kinds: Mapping[str, str] | None = None,
    training_state: TrainingState | None = None,
    own: Mapping[str, Any] | None = None,
    late: bool = False,
) -> Source:
    """What this rank saves of a state dict without Stateful objects (`state_dicts.unwrap`). Collective.

    kinds: the kinds of the model's tensors by name, if they are known. training_state, own: what else to save. late: a
    save in the background is to read the numbers that parameters have in tensors (`Source.late`). Several ranks compare
    them now.

    Raises on every rank: Unsupported for what cannot be kept, SaveFailed if the ranks contradict each other.
    """
    several = ranks.world_size() > 1
    late = late and not several
    local = ranks.all_or_none(lambda: _take_apart(flatten(state_dict), kinds or {}, several, ranks.world_size(), late))
    facts = _exchange(local.facts)
    me = ranks.rank()
    return ranks.all_or_none(lambda: _join(local, facts, me, training_state or TrainingState(), dict(own or {})))


def source_of_entries(entries: Mapping[str, StateEntry], mine: set[str], rank: int, world: int) -> Source:
    """What one of ``world`` ranks saves if it is already decided who writes what: this rank writes the tensors named in
    ``mine``. Does not communicate. Every rank's state dict has to have the same entries."""
    local = _take_apart(entries, {}, False, world)
    source = _join(local, [local.facts], 0, TrainingState(), {})
    holdings = [
        holding
        if local.entry_of[holding.name, holding.state] in mine
        else replace(holding, blocks=empty(len(holding.shape)))
        for holding in source.holdings
    ]
    return replace(source, holdings=[replace(holding, holders=(rank,)) for holding in holdings])


def _exchange(facts: _RankFacts) -> list[_RankFacts]:
    if ranks.world_size() == 1:
        return [facts]
    found: list[Any] = [None] * ranks.world_size()
    dist.all_gather_object(found, facts)
    return found


# --- one rank's ------------------------------------------------------------------------------------------------------


@torch.no_grad()  # once for all tensors, not for each
def _take_apart(
    entries: Mapping[str, StateEntry], kinds: Mapping[str, str], compare: bool, world: int, late: bool = False
) -> _Local:
    """compare: add digests of tensors that are not sharded, for the other ranks. late: as for `make_source`."""
    roles = assign(entries)
    layout = layout_of([entry.value for entry in entries.values()], world)
    local = _Local(_RankFacts({}, {}, [], {}, layout, roles.outside), {}, {}, {}, [], {})
    memories: dict[Any, str] = {}
    # If tensors are tied, the one that the optimizer names is the parameter, and the others are its aliases.
    for key, what in sorted(roles.tensors.items(), key=lambda item: item[1][0] not in roles.trained):
        tensor = entries[key].value
        blocks = blocks_of(key, tensor)
        floating = tensor.is_floating_point() or tensor.is_complex()
        local.tensors[what], local.blocks[what], local.entry_of[what] = local_tensor(tensor), blocks, key
        memory = storage_key(tensor) if what[1] == PARAM else None
        local.facts.tensors[what] = _TensorFacts(
            shape=tuple(tensor.shape),
            dtype=from_torch(tensor.dtype),
            kind=kinds.get(what[0]) or roles.kind(what[0], floating),
            region=_digest(blocks.offsets.tobytes() + b"/" + blocks.sizes.tobytes()) if len(blocks) else b"",
            content=_content(tensor) if compare and not is_dtensor(tensor) else None,
            memory="" if memory is None else memories.setdefault(memory, what[0]),
            trained=what[0] in roles.trained,
            outside=what == (key, PARAM) and what[0] not in roles.trained,
        )
    found = {what: entries[key].value for key, what in roles.scalars.items()}
    tensors = {what: local_tensor(value) for what, value in found.items() if isinstance(value, torch.Tensor)}
    numbers = LateNumbers(tensors)  # of a device all together, and not one by one
    known = {} if late else numbers.read()
    for (name, scalar), value in found.items():
        if (name, scalar) not in tensors:
            local.facts.scalars.setdefault(name, {})[scalar] = value
        elif not late:
            local.facts.scalars.setdefault(name, {})[scalar] = known[name, scalar]
    local.groups.extend(_groups(roles, entries))
    local.facts.groups.extend((group.names, _content(group.options)) for group in local.groups)
    for key in roles.values:
        local.values[key] = entries[key].value
        local.facts.values[key] = _content(entries[key].value, key)
    return replace(local, late=numbers) if late and tensors else local


def _groups(roles: Roles, entries: Mapping[str, StateEntry]) -> list[ParamGroup]:
    options: dict[str, dict[str, Any]] = {}
    for key, (group, option) in roles.options.items():
        value = entries[key].value
        options.setdefault(group, {})[option] = local_tensor(value) if isinstance(value, torch.Tensor) else value
    return param_groups(roles, options, lambda tensor: _content(tensor).hex())


def _digest(raw: Any) -> bytes:
    return xxhash.xxh3_128_digest(raw)


def _content(value: Any, where: str = "value") -> bytes:
    """A digest of a tensor's bytes, or of a plain value. Raises Unsupported for a value that is not plain data."""
    if isinstance(value, torch.Tensor):
        host = local_tensor(value).cpu().contiguous().reshape(-1)
        return _digest(host.view(torch.uint8).numpy() if host.numel() else b"")
    return _digest(json.dumps(plain.encode(value, lambda tensor: _content(tensor).hex(), where)).encode())


# --- all ranks' ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Joined:
    """The state dicts of all ranks, put together."""

    parameters: dict[str, ParameterInfo] = field(default_factory=dict)
    holders: dict[Key, tuple[int, ...]] = field(default_factory=dict)  # the ranks that have this rank's region
    alone: set[Key] = field(default_factory=set)  # tensors of which each rank has its own


def _join(
    local: _Local, facts: Sequence[_RankFacts], me: int, training_state: TrainingState, own: dict[str, Any]
) -> Source:
    joined = _Joined()
    told: dict[Key, dict[int, _TensorFacts]] = {}
    for rank, fact in enumerate(facts):
        for key, held in fact.tensors.items():
            told.setdefault(key, {})[rank] = held
    aliases = _aliases(told)
    scalars = _scalars(facts)
    holdings: list[Holding] = []
    for key in sorted(told):
        name, state = key
        by_rank = told[key]
        held = _agreed(local.entry_of.get(key, name), by_rank)
        owner = aliases.get(name)
        if owner is not None and state == PARAM:
            info = joined.parameters.get(owner) or ParameterInfo(owner, held.shape, {}, held.kind)
            joined.parameters[owner] = replace(info, aliases=(*info.aliases, name))
            continue
        if _alone(by_rank):
            joined.alone.add(key)
            continue
        known = joined.parameters.get(name)
        joined.parameters[name] = ParameterInfo(
            name, held.shape, {}, held.kind, scalars.get(name, {}), known.aliases if known else ()
        )
        blocks = local.blocks.get(key, empty(len(held.shape)))
        holders = _holders(by_rank, me)
        if me not in holders:
            blocks = empty(len(held.shape))
        tensor = local.tensors.get(key, torch.empty(0))
        holdings.append(
            Holding(name, state, held.shape, held.dtype, tensor, blocks, holders or (me,), not held.trained)
        )
    outside = {name for fact in facts for name in fact.outside}
    order = {key[0]: k for k, key in enumerate(local.facts.tensors)}
    parameters = dict(sorted(joined.parameters.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))
    mine, shared = _values(local, facts, me)
    mine.update({local.entry_of[key]: local.tensors[key] for key in joined.alone if key in local.tensors})
    saved = replace(
        training_state,
        param_groups=_param_groups(local, facts, aliases),
        dp_world_size=facts[0].layout.dp,
        extra={**training_state.extra, VALUES: shared, OUTSIDE: sorted(outside)},
    )
    return Source(facts[0].layout, parameters, holdings, saved, {**own, VALUES: mine} if mine else own, local.late)


def _agreed(entry: str, by_rank: Mapping[int, _TensorFacts]) -> _TensorFacts:
    """What all ranks say about a tensor. Raises SaveFailed if they do not agree."""
    first, held = next(iter(by_rank.items()))
    if _alone(by_rank):
        return held
    for rank, other in by_rank.items():
        if (other.shape, other.dtype, other.kind) != (held.shape, held.dtype, held.kind):
            here, there = f"{held.dtype} {list(held.shape)}", f"{other.dtype} {list(other.shape)}"
            raise SaveFailed(f"'{entry}' is {here} on rank {first} and {there} on rank {rank}; nothing was saved")
        if held.trained and None not in (held.content, other.content) and held.content != other.content:
            raise SaveFailed(
                f"'{entry}' is trained and not sharded, but ranks {first} and {rank} hold different values; nothing "
                "was saved"
            )
    return held


def _alone(by_rank: Mapping[int, _TensorFacts]) -> bool:
    """Whether every rank has a tensor of its own by that name, outside the model."""
    return all(held.outside and held.content is not None for held in by_rank.values()) and _differ(by_rank)


def _differ(by_rank: Mapping[int, _TensorFacts]) -> bool:
    return len({(held.content, held.shape, held.dtype) for held in by_rank.values()}) > 1


def _holders(by_rank: Mapping[int, _TensorFacts], me: int) -> tuple[int, ...]:
    """The ranks that share the writing of what this rank holds; () where it holds nothing."""
    if me not in by_rank or not by_rank[me].region:
        return ()
    if by_rank[me].content is not None and _differ(by_rank):
        # Buffers, which nothing keeps equal: the first rank's count, as in torch's and DeepSpeed's own checkpoints.
        return (min(by_rank),)
    return tuple(rank for rank, held in by_rank.items() if held.region == by_rank[me].region)


def _aliases(told: Mapping[Key, Mapping[int, _TensorFacts]]) -> dict[str, str]:
    """Further names of tied tensors -> the first name, if all ranks that can tell agree."""
    out: dict[str, str] = {}
    for (name, state), by_rank in told.items():
        said = {held.memory for held in by_rank.values()} - {""}
        if state == PARAM and len(said) == 1 and name not in said:
            out[name] = said.pop()
    return {name: owner for name, owner in out.items() if owner not in out}


def _scalars(facts: Sequence[_RankFacts]) -> dict[str, dict[str, Any]]:
    """Each parameter's single values, from all ranks. Raises SaveFailed if ranks have different ones."""
    out: dict[str, dict[str, Any]] = {}
    for fact in facts:
        for name, values in fact.scalars.items():
            out.setdefault(name, {}).update(values)
    for rank, fact in enumerate(facts):
        for name, values in fact.scalars.items():
            for value in values:
                if plain.encode(values[value]) != plain.encode(out[name][value]):
                    raise SaveFailed(
                        f"'{name}' has {value} {values[value]!r} on rank {rank} and {out[name][value]!r} on another; "
                        "nothing was saved"
                    )
    return out


def _param_groups(local: _Local, facts: Sequence[_RankFacts], aliases: Mapping[str, str]) -> tuple[ParamGroup, ...]:
    """This rank's groups, with the parameters that only other ranks have (other pipeline stages) added."""
    names: list[dict[str, None]] = [{} for _ in local.groups]
    for rank, fact in enumerate(facts):
        if not fact.groups:
            continue
        told = [options for _, options in fact.groups]
        if told != [options for _, options in facts[0].groups]:
            raise SaveFailed(f"rank {rank} has other param groups than rank 0; nothing was saved")
        for group, (members, _) in zip(names, fact.groups, strict=False):
            group.update(dict.fromkeys(aliases.get(member, member) for member in members))
    return tuple(ParamGroup(tuple(n), group.options) for n, group in zip(names, local.groups, strict=True))


def _values(local: _Local, facts: Sequence[_RankFacts], me: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """This rank's own values, and those that are the same on all ranks."""
    mine: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for key, value in local.values.items():
        alike = all(fact.values.get(key) == facts[me].values[key] for fact in facts)
        (shared if alike else mine)[key] = value
    return mine, shared
