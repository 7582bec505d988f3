"""An optimizer's param groups as the flat buffers that each ZeRO stage keeps: who lies where, on which rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ucp.catalog import Catalog, ParameterInfo
from ucp.errors import Unsupported
from ucp.formats.deepspeed.write.config import EngineConfig
from ucp.formats.shared.torch_files import FileBuilder, PlaceholderPiece
from ucp.geometry import Blocks, numel, whole
from ucp.parallel import zero
from ucp.storage.dtypes import itemsize
from ucp.storage.torch_pt.pickler import Placeholder
from ucp.storage.torch_pt.writer import scalar_tensor
from ucp.transfer.exact import EXACT

PARAM = "param"


@dataclass(frozen=True)
class Flat:
    """One flat buffer that is cut over the ranks.

    names: its parameters in order.
    ranks: the data-parallel ranks that it is cut over, in order.
    size: elements of every rank's partition.
    lean: for each rank, the elements before the padding at the end.
    between: elements of padding after each parameter.
    states: the optimizer states that all its parameters have, with their element type.
    scalars: the values that its parameters share.
    whole_states: the states that a rank keeps whole, end to end, for each parameter that it holds any part of, instead
    of a partition.
    """

    group: int
    names: tuple[str, ...]
    ranks: Sequence[int]
    size: int
    lean: Mapping[int, int]
    between: tuple[int, ...]
    states: Mapping[str, str]
    scalars: Mapping[str, Any]
    whole_states: frozenset[str] = frozenset()
    _by_rank: Mapping[int, tuple[tuple[str, Blocks], ...]] = field(repr=False, default_factory=dict)

    def held(self, rank: int) -> tuple[tuple[str, Blocks], ...]:
        """The parameters of which this rank holds elements, with their places in its partition."""
        return self._by_rank.get(rank, ())


def check_groups(catalog: Catalog) -> None:
    """Refuse a source whose optimizer's groups don't hold exactly the trained parameters."""
    groups = catalog.training_state.param_groups
    grouped = [name for group in groups for name in group.names]
    trained = [info.name for info in catalog.parameters.values() if info.kind == "parameter"]
    if not grouped:
        raise Unsupported("the source has no optimizer param groups, which a native DeepSpeed checkpoint is ordered by")
    missing, unknown = sorted(set(trained) - set(grouped)), sorted(set(grouped) - set(trained))
    if missing or unknown or len(set(grouped)) != len(grouped):
        what = "lies in no param group" if missing else "is in a param group, but is no trained parameter"
        name = (missing or unknown or sorted({n for n in grouped if grouped.count(n) > 1}))[0]
        if not missing and not unknown:
            what = "lies in two param groups"
        raise Unsupported(f"'{name}' {what}; a native DeepSpeed checkpoint has every trained parameter in one group")


def flats(
    catalog: Catalog, config: EngineConfig, ranks: Sequence[int], of_experts: Sequence[int] | None = None
) -> list[Flat]:
    """The flat buffers of stages 1 to 3: one for each param group, or for each subgroup at stage 3.

    ranks: the data-parallel ranks over which they are cut; of_experts: those for groups of experts, where others.

    Raises Unsupported, naming the parameters, where those of one buffer differ in their optimizer states or steps: a
    buffer has one set of states, and one step, for all.
    """
    out = []
    for index, group in enumerate(catalog.training_state.param_groups):
        infos = [catalog.parameters[name] for name in group.names]
        sharers = of_experts if of_experts is not None and (group.options or {}).get("moe") else ranks
        if config.stage < 3:
            out.append(_cut_flat(catalog, config, index, infos, sharers))
            continue
        pieces = [zero.ceil_size(numel(info.shape), len(sharers)) for info in infos]
        for members in zero.subgroups(pieces, config.sub_group_size):
            out.append(_cut_ceil(catalog, index, [infos[i] for i in members], sharers))
    return out


def _cut_flat(
    catalog: Catalog, config: EngineConfig, group: int, infos: list[ParameterInfo], ranks: Sequence[int]
) -> Flat:
    dp = len(ranks)
    if config.round_robin and not config.bf16_optimizer:
        infos = [infos[i] for i in zero.round_robin(len(infos), dp)]
    numels = [numel(info.shape) for info in infos]
    between = [0] * len(infos)
    if config.alignment and config.stage and not config.bf16_optimizer:
        between = zero.alignment_paddings(numels, config.alignment, itemsize(config.dtype))
    offsets, total = zero.flat_offsets(numels, between)
    size = zero.partition_size(total, dp)
    blocks = {i.name: zero.flat_partition(i.shape, at, size) for i, at in zip(infos, offsets, strict=True)}
    lean = [min(max(total - rank * size, 0), size) for rank in range(dp)]
    flat = _flat(catalog, group, infos, ranks, size, lean, between, blocks)
    muon = (catalog.training_state.param_groups[group].options or {}).get("use_muon")
    if muon and config.stage in (1, 2) and not config.bf16_optimizer and not config.offloads_optimizer:
        # stage_1_and_2.py: _muon_momentum_buffer. Muon orthogonalises whole matrices.
        return replace(flat, whole_states=frozenset({"momentum_buffer"} & set(flat.states)))
    return flat


def _cut_ceil(catalog: Catalog, group: int, infos: list[ParameterInfo], ranks: Sequence[int]) -> Flat:
    dp = len(ranks)
    offsets, size = zero.flat_offsets([zero.ceil_size(numel(info.shape), dp) for info in infos])
    blocks = {i.name: zero.ceil_partition(i.shape, at, dp) for i, at in zip(infos, offsets, strict=True)}
    return _flat(catalog, group, infos, ranks, size, [size] * dp, [0] * len(infos), blocks)


def _flat(
    catalog: Catalog,
    group: int,
    infos: list[ParameterInfo],
    ranks: Sequence[int],
    size: int,
    lean: Sequence[int],
    between: Sequence[int],
    blocks: Mapping[str, Blocks],
) -> Flat:
    by_rank: dict[int, list[tuple[str, Blocks]]] = {}
    for name, placed in blocks.items():
        for rank in np.unique(placed.buffers).tolist():
            mine = placed.take(placed.buffers == rank).in_buffer(0)
            by_rank.setdefault(ranks[rank], []).append((name, mine))
    return Flat(
        group=group,
        names=tuple(info.name for info in infos),
        ranks=ranks,
        size=size,
        lean=dict(zip(ranks, lean, strict=True)),
        between=tuple(between),
        states=_common_states(catalog, infos),
        scalars=_common_scalars(infos),
        _by_rank={rank: tuple(held) for rank, held in by_rank.items()},
    )


def _common_states(catalog: Catalog, infos: list[ParameterInfo]) -> dict[str, str]:
    first = infos[0]
    wanted = {state for state in first.states if state != PARAM}
    for info in infos:
        found = {state for state in info.states if state != PARAM}
        if found != wanted:
            raise Unsupported(
                f"'{first.name}' has the optimizer states {sorted(wanted)} and '{info.name}', which shares a flat "
                f"buffer with it under this layout, has {sorted(found)}; a buffer has the same states throughout"
            )
    out: dict[str, str] = {}
    for state in sorted(wanted, key=list(first.states).index):
        types = {catalog.tensors[info.name, state].dtype for info in infos}
        widest = max(types, key=itemsize)
        if any(dtype != widest and (dtype, widest) not in EXACT for dtype in types):
            raise Unsupported(
                f"the state '{state}' of '{first.name}' and of others that share a flat buffer with it has the element "
                f"types {sorted(types)}, of which none holds all values"
            )
        out[state] = widest
    return out


def _common_scalars(infos: list[ParameterInfo]) -> dict[str, Any]:
    first = infos[0]
    for info in infos:
        if dict(info.scalars) != dict(first.scalars):
            differing = sorted(
                key
                for key in {*info.scalars, *first.scalars}
                if info.scalars.get(key) != first.scalars.get(key) or (key in info.scalars) != (key in first.scalars)
            )
            raise Unsupported(
                f"'{first.name}' and '{info.name}' differ in {', '.join(repr(k) for k in differing)} "
                f"({_shown(first, differing)} and {_shown(info, differing)}), but share a flat buffer under this "
                "layout, which has one value for all; a layout with zero=0 keeps them apart"
            )
    return dict(first.scalars)


def _shown(info: ParameterInfo, keys: Sequence[str]) -> str:
    return ", ".join(str(info.scalars.get(key, "none")) for key in keys)


def partition(file: FileBuilder, flat: Flat, state: str, dtype: str, rank: int, trimmed: bool = False) -> Placeholder:
    """One rank's partition of a flat buffer, with the padding or (``trimmed``) without it."""
    tensors = file.catalog.tensors
    if state in flat.whole_states:
        held = [tensors[name, state] for name, _ in flat.held(rank)]
        offsets, total = zero.flat_offsets([numel(tensor.shape) for tensor in held])
        placed = [PlaceholderPiece(t, whole(t.shape, at)) for t, at in zip(held, offsets, strict=True)]
        return file.tensor((total,), dtype, placed)
    pieces = [PlaceholderPiece(tensors[name, state], blocks) for name, blocks in flat.held(rank)]
    return file.tensor((flat.lean[rank] if trimmed else flat.size,), dtype, pieces)


