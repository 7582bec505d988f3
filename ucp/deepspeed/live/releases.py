"""What the installed release of DeepSpeed has: the one place that knows how releases differ.

Each difference is a capability with a name. The package or the engine itself is asked for it, and never a version
number, so that a release which nobody has tried yet answers for itself. A class is recognised without importing it: if
its module has not been imported, nothing is an instance of it. If something that is needed is missing, the refusal
names it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucp.errors import Unsupported
from ucp.formats.shared.gradients import AGAIN, MEAN, SUM
from ucp.parallel.zero import flat_offsets


@dataclass(frozen=True)
class EngineClass:
    """A class of DeepSpeed, and the attributes of its instances that are used here."""

    module: str
    name: str
    uses: tuple[str, ...] = ()

    def has(self, value: Any) -> bool:
        """Whether this is an instance."""
        kind = getattr(sys.modules.get(self.module), self.name, None)
        return isinstance(kind, type) and isinstance(value, kind)


@dataclass(frozen=True)
class EngineModule:
    """A module of DeepSpeed, and its functions that are called."""

    module: str
    functions: tuple[str, ...]

    def load(self) -> Any:
        """The module. Raises Unsupported, by name, if the release lacks it or one of its functions."""
        try:
            module = importlib.import_module(self.module)
        except ImportError as error:
            raise lacks(f"the module '{self.module}' ({error})") from error
        for name in self.functions:
            if not hasattr(module, name):
                raise lacks(f"'{self.module}.{name}'")
        return module


_FLAT = ("optimizer", "real_dp_process_group", "update_lp_params", "_lazy_init_hp_params_optimizer_state")
STAGE12 = EngineClass(
    "deepspeed.runtime.zero.stage_1_and_2",
    "DeepSpeedZeroOptimizer",
    (*_FLAT, "single_partition_of_fp32_groups", "round_robin_bit16_groups", "bit16_groups_flat", "cpu_offload"),
)
BF16 = EngineClass(
    "deepspeed.runtime.bf16_optimizer", "BF16_Optimizer", (*_FLAT, "fp32_groups_flat_partition", "bf16_groups")
)
STAGE3 = EngineClass(
    "deepspeed.runtime.zero.stage3",
    "DeepSpeedZeroOptimizer_Stage3",
    (
        "optimizer",
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "sub_group_to_group_id",
        "checkpoint_event_prologue",
        "checkpoint_event_epilogue",
        "persistent_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
        "_swappable_optimizer_subgroup",
    ),
)
OFFLOAD = EngineClass(
    "deepspeed.runtime.zero.parameter_offload",
    "DeepSpeedZeRoOffload",
    ("partition_all_parameters", "persistent_parameters"),
)
FUSED = EngineClass(
    "deepspeed.runtime.fp16.fused_optimizer",
    "FP16_Optimizer",
    ("optimizer", "fp16_groups", "fp16_groups_flat", "fp32_groups_flat"),
)
UNFUSED = EngineClass(
    "deepspeed.runtime.fp16.unfused_optimizer", "FP16_UnfusedOptimizer", ("optimizer", "fp16_groups", "fp32_groups")
)
FUSED_ADAM = EngineClass("deepspeed.ops.adam", "FusedAdam")
MOE = EngineClass("deepspeed.moe.layer", "MoE", ("num_local_experts", "expert_group_name"))
AUTOEP = EngineClass(
    "deepspeed.module_inject.auto_ep_layer",
    "AutoEPMoELayer",
    ("expert_placement_descriptor", "ep_group_name", "experts"),
)

PIPELINE = EngineClass("deepspeed.runtime.pipe.engine", "PipelineEngine")

_OPTIMIZERS = (STAGE12, BF16, STAGE3, OFFLOAD, FUSED, UNFUSED)
_LAYERS = (MOE, AUTOEP)

MESH = EngineModule("deepspeed.utils.bwc", ("bwc_tensor_model_parallel_world_size", "bwc_pipeline_parallel_world_size"))
EXPERT_GROUPS = EngineModule(
    "deepspeed.utils.groups",
    ("_get_expert_parallel_world_size", "_get_expert_parallel_rank", "_get_expert_data_parallel_group"),
)
GENERATORS = EngineModule("deepspeed.runtime.activation_checkpointing.checkpointing", ("get_cuda_rng_tracker",))
GRADIENTS = EngineModule("deepspeed.utils", ("safe_get_full_grad",))
ACCELERATOR = EngineModule("deepspeed.accelerator", ("get_accelerator",))
PARTITIONS = EngineModule("deepspeed.runtime.zero.partition_parameters", ("Init",))

# What is read, set or called on every engine.
ENGINE = (
    "_checkpoint_tag_validation",
    "_config",
    "bfloat16_enabled",
    "curriculum_learning_enabled",
    "device",
    "global_samples",
    "global_steps",
    "gradient_accumulation_steps",
    "has_moe_layers",
    "load_checkpoint",
    "lr_scheduler",
    "micro_steps",
    "module",
    "mp_world_size",
    "mpu",
    "optimizer",
    "param_names",
    "random_ltd_enabled",
    "register_forward_hook",
    "save_checkpoint",
    "seq_data_parallel_group",
    "seq_dp_world_size",
    "sequence_parallel_size",
    "skipped_steps",
    "step",
    "tput_timer",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "training_dataloader",
    "use_node_local_storage",
    "zero_optimization_partition_weights",
    "zero_optimization_stage",
)

ENGINE_CLASS = EngineClass("deepspeed.runtime.engine", "DeepSpeedEngine", ENGINE)
# Sections of a config that a release which does not know them ignores without a word: the key and what it must be for
# the section to ask for something, what that is, and what of the engine's class does it.
_ASKED = (
    ("tensor_parallel", "autotp_size", "AutoTP for training", "autotp_size"),
    ("expert_parallel", "enabled", "AutoEP", "_configure_expert_parallel"),
)
# What engines of a ZeRO stage are always made of; at stage 0 that depends on more than the stage.
CLASSES_OF_STAGE = {1: (STAGE12,), 2: (STAGE12,), 3: (STAGE3, OFFLOAD)}


def installed() -> str:
    """The installed release, as it calls itself."""
    return str(getattr(sys.modules.get("deepspeed"), "__version__", "of an unknown version"))


def lacks(what: str) -> Unsupported:
    """The refusal of a release that lacks what is needed."""
    return Unsupported(f"DeepSpeed {installed()} lacks {what}, which loads and saves need; install a tested release")


def require_package(config: Mapping[str, Any]) -> None:
    """Raise Unsupported naming the first thing that the installed package has not got in its code and that an engine of
    this config needs. Takes a second, and neither makes an engine nor communicates, so that a release which cannot work
    is refused on every rank before DeepSpeed starts to build operators or to wait for other ranks."""
    for kind in (ENGINE_CLASS, *CLASSES_OF_STAGE.get(_stage_of(config), ())):
        code, found = _code_of(kind)
        for name in kind.uses:
            if not hasattr(found, name) and not re.search(rf"\b{name}\b", code):
                raise lacks(f"'{name}' of its {kind.name}")
    for part in (GENERATORS, ACCELERATOR):
        part.load()


def require_asked(config: Mapping[str, Any]) -> None:
    """Raise Unsupported naming the first section of this config that the installed release would ignore: its engine
    would train another layout than the one that the config says."""
    for section, key, what, does in _ASKED:
        said = config.get(section)
        value = said.get(key) if isinstance(said, Mapping) else None
        if isinstance(value, (bool, int)) and value > (key != "enabled") and not hasattr(_class_of(ENGINE_CLASS), does):
            raise Unsupported(
                f"DeepSpeed {installed()} has no {what}, and ignores '{section}' of its config ('{key}' is {value!r}): "
                "every rank would train the whole model; take a release that has it, or leave the section out"
            )


def require_counted_devices(config: Mapping[str, Any]) -> None:
    """Raise Unsupported if stage 3's first backward pass would end because a command is not installed by which this
    release counts a machine's processors. Before 0.16 that is numactl."""
    if _stage_of(config) < 3:
        return
    try:
        accelerator().device_count()
    except FileNotFoundError as error:
        raise Unsupported(
            f"DeepSpeed {installed()} counts processors with the command '{error.filename}' in stage 3's backward "
            "pass, and it is not installed; install it, or set the environment variable LOCAL_SIZE to the "
            "number of ranks on this machine, as DeepSpeed's launcher does"
        ) from error


