"""The optimizer files of ZeRO stages 1 to 3.

Sources of the layout: ``state_dict`` of ``runtime/zero/stage_1_and_2.py``, ``runtime/bf16_optimizer.py`` and
``runtime/zero/stage3.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from ucp.catalog import Catalog
from ucp.formats.deepspeed.write import experts
from ucp.formats.deepspeed.write.config import VERSION, EngineConfig, loss_scaler
from ucp.formats.deepspeed.write.groups import PARAM, Flat, group_options, partition, scalar_values
from ucp.formats.deepspeed.write.model_files import ModelRank
from ucp.formats.shared.torch_files import FileBuilder
from ucp.parallel.mesh import Layout
from ucp.storage.torch_pt.values import Standin
from ucp.transfer.targets import TargetFile


def optimizer_file(
    share: ModelRank, config: EngineConfig, layout: Layout, rank: int, cut: Sequence[Flat]
) -> TargetFile:
    prefix = "bf16_" if config.dtype == "bfloat16" else ""
    place, folding = share.place(rank), {}
    name = f"{prefix}zero_pp_rank_{place}_mp_rank_{share.number:02d}_optim_states.pt"
    file = FileBuilder(name, share.catalog)
    write = _stage3_state if layout.zero == 3 else _bf16_state if config.bf16_optimizer else _stage12_state
    state = write(file, config, layout, rank, cut)
    if layout.zero == 3 and share.spread is not None:
        state["ds_zero_partition_groups"] = experts.partition_groups(share.spread, cut, rank)
    if share.spread is not None:
        said = share.spread.folding(share.rank, share.number, "zero_optimizer_state", "per_family", (place, layout.dp))
        families = {"param_families": share.spread.families(cut, rank)} if layout.zero < 3 else {}
        folding = {key: {**value, **families} for key, value in said.items()}
    found = {"optimizer_state_dict": state, "ds_config": dict(config.raw), "ds_version": VERSION}
    return file.finish({**found, **folding})


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
