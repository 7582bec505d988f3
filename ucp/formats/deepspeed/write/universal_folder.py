"""DeepSpeed's own universal folder, as files to be written; stock DeepSpeed loads it with ``load_universal``.

Layout (``checkpoint/ds_to_universal.py``): ``zero/<parameter>/{fp32,exp_avg,...}.pt``, each ``{param, cat_dim}``;
``step.pt`` beside them; ``zero/optimizer_state.pt`` with what belongs to no parameter; and a model file for counters,
scheduler and client state. Readers: ``checkpoint/universal_checkpoint.py: load_hp_checkpoint_state`` (stages 1 and 2,
BF16_Optimizer) and ``runtime/zero/stage3.py: load_hp_checkpoint_state_from_checkpoint_dir_stage3``.

The converter writes a folder for one of the two families of stages, by the source's. Here it serves both, whatever
the stage of the source was, unless stage 3 would load something wrong from it: that reader knows Adam's two states
only, and one step count for all parameters. It also gives all param groups the first one's hyperparameters; so those
that differ between groups are left out of what it reads, and a stage-3 engine keeps its own.

What stays wrong in DeepSpeed's loading, whoever wrote the folder: frozen parameters and buffers are not restored,
weights land on other parameters under ``round_robin_gradients``, and a rank that holds nothing of a param group fails.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from ucp.catalog import Catalog, ParameterInfo
from ucp.errors import BadArgument, Unsupported
from ucp.formats.deepspeed.experts import expert_of
from ucp.formats.deepspeed.write.config import VERSION, EngineConfig, engine_config, loss_scaler
from ucp.formats.deepspeed.write.experts import refuse_stacks
from ucp.formats.deepspeed.write.groups import PARAM, check_groups, group_options, scalar_values
from ucp.formats.deepspeed.write.model_files import model_state, partitioned_module, whole_module
from ucp.formats.shared import affine_maps
from ucp.formats.shared.torch_files import FileBuilder
from ucp.geometry import whole
from ucp.parallel.mesh import Layout
from ucp.printable import logger
from ucp.storage import names
from ucp.storage.torch_pt.values import Size
from ucp.transfer.targets import TargetFile

log = logger(__name__)

_ADAM = {"exp_avg", "exp_avg_sq"}


def plan(catalog: Catalog) -> list[TargetFile]:
    """The files of DeepSpeed's universal folder; names are relative to the folder that ``latest_universal`` names.

    Raises Unsupported for optimizer values that the format has no place for, and for a source that records no param
    groups; BadArgument where it records no DeepSpeed config.
    """
    check_groups(catalog)
    if not catalog.training_state.config:
        raise BadArgument(
            "the source records no DeepSpeed config, which this form's element types and loss scale follow; convert it "
            "to 'deepspeed' with --ds-config first, and that to 'deepspeed-universal'"
        )
    state, layout = catalog.training_state, catalog.layout
    config = engine_config(None, state.config, layout.zero, layout.tp, state.clip_grad)
    refuse_stacks(catalog)
    experts = next((name for name in catalog.parameters if expert_of(name)), None)
    if experts:
        raise Unsupported(
            f"'{experts}' is an expert's: DeepSpeed's universal format has no place for experts of its own layers; use "
            "--to universal, or --to deepspeed with the target's layout"
        )
    trained = [catalog.parameters[name] for group in catalog.training_state.param_groups for name in group.names]
    for info in trained:
        _refuse_scalars(info)
    options = [_options(catalog, config, index) for index in range(len(catalog.training_state.param_groups))]
    with_stage_3 = _fits_stage_3(trained, options)
    out = [_model_file(catalog, config)]
    if with_stage_3:
        out.append(_stage3_model_file(catalog, config))
    out.append(_optimizer_file(catalog, config, options, trained if with_stage_3 else []))
    for info in trained:
        out += _parameter_files(catalog, config, info)
    return out


def _refuse_scalars(info: ParameterInfo) -> None:
    others = sorted(set(info.scalars) - {"step"})
    if others:
        raise Unsupported(
            f"'{info.name}' has the optimizer values {', '.join(map(repr, others))} beside its states; DeepSpeed's "
            "universal format has a place for 'step' only"
        )


def _options(catalog: Catalog, config: EngineConfig, index: int) -> dict[str, Any]:
    """A param group's hyperparameters. If the source has none, this is empty, and the engine keeps its own."""
    if catalog.training_state.param_groups[index].options is None:
        return {}
    return group_options(catalog, config, index)