def _stage_of(config: Mapping[str, Any]) -> int:
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    return stage if isinstance(stage, int) else 0


def _class_of(kind: EngineClass) -> Any:
    try:
        return getattr(importlib.import_module(kind.module), kind.name)
    except (ImportError, AttributeError) as error:
        raise lacks(f"'{kind.name}' in '{kind.module}' ({error})") from error


def _code_of(kind: EngineClass) -> tuple[str, type]:
    """The code of the modules that a class of DeepSpeed and its bases are written in, and the class."""
    found = _class_of(kind)
    modules = dict.fromkeys(base.__module__ for base in found.__mro__ if base.__module__.startswith("deepspeed."))
    return "\n".join(inspect.getsource(sys.modules[name]) for name in modules), found


def require(engine: Any) -> None:
    """Raise Unsupported naming the first thing that this engine's loads and saves need and its release lacks."""
    for what in _missing(engine):
        raise lacks(what)
    parts = [GENERATORS, ACCELERATOR]
    parts += [MESH] if engine.mp_world_size > 1 else []
    parts += [EXPERT_GROUPS] if engine.has_moe_layers else []
    for part in parts:
        part.load()


def _missing(engine: Any) -> Iterator[str]:
    owners: list[tuple[Any, str, Sequence[str]]] = [(engine, type(engine).__name__, ENGINE)]
    owners += [
        (engine.optimizer, kind.name, kind.uses) for kind in _OPTIMIZERS if kind.has(getattr(engine, "optimizer", None))
    ]
    for layer in engine.module.modules() if getattr(engine, "has_moe_layers", False) else ():
        owners += [(layer, kind.name, kind.uses) for kind in _LAYERS if kind.has(layer)]
    for owner, kind, names in owners:
        for name in names:
            if not hasattr(owner, name):
                yield f"'{name}' of its {kind}"


