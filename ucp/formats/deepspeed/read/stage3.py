"""Optimizer files of stage 3, and the frozen parameters that stage 3 cuts in the same way.

Source: ``runtime/zero/stage3.py: _rigid_state_dict``. Each flat buffer belongs to a subgroup. It has every parameter's
ceil-sized piece in the order of ``param_shapes[subgroup]``. torch numbers the optimizer's states through the param
groups in turn, and each param group lists its subgroups in ascending order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ucp.catalog import ParamGroup
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.deepspeed.read.experts import ExpertFiles
from ucp.formats.deepspeed.read.model_files import ModelFile
from ucp.formats.deepspeed.read.optimizer_files import (
    divide_step,
    flat_refs,
    join_states,
    offloaded_to_nvme,
    options_of,
    same_on_all_ranks,
    split_state,
)
from ucp.formats.shared.builder import Builder, Scalar
from ucp.formats.shared.malformed import malformed
from ucp.geometry import Shape, numel
from ucp.parallel.zero import ceil_partition, ceil_size
from ucp.storage.torch_pt.values import TensorRef

MASTERS = "fp32_flat_groups"


def read(
    builder: Builder,
    optim: Mapping[int, tuple[Path, Mapping[str, Any]]],
    groups: list[dict[str, Shape]],
    aliases: Mapping[str, list[str]],
    experts: ExpertFiles,
) -> list[ParamGroup]:
    """Enter all trainable parameters. ``groups`` are the subgroups of the model file's ``param_shapes``."""
    dp = len(optim)
    masters = {r: flat_refs(p, MASTERS, sd.get(MASTERS)) for r, (p, sd) in optim.items()}
    bases = {r: _base(p, sd) for r, (p, sd) in optim.items()}
    for r, (path, sd) in optim.items():
        if len(masters[r]) != len(groups):
            raise DamagedCheckpoint(
                f"{path}: holds {len(masters[r])} subgroups, but the model file describes {len(groups)}; files of two "
                "runs are mixed"
            )
        count = sd.get("partition_count")
        if isinstance(count, int) and count != dp:
            raise DamagedCheckpoint(
                f"{path}: was written by {count} data-parallel ranks, but there are {dp} optimizer files"
            )
    members = same_on_all_ranks(
        "the optimizer's param groups", {path: _members(path, bases[r]) for r, (path, _) in optim.items()}
    )
    flat = [i for ids in members for i in ids]
    if sorted(flat) != list(range(len(groups))):
        raise DamagedCheckpoint(
            f"{optim[0][0]}: the optimizer's param groups list {len(flat)} subgroups, the model file describes "
            f"{len(groups)}"
        )
    options = same_on_all_ranks(
        "the param groups", {optim[r][0]: [options_of(g) for g in bases[r]["param_groups"]] for r in optim}
    )
    states = optim[0][0], bases[0].get("state")
    count = [any(_counts(*states, s) for s in ids) for ids in members]
    divided = [divide_step(of_group, counted) for of_group, counted in zip(options, count, strict=True)]
    for s, shapes in enumerate(groups):
        step = next(divided[g][1] for g, ids in enumerate(members) if s in ids)
        for rank, share in enumerate(experts.shares(optim, s, shapes, _partitions(*optim[0], s))):
            _read_subgroup(builder, share, s, shapes, rank, aliases, experts, step)
    return [
        ParamGroup(tuple(n for s in ids for n in groups[s] if n in builder.parameters), of_group)
        for ids, (of_group, _) in zip(members, divided, strict=True)
    ]


def _counts(path: Path, states: Any, s: int) -> bool:
    """Whether the optimizer's state of a subgroup has a step count."""
    with malformed(path, f"the optimizer's state of subgroup {s}"):
        return "step" in (states.get(s) or {})


def _members(path: Path, base: Mapping[str, Any]) -> list[list[int]]:
    with malformed(path, "'param_groups'"):
        return [list(group["params"]) for group in base["param_groups"]]


def _partitions(path: Path, sd: Mapping[str, Any], s: int) -> int:
    """The number of partitions that a subgroup was cut into. AutoEP's experts are cut into fewer than the rest."""
    found = sd.get("ds_zero_partition_groups")
    with malformed(path, "the count of partitions"):
        return int(found[s]["partition_count"]) if found else int(sd.get("partition_count") or 0)


