"""A native DeepSpeed checkpoint of any ZeRO stage and data-parallel degree, as files to be written.

DeepSpeed 0.19.8 loads it without this project. Sources of the layout: ``runtime/engine.py``
(``_common_checkpoint_state``, ``_save_checkpoint``, ``_save_zero_checkpoint`` and their ``_load`` counterparts), and
``state_dict`` and ``load_state_dict`` of ``runtime/zero/stage_1_and_2.py``, ``runtime/zero/stage3.py``,
``runtime/bf16_optimizer.py``, ``runtime/fp16/fused_optimizer.py`` and ``unfused_optimizer.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ucp.catalog import Catalog, ParameterInfo
from ucp.errors import Unsupported
from ucp.formats.deepspeed.write import experts, pipeline, tp_slices
from ucp.formats.deepspeed.write.config import EngineConfig, engine_config, loss_scale_keys, loss_scaler
from ucp.formats.deepspeed.write.experts import Spread
from ucp.formats.deepspeed.write.groups import PARAM, Flat, flats, group_options, partition, scalar_values
from ucp.formats.shared.renaming import best_names
from ucp.formats.shared.torch_files import FileBuilder, PlaceholderPiece
from ucp.geometry import numel
from ucp.parallel import zero
from ucp.parallel.mesh import Layout
from ucp.printable import logger
from ucp.spec.select import Choice
from ucp.storage.torch_pt.values import Size, Standin
from ucp.storage.torch_pt.writer import Placeholder
from ucp.transfer.targets import TargetFile

# The release whose layout is written. Loaders compare it with the releases in which the layout changed.
VERSION = "0.19.8"

# Nothing is cut but by ZeRO and into stages.
NO_SPEC = Choice()

log = logger(__name__)


def plan(
    source: Catalog, layout: Layout, ds_config: Mapping[str, Any] | None = None, choice: Choice = NO_SPEC
) -> list[TargetFile]:
    """The files of a checkpoint that an engine of this layout loads; names are relative to the tag's folder.

    ds_config: the target engine's config; it gives what the layout does not determine (element type, sub_group_size,
    gradient clipping, round_robin_gradients, parameter_alignment, accumulation type, the optimizer's kind). Default:
    the config that the source recorded.

    Raises BadArgument for a config that is missing or contradicts the layout, Unsupported for what such a checkpoint
    cannot hold (each names the parameters or keys), Mismatch where a master weight would lose bits.
    """
    catalog = tp_slices.without_padding(source)
    state = catalog.training_state
    check_groups(catalog)
    config = engine_config(ds_config, state.config, layout.zero, layout.tp)
    if state.clip_grad is not None and state.clip_grad != config.clip_grad:
        log.warning(
            "gradient clipping was %s in the source and is %s in the target's config; the checkpoint gets the latter",
            state.clip_grad,
            config.clip_grad,
        )
    config = replace(config, raw=experts.with_ep(config.raw, layout, ds_config is not None))
    spread = experts.spread(catalog, layout, config.raw)
    if spread is not None:
        return _with_experts(catalog, config, layout, spread)
    stages = pipeline.stages(config.raw, layout)
    if stages is not None and layout.zero == 0 and config.dtype == "bfloat16":
        raise Unsupported(
            f"layout '{layout}': DeepSpeed {VERSION} loads no checkpoint of a bf16 pipeline at ZeRO stage 0, its own "
            "included (it takes one rank's state for a list of all); choose zero=1"
        )
    files: list[TargetFile] = []
    bound = tp_slices.spec_of(choice, layout, config)
    for rank in range(layout.tp):
        own = (
            catalog if bound is None or layout.tp == 1 else tp_slices.sliced(source, bound, layout, rank, config.autotp)
        )
        if stages is None:
            files += _share_files(ModelRank(rank, own), config, layout)
            continue
        if bound is not None:
            own = best_names(own, bound, pipeline.is_name)
        pipeline.check_names(own, stages)
        suffix = "" if layout.tp == 1 else f"-model_{rank:02d}"
        files += pipeline.layer_files(own, stages, lambda file, info: _weight(file, config, info), suffix)
        for stage in range(layout.pp):
            share = pipeline.share(own, stages, stage)
            files += _share_files(ModelRank(stage * layout.tp + rank, share, in_layers=True), config, layout)
    return files


@dataclass(frozen=True)
class ModelRank:
    """What one model-parallel rank's files hold. number: its number in their names. catalog: its own tensors, under its
    own names. in_layers: its weights are in layer files. spread: of its experts, and rank: which of them these are."""

    number: int
    catalog: Catalog
    in_layers: bool = False
    spread: Spread | None = None
    rank: int = 0

    def is_expert(self, name: str) -> bool:
        """Whether a tensor is an expert's, which model files leave out."""
        return self.spread is not None and bool(self.spread.layer_of(name))