def tensor_parallel_size(engine: Any) -> int:
    """Over how many ranks AutoTP cuts the model; 1 if the release has no AutoTP for training (before 0.16.4)."""
    size = getattr(engine, "autotp_size", None)
    return int(size()) if size is not None else 1


def cuts_module(engine: Any) -> bool:
    """Whether an engine that is asked for AutoTP has a module that is cut. Those of 0.16 and 0.17 leave that to the
    program, which calls ``deepspeed.tp_model_init`` before."""
    return hasattr(engine, "_apply_autotp_partitioning") or getattr(engine.module, "ds_autotp_parsed", False)


def model_parallel_rank(engine: Any) -> int:
    """This rank's number within tensor and pipeline parallelism.

    Where there is none of either, the mesh may be one of sequences, which 0.17 has without such a number, and 0.18 with
    that of sequences in its place.
    """
    if engine.mp_world_size == 1:
        return 0
    known = getattr(engine, "checkpoint_mp_rank", None)  # since 0.19
    if known is not None:
        return int(known)
    return 0 if engine.mpu is None else int(engine.mpu.get_model_parallel_rank())


def offsets_in_flat(zero: Any, group: int) -> Sequence[int]:
    """Where each parameter of a group begins in the flat buffer of stages 1 and 2, in elements.

    Releases with ``parameter_alignment`` (0.19) have a list of these places. In earlier ones there is nothing between
    parameters; this is checked against where the weights lie in the buffer.
    """
    known = getattr(zero, "round_robin_bit16_offsets", None)
    if known is not None:
        return list(known[group])
    params = zero.round_robin_bit16_groups[group]
    offsets = flat_offsets([p.numel() for p in params])[0]
    flat = zero.bit16_groups_flat[group]
    for param, offset in zip(params, offsets, strict=True):
        if param.numel() and param.data_ptr() != flat.data_ptr() + offset * flat.element_size():
            raise lacks("'round_robin_bit16_offsets' of its DeepSpeedZeroOptimizer, and its weights lie otherwise")
    return offsets


def waits_for_every_gather() -> bool:
    """Whether stage 3 waits for all when it gathers several parameters (since 0.19), and not for the last one alone.
    Gloo finishes gathers in any order, so that on a CPU the others may still be under way then."""
    gather = getattr(PARTITIONS.load().Init, "_allgather_params_coalesced", None)
    return gather is None or "launch_handles[-1].wait()" not in inspect.getsource(gather)


def pipeline_gradients() -> str:
    """What a pipeline's step is made with: one of `ucp.formats.shared.gradients`. Every engine divides what arrives if
    it can (since 0.18.3), and a pipeline's then has to leave that to its last stage; before, the loss was divided, for
    some time only if backward itself reduces gradients, as a pipeline's does not."""
    engine, pipeline = _class_of(ENGINE_CLASS), _class_of(PIPELINE)
    if hasattr(engine, "_backward_prologue_per_tensor"):
        return MEAN if "_backward_prologue_per_tensor" in vars(pipeline) else AGAIN
    divides = "do_gradient_reduction and self.gradient_accumulation_steps() > 1"
    return SUM if divides in inspect.getsource(sys.modules[ENGINE_CLASS.module]) else MEAN


