"""Which DeepSpeed versions and engines are supported. All others are refused by name, before anything changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ucp.deepspeed.live import releases
from ucp.deepspeed.live.gradients import gradients_of
from ucp.deepspeed.live.outputs import warn_of_outputs
from ucp.deepspeed.live.parallel import layout_of
from ucp.deepspeed.live.pipeline import untied_parameters
from ucp.deepspeed.live.state import warn
from ucp.errors import Mismatch, Unsupported
from ucp.formats.shared.gradients import Gradients
from ucp.tested import TESTED

# Versions with whose live engines the tests have run. Files are read by their keys, whatever version wrote them.
TESTED_VERSIONS = TESTED["deepspeed"]


def check_version(allow_untested: bool, config: Mapping[str, Any] | None = None) -> None:
    """Raise Unsupported for a DeepSpeed version that the tests have not run with, unless it may be tried all the same.

    If the config is given, raise Unsupported, too, for what such a version lacks for an engine of it, and for what any
    version can't do that it asks for.
    """
    if releases.installed() not in TESTED_VERSIONS:
        if not allow_untested:
            raise Unsupported(
                f"DeepSpeed {releases.installed()} has not been tested with this project (tested: "
                f'{", ".join(TESTED_VERSIONS)}); set "ucp": {{"allow_untested_version": true}} to try it'
            )
        if config is not None:
            warn(f"DeepSpeed {releases.installed()} has not been tested with this project; it is tried, by the config")
            releases.require_package(config)
    if config is not None:
        releases.require_asked(config)
        releases.require_counted_devices(config)


def check_engine(engine: Any) -> None:
    """Raise Unsupported naming the first feature of this engine whose state cannot be restored exactly."""
    check_features(engine, "nothing was changed")
    steps = engine.gradient_accumulation_steps()
    if engine.micro_steps % steps:
        raise Mismatch(
            f"load_checkpoint was called in the middle of gradient accumulation ({engine.micro_steps % steps} of "
            f"{steps} micro-steps done); call it right after a step; nothing was changed"
        )


def warn_of_training(engine: Any) -> None:
    """Warn of what this release's own training computes otherwise than others do, whether this project is there or
    not: a resume with another release, or in another layout, goes on otherwise."""
    for text in _odd_training(engine):
        warn(f"DeepSpeed {releases.installed()} {text}")
    warn_of_outputs(engine)


def _odd_training(engine: Any) -> Iterator[str]:
    partitions = engine.zero_optimization_partition_weights()
    if partitions and engine.device.type == "cpu" and not releases.waits_for_every_gather():
        yield (
            "waits for the last of stage 3's gathers alone, and on a CPU (gloo) they "
            "end in any order: now and then its steps compute with weights that have not arrived yet, and ranks differ "
            "without a word. Loads and saves wait for all. Releases since 0.19 do so in training, too"
        )
    steps, optimizer = engine.gradient_accumulation_steps(), engine.optimizer
    on_device = releases.STAGE12.has(optimizer) and not optimizer.cpu_offload
    if steps > 1 and on_device and engine.zero_optimization_stage() == 2 and not releases.stage2_keeps_micro_steps():
        yield (
            f"keeps the gradients of the last micro step alone at stage 2: of {steps} micro steps the others' samples "
            "train nothing, without a word. Stages 1 and 3 and offload to the host add all up, and so do releases "
            "since 0.18.3"
        )
    if (
        releases.BF16.has(optimizer)
        and not releases.PIPELINE.has(engine)
        and not getattr(optimizer, "immediate_grad_update", False)
        and engine.seq_dp_world_size > 1
        and not releases.bf16_optimizer_reduces_all()
    ):
        yield (
            "does not reduce what its BF16_Optimizer has of the last micro step: each rank steps its part of the "
            'weights with the gradients of its own samples. Set "bf16": {"immediate_grad_update": true}, or take a '
            "release since 0.19"
        )
    if _is_bf16_at_stage0(engine) and not releases.zeroes_bf16_at_stage0():
        yield (
            "never zeroes the gradients of bf16 weights at stage 0: each step adds to those of all steps before. Take "
            "stage 1, or a release since 0.18.6"
        )
    if _mixes_sequences(engine):
        yield (
            "takes ranks that share a sequence for slices of one tensor in its layers of experts: each rank's tokens "
            "get outputs that belong to others', without a word. Give initialize a mesh (mpu) whose "
            "get_model_parallel_world_size() is 1"
        )
    if releases.tensor_parallel_size(engine) > 1 and not releases.cuts_module(engine):
        yield (
            "cuts no model by itself: every rank of tensor parallelism trains all of it. Call "
            "deepspeed.tp_model_init(model, tp_size, dtype) before the engine is made, or take a release since 0.18"
        )
    gradients = gradients_of(engine)
    if gradients != Gradients():
        yield (
            f"steps a pipeline with {gradients}, where plain modules and other releases take the mean; the learning "
            "rate and clipping count for that"
        )


def _own_experts(engine: Any) -> list[Any]:
    """DeepSpeed's own layers of experts, if tensor parallelism cuts the rest of the model."""
    if not engine.has_moe_layers or layout_of(engine).tp == 1:
        return []
    return [layer for layer in engine.module.modules() if releases.MOE.has(layer)]