def _share_files(share: ModelRank, config: EngineConfig, layout: Layout) -> list[TargetFile]:
    if layout.zero == 0:
        return [_stage0(share, config, layout)]
    cut = flats(share.catalog, config, range(layout.dp))
    return _model_files(share, config, layout, cut) + [
        _optimizer_file(share, config, layout, rank, cut) for rank in range(layout.dp)
    ]


def _with_experts(catalog: Catalog, config: EngineConfig, layout: Layout, spread: Spread) -> list[TargetFile]:
    """A model with experts: their own files, and the rest from the view of each expert-parallel rank."""
    out = experts.files(catalog, spread, lambda file, info: _weight(file, config, info))
    for rank in range(layout.ep):
        share = ModelRank(0, experts.of_rank(catalog, spread, rank), spread=spread, rank=rank)
        if layout.zero == 0:
            out += [_stage0(share, config, layout)] if rank == 0 else []
            file = FileBuilder(f"expp_rank_{rank}_mp_rank_00_optim_states.pt", share.catalog)
            out.append(file.finish({"optimizer": _stage0_optimizer(file, config)}))
            continue
        mine = spread.data_ranks(rank)
        cut = flats(share.catalog, config, range(layout.dp), mine)
        with_model = mine if layout.zero == 3 else [r for r in mine if r == 0]
        out += [_model_file(share, config, layout, data_rank, cut) for data_rank in with_model]
        out += [_optimizer_file(share, config, layout, data_rank, cut) for data_rank in mine]
    return out


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


# --- model files -----------------------------------------------------------------------------------------------------


def _model_files(share: ModelRank, config: EngineConfig, layout: Layout, cut: Sequence[Flat]) -> list[TargetFile]:
    """One file; at stage 3, where each rank holds its pieces of the frozen parameters, one for every rank."""
    if layout.zero < 3:
        return [_model_file(share, config, layout, 0, cut)]
    if any(info.kind == "frozen" for info in share.catalog.parameters.values()):
        return [_model_file(share, config, layout, rank, cut) for rank in range(layout.dp)]
    # Rank 0 knows the tied names; the others' files are all the same.
    out = [_model_file(share, config, layout, rank, cut) for rank in range(min(layout.dp, 2))]
    return out + [replace(out[1], name=_model_name(share, layout, rank)) for rank in range(2, layout.dp)]


def _model_name(share: ModelRank, layout: Layout, rank: int) -> str:
    prefix = f"zero_pp_rank_{rank}_" if layout.zero == 3 else ""
    return f"{prefix}mp_rank_{share.number:02d}_model_states.pt"


def _model_file(share: ModelRank, config: EngineConfig, layout: Layout, rank: int, cut: Sequence[Flat]) -> TargetFile:
    catalog = share.catalog
    file = FileBuilder(_model_name(share, layout, rank), catalog)
    frozen = [info for info in catalog.parameters.values() if info.kind == "frozen"]
    module = None
    if not share.in_layers:
        make_module = partitioned_module if layout.zero == 3 else whole_module
        module = make_module(file, config, share.is_expert)
    shapes = fragments = None
    if module is not None and layout.zero >= 2:
        shapes = OrderedDict((info.name, Size(info.shape)) for info in frozen)
        # Of a frozen expert DeepSpeed would copy the first rank's into all ranks' own: those come from their files.
        if not any(share.is_expert(info.name) for info in frozen):
            fragments = OrderedDict((info.name, _frozen(file, module, info, layout, rank)) for info in frozen)
    trained = [OrderedDict((n, Size(catalog.parameters[n].shape)) for n in flat.names) for flat in cut]
    return file.finish(
        model_state(
            catalog,
            config,
            layout,
            module=module,
            optimizer=None,
            param_shapes=trained,
            frozen_param_shapes=shapes,
            shared_params=_shared(catalog) if rank == 0 else {},
            frozen_param_fragments=fragments,
            extra={} if share.spread is None else share.spread.entries(share.rank, rank),
        )
    )