def divides_gradients_once() -> bool:
    """Whether what flows back to a module is divided by the micro steps once, wherever it comes from. 0.18.3 to 0.19.5
    divide in each tensor that the module returns, and so once more if one of them was computed from another."""
    if not hasattr(_class_of(ENGINE_CLASS), "_backward_prologue_per_tensor"):
        return True
    code = inspect.getsource(sys.modules[ENGINE_CLASS.module])
    return re.search(r"^ +loss = loss / self\.gradient_accumulation_steps\(\)", code, re.MULTILINE) is not None


def divides_in_own_backward() -> bool:
    """Whether gradients of a program's own ``loss.backward()`` are divided at all, which then happens in each tensor
    that the module returns (since 0.18.3)."""
    return hasattr(_class_of(ENGINE_CLASS), "_backward_prologue_per_tensor")


def divides_now(engine: Any) -> bool:
    """Whether the engine divides what flows through a returned tensor in the backward pass that calls this."""
    divide = getattr(engine, "_backward_prologue_per_tensor", None)
    return divide is not None and divide(1.0) != 1.0


def stage2_keeps_micro_steps() -> bool:
    """Whether stage 2 adds up the gradients of all micro steps on the device. 0.17.6 to 0.18.2 ask whether there is
    something to add to where it is put after the last one alone, so that only the last one's are left."""
    epilogue = getattr(_class_of(STAGE12), "independent_gradient_partition_epilogue", None)
    code = "" if epilogue is None else inspect.getsource(epilogue)
    return not ("self.all_grad_tensors[i] = self.get" in code and "self.averaged_gradients[i] is None" in code)


def bf16_optimizer_reduces_all() -> bool:
    """Whether what BF16_Optimizer has of the last micro step is reduced over ranks. 0.18.5 to 0.18.9 reduce before it
    has taken that over, so that each rank steps its part with its own samples' gradients."""
    epilogue = getattr(_class_of(ENGINE_CLASS), "_backward_epilogue", None)
    if epilogue is None or not hasattr(_class_of(BF16), "backward_epilogue"):
        return True
    return BF16.name in inspect.getsource(epilogue)


def zeroes_bf16_at_stage0() -> bool:
    """Whether a step in bf16 without ZeRO leaves no gradients behind. 0.17.6 to 0.18.5 leave that to BF16_Optimizer,
    which they no longer take there, so that gradients add up from step to step."""
    step = getattr(_class_of(ENGINE_CLASS), "_take_model_step", None)
    code = "" if step is None else inspect.getsource(step)
    return "if self.zero_optimization() and hasattr(self.optimizer" not in code


def saves_bf16_at_stage0() -> bool:
    """Whether DeepSpeed's own checkpoints have the optimizer's state in bf16 without ZeRO. 0.17.6 to 0.18.4 take the
    names of two kinds of optimizer for one, and save the state of neither (`runtime/constants.py`)."""
    save = getattr(_class_of(ENGINE_CLASS), "_save_checkpoint", None)
    code = "" if save is None else inspect.getsource(save)
    return "zero_optimizer_state = self.zero_optimization() or self.bfloat16_enabled()" not in code


def muon_has_whole_gradients() -> bool:
    """Whether every rank that steps a part of a matrix gets the whole matrix's gradient, which Muon needs, although
    ``reduce_scatter`` brings each part to one rank (since 0.19.3)."""
    reduce = getattr(_class_of(STAGE12), "average_tensor", None)
    return reduce is None or "use_muon" in inspect.getsource(reduce)


def loss_scale(optimizer: Any) -> Any | None:
    """The object that keeps the loss scale: a scaler, or at stage 0 a LossScaleConfig (since 0.18) or the optimizer
    itself (before). None if there is no loss scale."""
    for name in ("loss_scaler", "loss_scale_config"):
        found = getattr(optimizer, name, None)
        if found is not None:
            return found
    is_its_own = (FUSED.has(optimizer) or UNFUSED.has(optimizer)) and hasattr(optimizer, "cur_scale")
    return optimizer if is_its_own else None


def accelerator() -> Any:
    """The accelerator on which DeepSpeed computes."""
    return ACCELERATOR.load().get_accelerator()