def _mixes_sequences(engine: Any) -> bool:
    """Whether DeepSpeed's own layers of experts take the ranks that share a sequence for slices of one tensor."""
    if not engine.has_moe_layers or engine.sequence_parallel_size == 1 or layout_of(engine).tp > 1:
        return False
    slices = releases.MESH.load().bwc_tensor_model_parallel_world_size(engine.mpu)
    return slices > 1 and any(map(releases.MOE.has, engine.module.modules()))


def _is_bf16_at_stage0(engine: Any) -> bool:
    """In the wrapper that is fp16's, too; some releases take their BF16_Optimizer there."""
    wrapped = releases.FUSED.has(engine.optimizer) or releases.UNFUSED.has(engine.optimizer)
    return wrapped and engine.zero_optimization_stage() == 0 and bool(engine.bfloat16_enabled())


def warn_of_own_saves(engine: Any) -> None:
    """Warn if DeepSpeed's own checkpoints of this engine have no optimizer state, which its save says nothing of."""
    wrapped = releases.FUSED.has(engine.optimizer) or releases.UNFUSED.has(engine.optimizer)
    lost = wrapped and engine.zero_optimization_stage() > 0
    if lost or (_is_bf16_at_stage0(engine) and not releases.saves_bf16_at_stage0()):
        warn(
            f"DeepSpeed {releases.installed()} takes a {type(engine.optimizer).__name__} for this config, and its own "
            'checkpoints leave out what that has; "ucp": {"save": {"format": "universal"}}, which is the default, '
            "saves all of it"
        )


def check_features(engine: Any, consequence: str) -> None:
    """Raise Unsupported for the first feature of this engine whose state is not understood. The consequence ends the
    message."""
    for feature in _unsupported(engine):
        raise Unsupported(f"this engine uses {feature}, which is not supported; {consequence}")


def _unsupported(engine: Any) -> Iterator[str]:
    config = engine._config
    zero = config.zero_config
    if any(getattr(layer, "enable_expert_tensor_parallelism", False) for layer in _own_experts(engine)):
        yield "experts that tensor parallelism cuts, too (enable_expert_tensor_parallelism)"
    if _own_experts(engine) and layout_of(engine).pp > 1:
        yield "DeepSpeed's own mixture-of-experts layers together with tensor and pipeline parallelism"
    for name in untied_parameters(engine.module):
        yield f"a tied module with '{name}', which is not tied itself (tied_weight_attr): stages train own copies"
    partitions = engine.zero_optimization_partition_weights()
    if partitions and getattr(zero, "zero_quantized_nontrainable_weights", False):
        yield "ZeRO++ quantized frozen weights (zero_quantized_nontrainable_weights)"
    if (getattr(zero, "mics_shard_size", -1) or -1) > 0:
        yield "MiCS (mics_shard_size)"
    for name in ("offload_optimizer", "offload_param"):
        offload = getattr(zero, name, None)
        device = getattr(offload, "device", None)
        device = getattr(device, "value", device)  # an enum, or its value
        if device == "nvme" and not partitions:
            yield f"NVMe offload ({name}.device) below stage 3"
        if device == "nvme" and name == "offload_param" and _freezes(engine.module):
            yield "NVMe offload of a model with frozen parameters (offload_param.device)"
        if name == "offload_optimizer" and device == "cpu" and getattr(offload, "super_offload", False):
            yield "SuperOffload (offload_optimizer.super_offload)"
    if getattr(zero, "zenflow", None) is not None:
        yield "ZenFlow (zero_optimization.zenflow)"
    if getattr(engine.optimizer, "save_muon_momentum_buffer_in_memory", False):
        yield "Muon's momentum outside the optimizer's state (zero_optimization.save_muon_momentum_buffer_in_memory)"
    if _shares_muon(engine) and not releases.muon_has_whole_gradients():
        yield (
            f'Muon with "reduce_scatter" of DeepSpeed {releases.installed()}, whose ranks keep different momenta of a '
            'matrix that their partitions share (set "zero_optimization": {"reduce_scatter": false}, or take a release '
            "since 0.19.3)"
        )
    if engine.use_node_local_storage():
        yield "node-local checkpoint storage (checkpoint.use_node_local_storage): every rank must see all files"
    if getattr(engine.optimizer, "offloaded_states", None):
        yield "states that are offloaded at this moment (offload_states); call reload_states first"


def _shares_muon(engine: Any) -> bool:
    """Whether a matrix that Muon steps begins before this rank's partition, and gradients are reduced in parts."""
    zero = engine.optimizer
    if not releases.STAGE12.has(zero) or zero.cpu_offload or not getattr(zero, "reduce_scatter", False):
        return False
    begins = getattr(zero, "first_offset", ())
    return any(at > 0 and g.get("use_muon") for g, at in zip(zero.optimizer.param_groups, begins, strict=False))


def _freezes(module: Any) -> bool:
    """Whether any parameters are not trained."""
    return any(not param.requires_grad for param in module.parameters())
