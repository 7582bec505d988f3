"""Training cases: every option of a source or target engine that the tests vary, and the DeepSpeed config it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

DTYPES = ("fp32", "bf16", "fp16", "bf16_optimizer")

# Optimizers by the name a case uses: DeepSpeed's type and parameters. "lion_reference" is passed to DeepSpeed as an
# object, since DeepSpeed's own Lion needs a GPU or CPU offload.
OPTIMIZERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "adamw": ("AdamW", {"torch_adam": True, "lr": 3e-3, "betas": [0.9, 0.98], "weight_decay": 0.05}),
    "adam": ("Adam", {"torch_adam": True, "adam_w_mode": False, "lr": 3e-3, "weight_decay": 0.01}),
    "amsgrad": ("AdamW", {"torch_adam": True, "lr": 3e-3, "amsgrad": True}),
    "fused_adam": ("AdamW", {"lr": 3e-3, "betas": [0.9, 0.98], "weight_decay": 0.05}),
    "cpu_adam": ("AdamW", {"lr": 3e-3, "betas": [0.9, 0.98], "weight_decay": 0.05}),
    "sgd": ("SGD", {"lr": 5e-2, "momentum": 0.9, "weight_decay": 0.01}),
    "plain_sgd": ("SGD", {"lr": 5e-2}),
    "adagrad": ("Adagrad", {"lr": 1e-2, "weight_decay": 0.01}),
    "rmsprop": ("RMSprop", {"lr": 1e-3, "momentum": 0.5, "centered": True}),
    "nadam": ("NAdam", {"lr": 2e-3}),
    "lion": ("Lion", {"lr": 1e-3, "weight_decay": 0.01}),
    "lion_reference": ("", {"lr": 1e-3, "weight_decay": 0.01}),
    "muon": ("Muon", {"torch_adam": True, "lr": 3e-3, "weight_decay": 0.01}),
    "fused_muon": ("Muon", {"lr": 3e-3, "weight_decay": 0.01}),
}

# Optimizers that DeepSpeed compiles on first use, with the builder of what they need.
OPERATORS: Mapping[str, str] = {
    "fused_adam": "FusedAdamBuilder",
    "fused_muon": "FusedAdamBuilder",
    "cpu_adam": "CPUAdamBuilder",
    "lion": "CPULionBuilder",
}


@dataclass(frozen=True)
class Case:
    """One training layout. Hashable and picklable; the defaults are the plainest engine."""

    stage: int = 1
    dtype: str = "fp32"
    dp: int = 2
    optimizer: str = "adamw"
    # 1; 2 splits decayed from undecayed; 3 gives the head its own lr and betas, too; 4 has a group of one element
    groups: int = 1
    model: str = "odd"
    frozen: bool = False
    buffers: bool = True
    cube: bool = True  # a three-dimensional parameter
    tied: bool = False
    wrapped: bool = False  # names with the prefix _orig_mod.
    seed: int = 0
    accumulation: int = 1  # micro steps per optimizer step
    clip: float = 0.0
    scheduler: bool = False
    scale_power: int = 8  # fp16: 2 ** this is the first loss scale; 30 overflows, so that steps are skipped
    static_scale: float = 0.0  # fp16: a fixed loss scale instead
    offload: bool = False  # offload_optimizer to the host
    offload_parameters: bool = False  # stage 3
    sub_group_size: int | None = None  # stage 3, in elements
    persistence: int | None = None  # stage3_param_persistence_threshold, in elements
    parameter_alignment: bool = False  # stages 1, 2
    round_robin: bool = False  # stages 1, 2
    elastic: bool = False
    legacy_files: bool = False  # checkpoint files that are not zips
    low_masters: bool = False  # masters and gradients in bf16 (or fp16)
    low_states: bool = False  # optimizer states in bf16; needs low_masters
    accumulate_fp32: bool = False  # grad_accum_dtype
    zero_init: bool = False  # stage 3: the model is built under deepspeed.zero.Init
    zero: tuple[tuple[str, Any], ...] = ()  # more keys of zero_optimization
    config: tuple[tuple[str, Any], ...] = ()  # more top-level keys

    def but(self, **changes: Any) -> Case:
        """The same case with ``changes``."""
        return replace(self, **changes)

    @property
    def label(self) -> str:
        """A short name made of what differs from the default case."""
        parts = [f"z{self.stage}", self.dtype, f"dp{self.dp}"]
        plain = Case()
        for field in self.__dataclass_fields__:
            value = getattr(self, field)
            if field in ("stage", "dtype", "dp") or value == getattr(plain, field):
                continue
            parts.append(field if value is True else f"{field}={value}")
        return "-".join(parts)


def make_config(case: Case) -> dict[str, Any]:
    """The DeepSpeed config of ``case``, as a new dictionary."""
    from tests.engines.models import GLOBAL_BATCH

    if case.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {case.dtype!r}; known: {', '.join(DTYPES)}")
    if case.dtype == "bf16_optimizer" and case.stage != 1:
        raise ValueError("DeepSpeed uses its BF16_Optimizer at stage 1 only")
    zero: dict[str, Any] = {"stage": case.stage}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if case.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    if case.sub_group_size is not None:
        zero["sub_group_size"] = case.sub_group_size
    if case.persistence is not None:
        zero["stage3_param_persistence_threshold"] = case.persistence
    if case.parameter_alignment:
        zero["parameter_alignment"] = True
    if case.round_robin:
        zero["round_robin_gradients"] = True
    if case.elastic:
        zero["elastic_checkpoint"] = True
    if "muon" in case.optimizer and case.stage == 3:
        zero["reduce_scatter"] = False  # DeepSpeed refuses the two together
    zero.update(case.zero)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // case.dp,
        "gradient_accumulation_steps": case.accumulation,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000,
    }
    kind, parameters = OPTIMIZERS[case.optimizer]
    if kind:
        config["optimizer"] = {"type": kind, "params": dict(parameters)}
    if case.dtype in ("bf16", "bf16_optimizer"):
        config["bf16"] = {"enabled": True}
        if case.low_masters:
            config["bf16"]["bf16_master_weights_and_grads"] = True
        if case.low_states:
            config["bf16"]["bf16_optimizer_states"] = True
    if case.dtype == "fp16":
        config["fp16"] = {
            "enabled": True,
            "loss_scale": case.static_scale,
            "initial_scale_power": case.scale_power,
            "loss_scale_window": 2,
            "hysteresis": 1,
        }
        if case.low_masters:
            config["fp16"]["fp16_master_weights_and_grads"] = True
    if case.dtype == "bf16_optimizer" or case.accumulate_fp32:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if case.clip:
        config["gradient_clipping"] = case.clip
    if case.scheduler:
        config["scheduler"] = {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 1e-4, "warmup_max_lr": 3e-3, "warmup_num_steps": 7},
        }
    if case.legacy_files:
        config["checkpoint"] = {"checkpoint_serialization": False}
    config.update(case.config)
    return config


def parameter_groups(case: Case, model: nn.Module) -> list[dict[str, Any]]:
    """The parameters that ``case`` trains, in ``case.groups`` groups with hyperparameters of their own."""
    lr = OPTIMIZERS[case.optimizer][1]["lr"]
    groups: list[dict[str, Any]] = [{"params": []} for _ in range(case.groups)]
    if case.groups > 1:
        groups[1]["weight_decay"] = 0.0
    if case.groups > 2:
        groups[2]["lr"] = lr / 2
        if "adam" in case.optimizer:
            groups[2]["betas"] = (0.8, 0.95)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        index = 0
        if case.groups > 3 and parameter.numel() == 1:
            index = 3
        elif case.groups > 2 and ("head" in name or "embed" in name):
            index = 2
        elif case.groups > 1 and parameter.dim() < 2:
            index = 1
        groups[index]["params"].append(parameter)
    return groups