def _fits_stage_3(trained: Sequence[ParameterInfo], options: Sequence[Mapping[str, Any]]) -> bool:
    reasons = []
    if any(set(info.states) - {PARAM} != _ADAM for info in trained):
        reasons.append("its optimizer's states are not Adam's")
    elif len({info.scalars.get("step") for info in trained}) > 1 or "step" not in trained[0].scalars:
        reasons.append("its parameters don't share one step count")
    if reasons:
        log.warning("the universal folder can be loaded at stages 1 and 2, but not at stage 3: %s", "; ".join(reasons))
        return False
    differing = sorted({key for group in options for key in group} - set(_common(options)))
    if differing:
        log.warning(
            "param groups differ in %s, and DeepSpeed's stage 3 loads one group's hyperparameters for all: there, the "
            "engine keeps its own for these",
            ", ".join(differing),
        )
    return True


def _common(options: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Hyperparameters that all groups have with the same value."""
    return {
        key: value
        for key, value in options[0].items()
        if all(key in other and other[key] == value for other in options[1:])
    }


def _model_file(catalog: Catalog, config: EngineConfig) -> TargetFile:
    file = FileBuilder("mp_rank_00_model_states.pt", catalog)
    return file.finish(_state(catalog, config, whole_module(file, config), None))


def _stage3_model_file(catalog: Catalog, config: EngineConfig) -> TargetFile:
    """Stage 3 reads rank 0's file alone, and nothing of the module from it; frozen weights are there for people."""
    file = FileBuilder("zero_pp_rank_0_mp_rank_00_model_states.pt", catalog)
    fragments = OrderedDict(
        (info.name, file.whole(catalog.tensors[info.name, PARAM]))
        for info in catalog.parameters.values()
        if info.kind == "frozen"
    )
    return file.finish(_state(catalog, config, partitioned_module(file, config), fragments))


def _state(catalog: Catalog, config: EngineConfig, module: Any, fragments: Any) -> dict[str, Any]:
    infos = catalog.parameters
    groups = catalog.training_state.param_groups
    frozen = OrderedDict((info.name, Size(info.shape)) for info in infos.values() if info.kind == "frozen")
    return model_state(
        catalog,
        config,
        Layout(dp=catalog.layout.dp, zero=catalog.layout.zero),
        module=module,
        optimizer=None,
        param_shapes=[OrderedDict((name, Size(infos[name].shape)) for name in group.names) for group in groups],
        frozen_param_shapes=None if fragments is None else frozen,
        shared_params={alias: info.name for info in infos.values() for alias in info.aliases},
        frozen_param_fragments=fragments,
        extra={"universal_checkpoint_info": _maps(catalog)},
    )


def _maps(catalog: Catalog) -> dict[str, Any]:
    """Affine maps of what the folder holds: every parameter whole, on one rank."""
    shapes = {info.name: info.shape for info in catalog.parameters.values() if info.kind == "parameter"}
    return affine_maps.info({n: affine_maps.entry(shape, [(shape, whole(shape))]) for n, shape in shapes.items()})


def _optimizer_file(
    catalog: Catalog, config: EngineConfig, options: Sequence[Mapping[str, Any]], for_stage_3: Sequence[ParameterInfo]
) -> TargetFile:
    """What belongs to no parameter. Stages 1 and 2 read ``param_groups``, stage 3 ``optimizer_state_dict``."""
    state: dict[str, Any] = {
        "loss_scaler": loss_scaler(config, catalog.training_state.loss_scaler),
        "dynamic_loss_scale": config.dynamic_scale,
        "overflow": False,
        "clip_grad": config.clip_grad,
        "ds_version": VERSION,
        "param_groups": [{**group, "params": [index]} for index, group in enumerate(options)],
    }
    if for_stage_3:
        state["optimizer_state_dict"] = {
            "state": {0: scalar_values(config, for_stage_3[0].scalars)},
            "param_groups": [{**_common(options), "params": [0]}],
        }
    file = FileBuilder("zero/optimizer_state.pt", catalog)
    return file.finish(state)


def _parameter_files(catalog: Catalog, config: EngineConfig, info: ParameterInfo) -> list[TargetFile]:
    advice = "DeepSpeed's universal folder has one for each; --to universal keeps any name"
    folder = names.entry(info.name, "the parameter", advice=advice)
    out = []
    for state in info.states:
        stem = "fp32" if state == PARAM else names.entry(state, f"the state of '{folder}'", advice=advice)
        file = FileBuilder(f"zero/{folder}/{stem}.pt", catalog)
        tensor = catalog.tensors[info.name, state]
        out.append(file.finish({"param": file.whole(tensor, _dtype(config, state, tensor.dtype)), "cat_dim": 0}))
    for name, value in scalar_values(config, info.scalars).items():
        out.append(FileBuilder(f"zero/{folder}/{name}.pt", catalog).finish(value))
    return out


def _dtype(config: EngineConfig, state: str, dtype: str) -> str:
    """Masters get the engine's own type, which may be wider than the source's. Other states keep theirs."""
    return config.master_dtype if state == PARAM else dtype