def model_state(
    catalog: Catalog,
    config: EngineConfig,
    layout: Layout,
    *,
    module: Mapping[str, Placeholder] | None,
    optimizer: Any,
    param_shapes: Any,
    frozen_param_shapes: Any,
    shared_params: Any,
    frozen_param_fragments: Any,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """A model file's content, in the order in which the engine writes it (``_common_checkpoint_state``)."""
    state = catalog.training_state
    return {
        "module": module,
        "buffer_names": [info.name for info in catalog.parameters.values() if info.kind == "buffer"],
        "optimizer": optimizer,
        "param_shapes": param_shapes,
        "frozen_param_shapes": frozen_param_shapes,
        "shared_params": shared_params,
        "frozen_param_fragments": frozen_param_fragments,
        "lr_scheduler": state.lr_scheduler,
        "data_sampler": state.extra.get("data_sampler"),
        "random_ltd": state.extra.get("random_ltd"),
        "skipped_steps": state.skipped_steps or 0,
        "global_steps": state.global_steps or 0,
        "global_samples": state.global_samples or 0,
        "dp_world_size": layout.dp,
        "mp_world_size": layout.tp * layout.pp,
        "checkpoint_parallel_dimensions": {"pp_degree": layout.pp, "tp_degree": layout.tp},
        "ds_config": dict(config.raw),
        "ds_version": VERSION,
        **extra,
        **state.client_state,
    }


def whole_module(
    file: FileBuilder, config: EngineConfig, left_out: Callable[[str], bool] = lambda name: False
) -> OrderedDict[str, Placeholder]:
    """The module's state dict with whole weights: trained ones rounded to the engine's type, all others as they are.

    Names of tied parameters share one tensor. left_out: whether a name has no place there, as experts have none.
    """
    module: OrderedDict[str, Placeholder] = OrderedDict()
    for info in file.catalog.parameters.values():
        if left_out(info.name):
            continue
        module.update(dict.fromkeys((info.name, *info.aliases), _weight(file, config, info)))
    return module


def _weight(file: FileBuilder, config: EngineConfig, info: ParameterInfo) -> Placeholder:
    tensor = file.catalog.tensors[info.name, PARAM]
    return file.whole(tensor, config.dtype, round=True) if info.kind == "parameter" else file.whole(tensor)


def partitioned_module(
    file: FileBuilder, config: EngineConfig, left_out: Callable[[str], bool] = lambda name: False
) -> OrderedDict[str, Placeholder]:
    """The same at stage 3: buffers are whole, parameters empty, since their partitions lie elsewhere."""
    module: OrderedDict[str, Placeholder] = OrderedDict()
    nothing = file.tensor((0,), config.dtype)
    for info in file.catalog.parameters.values():
        if left_out(info.name):
            continue
        weight = file.whole(file.catalog.tensors[info.name, PARAM]) if info.kind == "buffer" else nothing
        module.update(dict.fromkeys((info.name, *info.aliases), weight))
    return module


def _frozen(
    file: FileBuilder, module: Mapping[str, Placeholder], info: ParameterInfo, layout: Layout, rank: int
) -> Placeholder:
    """A frozen parameter as this rank's file has it: whole, or at stage 3 the rank's ceil-sized piece."""
    if layout.zero < 3:
        return module[info.name]
    tensor = file.catalog.tensors[info.name, PARAM]
    blocks = zero.ceil_partition(info.shape, 0, layout.dp)
    mine = blocks.take(blocks.buffers == rank).in_buffer(0)
    return file.tensor((zero.ceil_size(numel(info.shape), layout.dp),), tensor.dtype, [PlaceholderPiece(tensor, mine)])


def _shared(catalog: Catalog) -> dict[str, str]:
    """Tied names: alias -> the name that holds the data."""
    return {alias: info.name for info in catalog.parameters.values() for alias in info.aliases}


# --- optimizer files -------------------------------------------------------------------------------------------------


def _optimizer_file(
    share: ModelRank, config: EngineConfig, layout: Layout, rank: int, cut: Sequence[Flat]
) -> TargetFile:
    prefix = "bf16_" if config.dtype == "bfloat16" else ""
    name = f"{prefix}zero_pp_rank_{rank}_mp_rank_{share.number:02d}_optim_states.pt"
    file = FileBuilder(name, share.catalog)
    write = _stage3_state if layout.zero == 3 else _bf16_state if config.bf16_optimizer else _stage12_state
    state = write(file, config, layout, rank, cut)
    if layout.zero == 3 and share.spread is not None:
        state["ds_zero_partition_groups"] = experts.partition_groups(share.spread, cut, rank)
    return file.finish({"optimizer_state_dict": state, "ds_config": dict(config.raw), "ds_version": VERSION})


def _stage12_state(
    file: FileBuilder, config: EngineConfig, layout: Layout, rank: int, cut: Sequence[Flat]
) -> dict[str, Any]:
    """``DeepSpeedZeroOptimizer.state_dict``: masters without their padding at the end, states with it."""
    return {
        "loss_scaler": loss_scaler(config, file.catalog.training_state.loss_scaler),
        "dynamic_loss_scale": config.dynamic_scale,
        "overflow": False,
        "clip_grad": config.clip_grad,
        "base_optimizer_state": _base_state(file, config, rank, cut),
        "single_partition_of_fp32_groups": [
            partition(file, flat, PARAM, config.master_dtype, rank, trimmed=True) for flat in cut
        ],
        "zero_stage": _zero_stage(layout.zero),
        "group_paddings": [flat.size - flat.lean[rank] for flat in cut],
        "param_alignment_paddings": [list(flat.between) for flat in cut],
        "partition_count": [len(flat.ranks) for flat in cut],
        "ds_version": VERSION,
        "param_slice_mappings": _slices(file.catalog, rank, cut),
    }


def _bf16_state(
    file: FileBuilder, config: EngineConfig, layout: Layout, rank: int, cut: Sequence[Flat]
) -> dict[str, Any]:
    """``BF16_Optimizer.state_dict``: masters are whole partitions, and there is no scaler."""
    return {
        "clip_grad": config.clip_grad,
        "base_optimizer_state": _base_state(file, config, rank, cut),
        "single_partition_of_fp32_groups": [partition(file, flat, PARAM, "float32", rank) for flat in cut],
        "group_paddings": [
            flat.size * len(flat.ranks) - sum(flat.lean.values()) if rank == flat.ranks[-1] else 0 for flat in cut
        ],
        "partition_count": [len(flat.ranks) for flat in cut],
        "ds_version": VERSION,
        "param_slice_mappings": _slices(file.catalog, rank, cut),
    }


def _stage3_state(
    file: FileBuilder, config: EngineConfig, layout: Layout, rank: int, cut: Sequence[Flat]
) -> dict[str, Any]:
    """``DeepSpeedZeroOptimizer_Stage3._rigid_state_dict``: everything by subgroup."""
    return {
        "zero_stage": _zero_stage(3),
        "loss_scaler": loss_scaler(config, file.catalog.training_state.loss_scaler),
        "dynamic_loss_scale": config.dynamic_scale,
        "overflow": False,
        "partition_count": layout.dp,
        "optimizer_state_dict": _base_state(file, config, rank, cut),
        "fp32_flat_groups": [partition(file, flat, PARAM, config.master_dtype, rank) for flat in cut],
    }


def _zero_stage(stage: int) -> Standin:
    return Standin("deepspeed.runtime.zero.config", "ZeroStageEnum", (stage,))


def _base_state(file: FileBuilder, config: EngineConfig, rank: int, cut: Sequence[Flat]) -> dict[str, Any]:
    """The inner optimizer's state dict: it knows the flat buffers only, numbered through the param groups in turn."""
    state = {}
    for number, flat in enumerate(cut):
        values = scalar_values(config, flat.scalars)
        values.update({name: partition(file, flat, name, dtype, rank) for name, dtype in flat.states.items()})
        if values:
            state[number] = values
    groups = [
        {
            **group_options(file.catalog, config, index),
            "params": [number for number, flat in enumerate(cut) if flat.group == index],
        }
        for index in range(len(file.catalog.training_state.param_groups))
    ]
    return {"state": state, "param_groups": groups}


def _slices(catalog: Catalog, rank: int, cut: Sequence[Flat]) -> list[OrderedDict[str, Standin]]:
    """Where this rank's partitions hold which parameter: what DeepSpeed's own converter reads.

    Every parameter is one run in a flat buffer; DeepSpeed lists them in the optimizer's order.
    """
    out = []
    for flat in cut:
        places = {name: (int(blocks.counts.sum()), int(blocks.starts.min())) for name, blocks in flat.held(rank)}
        names = catalog.training_state.param_groups[flat.group].names
        out.append(OrderedDict((name, _address(*places[name])) for name in names if name in places))
    return out


def _address(count: int, start: int) -> Standin:
    return Standin("deepspeed.utils.tensor_fragment", "fragment_address", (), {"numel": count, "start": start})


# --- stage 0 ---------------------------------------------------------------------------------------------------------


def _stage0(share: ModelRank, config: EngineConfig, layout: Layout) -> TargetFile:
    """Everything in one file. In low precision DeepSpeed wraps the optimizer: FusedAdam by flat masters, others not."""
    file = FileBuilder(_model_name(share, layout, 0), share.catalog)
    return file.finish(
        model_state(
            share.catalog,
            config,
            layout,
            module=None if share.in_layers else whole_module(file, config, share.is_expert),
            optimizer=_stage0_optimizer(file, config),
            param_shapes=None,
            frozen_param_shapes=None,
            shared_params=None,
            frozen_param_fragments=None,
            extra={} if share.spread is None else share.spread.entries(share.rank, 0),
        )
    )


def _stage0_optimizer(file: FileBuilder, config: EngineConfig) -> dict[str, Any]:
    """The optimizer's state dict, in the wrapper that DeepSpeed gives to it in low precision."""
    catalog = file.catalog
    groups = [group_options(catalog, config, i) for i in range(len(catalog.training_state.param_groups))]
    saved = catalog.training_state.loss_scaler
    if config.dtype == "float32":
        return _inner_state(file, config, groups)
    optimizer: dict[str, Any]
    if _is_fused(config, groups):
        optimizer = {} if config.dtype == "bfloat16" else loss_scale_keys(config, saved)
        cut = flats(catalog, config, range(1))
        optimizer["optimizer_state_dict"] = _fused_state(file, config, groups, cut)
        optimizer["fp32_groups_flat"] = [partition(file, flat, PARAM, "float32", 0, trimmed=True) for flat in cut]
        optimizer["clip_grad"] = config.clip_grad
    else:
        optimizer = loss_scale_keys(config, saved)
        optimizer["optimizer_state_dict"] = _inner_state(file, config, groups)
        optimizer["fp32_groups"] = [
            [file.whole(catalog.tensors[name, PARAM], "float32") for name in group.names]
            for group in catalog.training_state.param_groups
        ]
    return optimizer


def _is_fused(config: EngineConfig, groups: Sequence[Mapping[str, Any]]) -> bool:
    if config.fused is not None:
        return config.fused
    # The program makes the optimizer; FusedAdam's groups have these keys, torch's and DeepSpeedCPUAdam's others.
    return all("bias_correction" in group and "amsgrad" not in group for group in groups)


def _inner_state(file: FileBuilder, config: EngineConfig, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The optimizer's own state dict over the module's parameters, numbered through the param groups in turn."""
    catalog = file.catalog
    state: dict[int, dict[str, Any]] = {}
    numbered: list[dict[str, Any]] = []
    number = 0
    for options, group in zip(groups, catalog.training_state.param_groups, strict=True):
        first = number
        for name in group.names:
            info = catalog.parameters[name]
            values = scalar_values(config, info.scalars)
            values.update({s: file.whole(catalog.tensors[name, s]) for s in info.states if s != PARAM})
            if values:
                state[number] = values
            number += 1
        numbered.append({**options, "params": list(range(first, number))})
    return {"state": state, "param_groups": numbered}


def _fused_state(
    file: FileBuilder, config: EngineConfig, groups: Sequence[Mapping[str, Any]], cut: Sequence[Flat]
) -> dict[str, Any]:
    """The same over one flat master per param group."""
    state = {}
    for number, flat in enumerate(cut):
        values = scalar_values(config, flat.scalars)
        values.update({s: partition(file, flat, s, dtype, 0, trimmed=True) for s, dtype in flat.states.items()})
        if values:
            state[number] = values
    return {"state": state, "param_groups": [{**g, "params": [i]} for i, g in enumerate(groups)]}
