"""Optimizer files of stages 1 and 2 and of BF16_Optimizer.

Sources: ``runtime/zero/stage_1_and_2.py: state_dict`` and ``runtime/bf16_optimizer.py: state_dict``. A group's
parameters lie in one flat buffer in the order of the model file's ``param_shapes``, with the elements of
``param_alignment_paddings`` between them. With round robin, that is the round-robin order, and the files'
``param_slice_mappings`` are wrong and not used. The buffer is cut into equal partitions. The master weights of stages 1
and 2 are saved without the padding at their end, everything else with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ucp import limits
from ucp.catalog import ParamGroup
from ucp.errors import DamagedCheckpoint, Mismatch
from ucp.formats.deepspeed.experts import ordered
from ucp.formats.deepspeed.read import stems
from ucp.formats.deepspeed.read.experts import ExpertFiles
from ucp.formats.deepspeed.read.optimizer_files import (
    FlatState,
    divide_step,
    flat_refs,
    join_states,
    options_of,
    same_on_all_ranks,
    split_state,
)
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.malformed import malformed
from ucp.geometry import Blocks, Shape, numel, whole
from ucp.parallel.zero import flat_offsets, flat_partition, undo_round_robin
from ucp.storage.dtypes import itemsize
from ucp.storage.torch_pt.values import TensorRef

MOMENTUM = "momentum_buffer"
MASTERS = "single_partition_of_fp32_groups"


@dataclass(frozen=True)
class OptimizerContext:
    """What other files say about the optimizer files.

    offloaded: the states were kept on the host (``offload_optimizer``).
    round_robin: ``param_shapes`` has a group's parameters in round-robin order, which is not the optimizer's.
    """

    offloaded: bool
    round_robin: bool
    experts: ExpertFiles


def read(
    builder: Builder,
    optim: Mapping[int, tuple[Path, Mapping[str, Any]]],
    groups: list[dict[str, Shape]],
    aliases: Mapping[str, list[str]],
    facts: OptimizerContext,
) -> list[ParamGroup]:
    """Enter all trainable parameters. ``optim`` is each rank's path and its ``optimizer_state_dict``."""
    for path, sd in optim.values():
        found = len(flat_refs(path, MASTERS, sd.get(MASTERS)))
        if found != len(groups):
            raise DamagedCheckpoint(
                f"{path}: holds {found} param groups, but the model file describes {len(groups)}; files of two runs "
                "are mixed"
            )
    out: list[ParamGroup] = []
    for g, shapes in enumerate(groups):
        names: list[str] = []
        for rank, share in enumerate(facts.experts.shares(optim, g, shapes, _partitions(*optim[0], g))):
            _read_group(builder, share, g, shapes, rank, aliases, facts)
            order = undo_round_robin(list(shapes), len(share)) if facts.round_robin else list(shapes)
            names += [facts.experts.experts.place(n, shapes[n], rank).name for n in order]
        options = same_on_all_ranks(f"the param group {g}", {p: _options(p, sd, g) for p, sd in optim.values()})
        if options is not None:
            options, step = divide_step(options, any("step" in builder.parameters[n].scalars for n in names))
            _into_scalars(builder, names, step)
        out.append(ParamGroup(tuple(ordered(dict.fromkeys(names))), options))
    return out


def _read_group(
    builder: Builder,
    optim: Mapping[int, tuple[Path, Mapping[str, Any]]],
    g: int,
    shapes: Mapping[str, Shape],
    rank: int,
    aliases: Mapping[str, list[str]],
    facts: OptimizerContext,
) -> None:
    """Enter the parameters of one flat buffer, which is cut over these files; rank: the expert-parallel one."""
    dp, experts = len(optim), facts.experts.experts
    shapes = {name: experts.shape(name, shape, rank) for name, shape in shapes.items()}
    masters = {r: flat_refs(p, MASTERS, sd.get(MASTERS)) for r, (p, sd) in optim.items()}
    padding = {r: _padding(path, sd, g) for r, (path, sd) in optim.items()}
    padding = _own_padding({r: masters[r][g].shape[0] for r in optim}, padding)
    sizes = {r: masters[r][g].shape[0] + padding[r] for r in optim}
    if "zero_stage" not in optim[0][1]:  # BF16_Optimizer saves its partitions whole
        sizes = {r: masters[r][g].shape[0] for r in optim}
    size = same_on_all_ranks(f"the partition size of group {g}", {optim[r][0]: sizes[r] for r in optim})
    _check_count(optim, g, dp)
    between = same_on_all_ranks("param_alignment_paddings", {p: _alignment(p, sd, g) for p, sd in optim.values()})
    offsets, total = flat_offsets([numel(s) for s in shapes.values()], between)
    if not total <= size * dp < total + max(size, 1) + 2 * dp * dp:
        raise DamagedCheckpoint(
            f"{optim[0][0]}: group {g} has {dp} partitions of {size} elements, but the model file's parameters "
            f"need {total}; files of two runs are mixed"
        )
    if not facts.round_robin:
        _check_slices(optim, g, {n: (at, numel(s)) for (n, s), at in zip(shapes.items(), offsets, strict=True)}, size)
    cuts = {n: flat_partition(s, at, size) for (n, s), at in zip(shapes.items(), offsets, strict=True)}
    momentum = _whole_momentum(shapes, cuts, dp) if _keeps_whole_momentum(optim[0][1], g, facts.offloaded) else None
    held = {}
    for r, (path, sd) in optim.items():
        with malformed(path, f"the optimizer's state of group {g}"):
            lengths = (size, size - padding[r])
            held[r] = path, _state(builder, path, sd, g, lengths, momentum.lengths[r] if momentum else None)
    states, scalars = join_states(f"group {g}", held)
    by_rank: dict[str, dict[int, TensorRef]] = {"param": {r: masters[r][g] for r in optim}, **states}
    if momentum and MOMENTUM in by_rank:
        _check_momenta(builder, momentum, by_rank[MOMENTUM])
    for name, shape in shapes.items():
        tensors = []
        for state, refs in by_rank.items():
            cut = momentum.blocks[name] if momentum and state == MOMENTUM else cuts[name]
            tensors.append(builder.pieces(name, state, shape, cut, refs))
        placed, first = experts.place(name, shape, rank), experts.is_first(name, rank)
        builder.add_placed(placed, "parameter", tensors, scalars, aliases.get(name, ()), first)