def scalar_values(config: EngineConfig, scalars: Mapping[str, Any]) -> dict[str, Any]:
    """Per-parameter values in the form that the target's optimizer keeps them in.

    torch's optimizers count in 0-d tensors, DeepSpeed's own in Python numbers. Where the config does not say whose the
    optimizer is, the form is the source's: readers give a tensor's value as a float and a number as an int.
    """
    out: dict[str, Any] = {}
    for key, value in scalars.items():
        as_tensor = isinstance(value, float)
        if key == "step" and config.step_is_tensor is not None:
            as_tensor = config.step_is_tensor
        if as_tensor:
            exact = not isinstance(value, float) or value != value or float(np.float32(value)) == value
            out[key] = scalar_tensor(float(value), "float32" if exact else "float64")
        elif isinstance(value, float) and value.is_integer():
            out[key] = int(value)
        else:
            out[key] = value
    return out


def group_options(catalog: Catalog, config: EngineConfig, index: int) -> dict[str, Any]:
    """A param group's hyperparameters. Raises Unsupported where the source did not record them."""
    options = catalog.training_state.param_groups[index].options
    if options is None:
        raise Unsupported(
            f"the hyperparameters of param group {index} are not in the source (elastic checkpoints leave them out), "
            "and a native checkpoint needs them; resume the source in an engine instead"
        )
    out = {key: value for key, value in options.items() if key != "params"}
    if config.step_is_tensor is False and config.optimizer in ("adam", "adamw"):
        out.setdefault("bias_correction", True)  # torch's Adam has no such key, DeepSpeed's reads it in every step
    return out
