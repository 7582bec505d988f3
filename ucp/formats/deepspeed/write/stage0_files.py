"""ZeRO stage 0: the optimizer is in the model's file, and that of experts is in files of their own.

Sources of the layout: ``runtime/fp16/fused_optimizer.py`` and ``unfused_optimizer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ucp.formats.deepspeed.write.config import EngineConfig, loss_scale_keys
from ucp.formats.deepspeed.write.groups import PARAM, Flat, flats, group_options, partition, scalar_values
from ucp.formats.deepspeed.write.model_files import ModelRank, model_name, model_state, whole_module
from ucp.formats.shared.apart import put_entry, states_apart
from ucp.formats.shared.torch_files import FileBuilder
from ucp.parallel.mesh import Layout
from ucp.transfer.targets import TargetFile


def stage0_file(share: ModelRank, config: EngineConfig, layout: Layout) -> TargetFile:
    """Everything in one file. In low precision DeepSpeed wraps the optimizer, FusedAdam with flat masters."""
    file = FileBuilder(model_name(share, layout, 0), share.catalog)
    return file.finish(
        model_state(
            share.catalog,
            config,
            layout,
            module=None if share.in_layers else whole_module(file, config, share.is_expert),
            optimizer=stage0_optimizer(file, config),
            param_shapes=None,
            frozen_param_shapes=None,
            shared_params=None,
            frozen_param_fragments=None,
            extra=share.entries(0),
        )
    )


def stage0_optimizer(file: FileBuilder, config: EngineConfig) -> dict[str, Any]:
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
    # The program makes the optimizer. FusedAdam's groups have these keys; torch's and DeepSpeedCPUAdam's have others.
    return all("bias_correction" in group and "amsgrad" not in group for group in groups)


def _inner_state(file: FileBuilder, config: EngineConfig, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The optimizer's own state dict over the module's parameters, numbered through the param groups in turn."""
    catalog = file.catalog
    state: dict[int, dict[str, Any]] = {}
    numbered: list[dict[str, Any]] = []
    number = 0
    apart: dict[str, dict[str, str]] = {}
    for by_itself, (owner, key) in states_apart(catalog.parameters, catalog.parameters).items():
        apart.setdefault(owner, {})[by_itself] = key
    for options, group in zip(groups, catalog.training_state.param_groups, strict=True):
        first = number
        for name in group.names:
            info = catalog.parameters[name]
            values = scalar_values(config, info.scalars)
            values.update({s: file.whole(catalog.tensors[name, s]) for s in info.states if s != PARAM})
            for by_itself, key in apart.get(name, {}).items():
                put_entry(values, key, file.whole(catalog.tensors[by_itself, PARAM]))
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