@dataclass(frozen=True)
class _Momentum:
    """Muon's momentum buffers: their length on each rank, where each parameter's lies (on its first rank), and from
    which element on it lies on each of its ranks, with how many there are."""

    lengths: Mapping[int, int]
    blocks: Mapping[str, Blocks]
    places: Mapping[str, tuple[Mapping[int, int], int]]


def _keeps_whole_momentum(sd: Mapping[str, Any], g: int, offloaded: bool) -> bool:
    """Whether this is a group of Muon that keeps momenta of whole matrices, not of partitions.

    At stages 1 and 2 without offload, every rank keeps, end to end, the momentum of every matrix that its partition
    touches. So a matrix cut by a boundary has its momentum on both sides (``_muon_momentum_buffer``).
    """
    base = sd.get("base_optimizer_state")
    return (
        "zero_stage" in sd
        and not offloaded
        and isinstance(base, Mapping)
        and bool(base["param_groups"][g].get("use_muon"))
    )


def _whole_momentum(shapes: Mapping[str, Shape], cuts: Mapping[str, Blocks], dp: int) -> _Momentum:
    lengths = dict.fromkeys(range(dp), 0)
    blocks: dict[str, Blocks] = {}
    places: dict[str, tuple[Mapping[int, int], int]] = {}
    for name, shape in shapes.items():
        own: dict[int, int] = {}
        for r in sorted(set(cuts[name].buffers.tolist())):
            blocks.setdefault(name, whole(shape, lengths[r], r))
            own[r] = lengths[r]
            lengths[r] += numel(shape)
        blocks.setdefault(name, cuts[name])
        places[name] = own, numel(shape)
    return _Momentum(lengths, blocks, places)


def _check_momenta(builder: Builder, momentum: _Momentum, refs: Mapping[int, TensorRef]) -> None:
    """Raise Mismatch if ranks have other momenta of a matrix that their partitions share, by its first elements.

    So it is with DeepSpeed 0.17.6 to 0.19.2 and its ``reduce_scatter``, which brings the gradient of each part to its
    own rank alone: each then orthogonalises another whole matrix.
    """
    for name, (places, count) in momentum.places.items():
        read = {}
        for r, start in places.items() if len(places) > 1 else ():
            ref, width = refs[r], itemsize(refs[r].dtype)
            raw = bytearray(min(count, limits.COPY_ELEMENTS_COUNT) * width)
            builder.read_into(builder.file(ref), ref.offset + start * width, raw)
            read[r] = bytes(raw)
        other = next((r for r in read if read[r] != read[min(read)]), None)
        if other is not None:
            raise Mismatch(
                f"{refs[other].file}: '{name}' ({MOMENTUM}) is not what '{refs[min(read)].file}' has of it, so nothing "
                "says which one a run in another layout would go on from; DeepSpeed's Muon of 0.17.6 to 0.19.2 trains "
                'so with "reduce_scatter": true, and can itself go on in this layout; zero_to_fp32.py gives the weights'
            )


def _padding(path: Path, sd: Mapping[str, Any], g: int) -> int:
    paddings = sd.get("group_paddings")
    with malformed(path, "'group_paddings'"):
        return int(paddings[g]) if paddings else 0