def _check_rank(path: Path, sd: Mapping[str, Any], s: int, r: int) -> None:
    """Raise DamagedCheckpoint if the file says that it is from another of the ranks that share the subgroup."""
    found = sd.get("ds_zero_partition_groups")
    with malformed(path, "'ds_zero_partition_groups'"):
        said = found[s].get("partition_rank") if found else None
    if isinstance(said, int) and said != r:
        raise DamagedCheckpoint(
            f"{path}: holds partition {said} of subgroup {s}, and by its name it should be {r}; the files of two ranks "
            "were swapped"
        )


def _read_subgroup(
    builder: Builder,
    optim: Mapping[int, tuple[Path, Mapping[str, Any]]],
    s: int,
    shapes: Mapping[str, Shape],
    rank: int,
    aliases: Mapping[str, list[str]],
    experts: ExpertFiles,
    step: Mapping[str, Scalar],
) -> None:
    """Enter the parameters of one subgroup, which is cut over these files; rank: the expert-parallel one."""
    dp, spread = len(optim), experts.experts
    shapes = {name: spread.shape(name, shape, rank) for name, shape in shapes.items()}
    masters = {r: flat_refs(p, MASTERS, sd.get(MASTERS))[s] for r, (p, sd) in optim.items()}
    size = sum(ceil_size(numel(shape), dp) for shape in shapes.values())
    for r, (path, sd) in optim.items():
        _check_rank(path, sd, s, r)
        if size and not masters[r].shape[0]:
            raise offloaded_to_nvme(path, f"subgroup {s} of its masters")
        if masters[r].shape[0] != size:
            raise DamagedCheckpoint(
                f"{path}: subgroup {s} has {masters[r].shape[0]} elements, but the model file's parameters over "
                f"{dp} ranks need {size}; files of two runs are mixed"
            )
    held = {}
    for r, (path, sd) in optim.items():
        with malformed(path, f"the optimizer's state of subgroup {s}"):
            held[r] = path, split_state(builder, path, f"subgroup {s}", _base(path, sd)["state"].get(s, {}), (size,))
    states, scalars = join_states(f"subgroup {s}", held)
    by_rank: dict[str, dict[int, TensorRef]] = {"param": masters, **states}
    offset = 0
    for name, shape in shapes.items():
        blocks = ceil_partition(shape, offset, dp)
        offset += ceil_size(numel(shape), dp)
        tensors = [builder.pieces(name, state, shape, blocks, refs) for state, refs in by_rank.items()]
        placed, first = spread.place(name, shape, rank), spread.is_first(name, rank)
        builder.add_placed(placed, "parameter", tensors, {**step, **scalars}, aliases.get(name, ()), first)


def read_frozen(builder: Builder, models: Mapping[int, ModelFile], aliases: Mapping[str, list[str]]) -> None:
    """Enter frozen parameters, which at stage 3 exist only as each rank's ceil-sized piece in its model file."""
    dp = len(models)
    shapes = models[0].frozen_shapes
    fragments = {r: m.raw.get("frozen_param_fragments") or {} for r, m in models.items()}
    for name, shape in shapes.items():
        refs: dict[int, TensorRef] = {}
        for r, found in fragments.items():
            ref = found.get(name)
            wanted = ceil_size(numel(shape), dp)
            if not isinstance(ref, TensorRef) or ref.numel != wanted:
                raise DamagedCheckpoint(
                    f"{models[r].path}: the fragment of the frozen parameter '{name}' (shape {list(shape)}) is missing "
                    f"or has another size than {wanted} elements"
                )
            if ref.dtype == "int8" and _quantizes_frozen(models[r]):
                raise Unsupported(
                    f"{models[r].path}: holds the frozen parameter '{name}' as 8-bit codes without their scales, as "
                    "DeepSpeed saves it under 'zero_quantized_nontrainable_weights'; its values are in no file: save "
                    "without that key"
                )
            refs[r] = ref
        tensor = builder.pieces(name, "param", shape, ceil_partition(shape, 0, dp), refs)
        builder.add(name, "frozen", [tensor], None, aliases.get(name, ()))


def _quantizes_frozen(model: ModelFile) -> bool:
    zero = model.config.get("zero_optimization")
    return isinstance(zero, Mapping) and bool(zero.get("zero_quantized_nontrainable_weights"))


def _base(path: Path, sd: Mapping[str, Any]) -> Mapping[str, Any]:
    base = sd.get("optimizer_state_dict")
    if not isinstance(base, Mapping) or "param_groups" not in base:
        raise DamagedCheckpoint(f"{path}: the optimizer's own state dict is missing; this is no complete stage-3 file")
    return base