def _own_padding(saved: Mapping[int, int], padding: dict[int, int]) -> dict[int, int]:
    """Each rank's padding, corrected if its file counts more.

    Up to DeepSpeed 0.15 the last rank counts all of a group's padding, even what lies on the ranks before it. It saves
    the slice of its partition that this count leaves. saved: elements of a rank's masters in its file.
    """
    last = max(saved)
    sizes = {saved[rank] + padding[rank] for rank in saved if rank != last}
    size = min(sizes, default=0)
    if len(sizes) != 1 or padding[last] <= size or saved[last] != len(range(size)[: size - padding[last]]):
        return padding
    return {**padding, last: size - saved[last]}


def _alignment(path: Path, sd: Mapping[str, Any], g: int) -> list[int] | None:
    paddings = sd.get("param_alignment_paddings")
    with malformed(path, "'param_alignment_paddings'"):
        return [int(n) for n in paddings[g]] if paddings else None


def _partitions(path: Path, sd: Mapping[str, Any], g: int) -> int:
    """The number of partitions that a group was cut into, if the file says it; else 0."""
    count = sd.get("partition_count")
    with malformed(path, "'partition_count'"):
        return int(count[g] if isinstance(count, (list, tuple)) else count or 0)


def _check_slices(
    optim: Mapping[int, tuple[Path, Mapping[str, Any]]], g: int, places: Mapping[str, tuple[int, int]], size: int
) -> None:
    """Note if a file's slices are another rank's: then the files of two ranks are swapped.

    places: the first element and the number of elements of every parameter in the whole flat buffer.

    A file whose slices fit no rank proves nothing (there are forms of slices that are not known here).
    """
    told = {r: _slices(path, sd, g) for r, (path, sd) in optim.items()}
    if not any(told.values()):
        return
    wanted: dict[int, dict[str, tuple[int, int]]] = {r: {} for r in optim}
    for name, (at, count) in places.items():
        for r in range(at // size, -(-(at + count) // size)) if size else ():
            first, last = max(at, r * size), min(at + count, (r + 1) * size)
            wanted.get(r, {})[name] = (first - r * size, last - first)
    for r, slices in told.items():
        if slices and slices != wanted[r]:
            other = next((k for k, theirs in wanted.items() if theirs == slices), None)
            if other is not None:
                stems.note_swapped(
                    optim[r][0],
                    f"{optim[r][0]}: its 'param_slice_mappings' are those of '{optim[other][0].name}'; the files of "
                    "two ranks were swapped",
                )


def _slices(path: Path, sd: Mapping[str, Any], g: int) -> dict[str, tuple[int, int]]:
    """Name -> (first element, elements) of the group's parameters in this rank's partition, as the file has them."""
    found = sd.get("param_slice_mappings")
    with malformed(path, "'param_slice_mappings'"):
        return {str(name): (int(place.start), int(place.numel)) for name, place in found[g].items()} if found else {}


def _check_count(optim: Mapping[int, tuple[Path, Mapping[str, Any]]], g: int, dp: int) -> None:
    for path, sd in optim.values():
        count = _partitions(path, sd, g)
        if count and count != dp:
            raise DamagedCheckpoint(
                f"{path}: group {g} was cut into {count} partitions, but there are {dp} optimizer files; files "
                "are missing or of two runs"
            )


def _state(
    builder: Builder, path: Path, sd: Mapping[str, Any], g: int, lengths: tuple[int, ...], momentum: int | None
) -> FlatState:
    """One rank's states of one group. An elastic checkpoint keeps a list of states, without the padding."""
    base = sd.get("base_optimizer_state")
    if isinstance(base, (list, tuple)):
        state = dict(base[g])
        if "base_optimizer_state_step" in sd:
            state.setdefault("step", sd["base_optimizer_state_step"])
    elif isinstance(base, Mapping):
        params = base["param_groups"][g]["params"]
        state = base["state"].get(params[0], {}) if params else {}
    else:
        raise DamagedCheckpoint(f"{path}: 'base_optimizer_state' is missing; this is no complete optimizer file")
    if momentum is None:
        return split_state(builder, path, f"group {g}", state, lengths)
    rest = split_state(builder, path, f"group {g}", {k: v for k, v in state.items() if k != MOMENTUM}, lengths)
    own = split_state(builder, path, f"group {g}", {k: v for k, v in state.items() if k == MOMENTUM}, (momentum,))
    return FlatState({**rest.tensors, **own.tensors}, {**rest.scalars, **own.scalars})


def _options(path: Path, sd: Mapping[str, Any], g: int) -> dict[str, Any] | None:
    base = sd["base_optimizer_state"]
    with malformed(path, "'param_groups'"):
        return options_of(base["param_groups"][g]) if isinstance(base, Mapping) else None


def _into_scalars(builder: Builder, names: Iterable[str], step: Mapping[str, Any]) -> None:
    """Give the parameters the count that their group keeps, if they have none."""
    for name in names if step else ():
        info = builder.parameters[name]
        builder.parameters[name] = replace(info, scalars={**step, **info.scalars})
