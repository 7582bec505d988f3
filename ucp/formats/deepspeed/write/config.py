"""What a DeepSpeed config says of the checkpoints that an engine under it writes and loads.

Sources: ``runtime/config.py``, ``runtime/precision_config.py``, ``runtime/zero/config.py`` for keys and defaults, and
``runtime/engine.py`` (``_configure_basic_optimizer``, ``_do_optimizer_sanity_check``, ``_configure_fp16_optimizer``)
for the optimizer wrapper that follows from them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ucp.errors import BadArgument, Unsupported
from ucp.storage.torch_pt.values import DtypeName, Standin

VERSION = "0.19.8"
"""The release whose layout is written. Loaders compare it with the releases in which the layout changed."""

_FP32 = ("fp32", "float32", "float", "torch.float32")
# constants.py: GRADIENT_CLIPPING_DEFAULT; zero/config.py: sub_group_size, in elements.
_CLIP_DEFAULT = 1.0
_SUB_GROUP_DEFAULT = 1_000_000_000
# stage_1_and_2.py: the boundary of ``parameter_alignment``, in bytes.
_ALIGNMENT = 16
# What a source of an earlier release may have recorded, and VERSION refuses.
_MICS = ("mics_shard_size", "mics_hierarchical_params_gather")


@dataclass(frozen=True)
class EngineConfig:
    """The engine that is to load the checkpoint.

    raw: the config as the files record it.
    dtype: of the module's weights.
    master_dtype: of the optimizer's weights.
    sub_group_size: elements of a rank's partition (stage 3).
    alignment: bytes between parameters' boundaries, 0 for none (stages 1, 2).
    offloads_optimizer: whether the optimizer is offloaded to the host.
    bf16_optimizer: whether DeepSpeed uses its BF16_Optimizer.
    autotp: whether DeepSpeed itself cuts the model for tensor parallelism.
    optimizer: the optimizer's type in small letters, '' if the program makes the optimizer itself.
    step_is_tensor: whether that optimizer counts its steps in a 0-d tensor; None if the config doesn't tell.
    fused: whether the optimizer is FusedAdam; None if the config doesn't tell.
    """

    raw: Mapping[str, Any]
    stage: int
    dtype: str
    master_dtype: str
    sub_group_size: int
    clip_grad: float
    round_robin: bool
    alignment: int
    offloads_optimizer: bool
    bf16_optimizer: bool
    autotp: bool
    optimizer: str
    step_is_tensor: bool | None
    fused: bool | None
    fp16: Mapping[str, Any]

    @property
    def dynamic_scale(self) -> bool:
        """Whether the loss is scaled by a scale that adapts."""
        return self.dtype == "float16" and float(self.fp16.get("loss_scale", 0)) == 0

    @property
    def static_scale(self) -> float:
        """The loss scale where it does not adapt."""
        return float(self.fp16.get("loss_scale", 0)) if self.dtype == "float16" else 1.0


def engine_config(
    given: Mapping[str, Any] | None, recorded: Mapping[str, Any], stage: int, tp: int = 1, clip: float | None = None
) -> EngineConfig:
    """What follows from the config that the caller gave, else from the one that the source recorded. clip: what the
    source's gradients are clipped to, which stays if that config does not say: defaults differ between releases.

    Raises BadArgument where there is neither, where the given one contradicts the stage or holds an 'auto' that
    matters; Unsupported for an engine whose checkpoints cannot be written.
    """
    if given is None and not recorded:
        raise BadArgument(
            "the source records no DeepSpeed config, and the layout alone does not determine a DeepSpeed checkpoint; "
            "give the target's config with --ds-config"
        )
    raw = copy.deepcopy(dict(recorded if given is None else given))
    zero = _section(raw, "zero_optimization")
    if given is None:
        zero = {k: v for k, v in zero.items() if k not in _MICS}
    offload = _offload(zero)
    if given is not None and "stage" in zero and _integer(zero, "stage", 0) != stage:
        raise BadArgument(
            f"the config given is for ZeRO stage {zero['stage']}, the layout for stage {stage}; change one of them"
        )
    raw["zero_optimization"] = {**zero, "stage": stage}
    dtype, master = _dtypes(raw)
    _refuse_engines(raw, zero, stage, offload)
    sliced = _section(raw, "tensor_parallel")
    autotp = max(_integer(sliced, "autotp_size", 1), 1)
    if given is not None and autotp not in (1, tp):
        raise BadArgument(
            f"the config given asks for autotp_size={autotp} (tensor_parallel), the layout for tp={tp}; change one"
        )
    if autotp > 1:
        raw["tensor_parallel"] = {**sliced, "autotp_size": tp}
    accumulation = _section(raw, "data_types").get("grad_accum_dtype")
    optimizer, step_is_tensor, fused = _optimizer(raw, offload == "cpu", given is None)
    return EngineConfig(
        raw=raw,
        stage=stage,
        dtype=dtype,
        master_dtype=master,
        sub_group_size=_integer(zero, "sub_group_size", _SUB_GROUP_DEFAULT),
        clip_grad=_number(raw, "gradient_clipping", _CLIP_DEFAULT if clip is None else clip),
        round_robin=_flag(zero, "round_robin_gradients"),
        alignment=_ALIGNMENT if _flag(zero, "parameter_alignment") else 0,
        offloads_optimizer=offload == "cpu",
        bf16_optimizer=dtype == "bfloat16" and stage == 1 and accumulation in _FP32 and offload != "cpu",
        autotp=autotp > 1,
        optimizer=optimizer,
        step_is_tensor=step_is_tensor,
        fused=fused,
        fp16=_section(raw, "fp16"),
    )


def _dtypes(raw: Mapping[str, Any]) -> tuple[str, str]:
    """Element types of the module's weights, and of the optimizer's."""
    bf16 = _section(raw, "bf16") or _section(raw, "bfloat16")
    fp16 = _section(raw, "fp16")
    use_bf16, use_fp16 = _flag(bf16, "enabled"), _flag(fp16, "enabled")
    if use_bf16 and use_fp16:
        raise BadArgument("the config enables both bf16 and fp16; DeepSpeed accepts one of them")
    if use_bf16:
        return "bfloat16", "bfloat16" if _flag(bf16, "bf16_master_weights_and_grads") else "float32"
    if use_fp16:
        return "float16", "float16" if _flag(fp16, "fp16_master_weights_and_grads") else "float32"
    return "float32", "float32"


def _refuse_engines(raw: Mapping[str, Any], zero: Mapping[str, Any], stage: int, offload: str) -> None:
    """Raise Unsupported for an engine whose checkpoints cannot be written."""
    if offload == "nvme":
        raise Unsupported(
            "the target's config offloads the optimizer to NVMe; DeepSpeed's own load of such a checkpoint restores "
            "neither moments nor steps, so none is written: convert to 'universal' and resume through "
            '"ucp": {"enabled": true}, which restores them, or use \'cpu\' or no offload'
        )
    offloaded = _section(zero, "offload_optimizer")
    if offload == "cpu" and _flag(offloaded, "super_offload"):
        raise Unsupported(
            "the target's config asks for SuperOffload ('super_offload'), which is not supported; drop it"
        )
    if offload == "cpu" and stage == 3 and offloaded.get("ratio", 1.0) != 1.0:
        raise Unsupported(
            f"the target's config offloads a part of the optimizer ('ratio' is {offloaded['ratio']}); DeepSpeed's own "
            "load leaves the second optimizer, which steps the rest on the device, without moments, so none is "
            'written: convert to \'universal\' and resume through "ucp": {"enabled": true}, which restores them, or '
            "drop 'ratio'"
        )
    if zero.get("zenflow") is not None:
        raise Unsupported(
            "the target's config asks for ZenFlow ('zenflow'); no checkpoint has its second optimizer's states; drop it"
        )
    if _integer(zero, "mics_shard_size", -1) > 0:
        raise Unsupported(
            f"the target's config asks for MiCS ('mics_shard_size'), which DeepSpeed {VERSION} has no longer; drop it"
        )
    if stage == 3 and _flag(zero, "elastic_checkpoint"):
        raise Unsupported(
            "the target's config asks for elastic_checkpoint, which DeepSpeed refuses at stage 3; drop it"
        )
    if stage == 3 and str(_section(raw, "optimizer").get("type")).lower() == "adagrad" and offload != "cpu":
        raise Unsupported(
            f"DeepSpeed {VERSION} loads no checkpoint of Adagrad at stage 3, its own included (it numbers the "
            "optimizer's parameters twice); choose zero=0, 1 or 2, or another optimizer"
        )


def _optimizer(raw: Mapping[str, Any], on_cpu: bool, recorded: bool) -> tuple[str, bool | None, bool | None]:
    """(type, whether its steps are tensors, whether it is FusedAdam); None: not determined. recorded: it is the config
    that a checkpoint has, from which DeepSpeed before 0.19 has taken the key 'torch_adam' out when it read it."""
    section = _section(raw, "optimizer")
    kind = str(section.get("type") or "").lower()
    parameters = _section(section, "params")
    if not kind:
        return "", None, None
    if kind in ("adam", "adamw") and recorded and "torch_adam" not in parameters:
        return kind, None, None
    if kind in ("adam", "adamw"):
        torch_adam = _flag(parameters, "torch_adam")
        return kind, torch_adam, not torch_adam and not on_cpu
    if kind == "muon":
        return kind, _flag(parameters, "torch_adam"), False
    if kind in ("lion", "lamb"):
        return kind, False, False
    if kind == "adagrad":
        return kind, not on_cpu, False
    return kind, True, False


def _offload(zero: Mapping[str, Any]) -> str:
    """Where the optimizer's states live: '', 'cpu' or 'nvme'."""
    if _flag(zero, "cpu_offload"):
        return "cpu"
    device = str(_section(zero, "offload_optimizer").get("device") or "none")
    return "" if device == "none" else device.rpartition(".")[2]


def loss_scaler(config: EngineConfig, saved: Mapping[str, Any] | None) -> Standin:
    """The scaler object that stages 1 to 3 pickle: the source's where it is of the config's kind, else a fresh one."""
    module = "deepspeed.runtime.fp16.loss_scaler"
    if not config.dynamic_scale:
        return Standin(module, "LossScaler", (), {"cur_scale": config.static_scale, "dynamic": False})
    state = {
        "cur_scale": 2.0 ** _integer(config.fp16, "initial_scale_power", 16),
        "dynamic": True,
        "cur_iter": 0,
        "last_overflow_iter": -1,
        "scale_factor": 2.0,
        "scale_window": _integer(config.fp16, "loss_scale_window", 1000),
        "min_scale": _integer(config.fp16, "min_loss_scale", 1),
        "delayed_shift": _integer(config.fp16, "hysteresis", 2),
        "cur_hysteresis": _integer(config.fp16, "hysteresis", 2),
        "consecutive_hysteresis": _flag(config.fp16, "consecutive_hysteresis"),
        "raise_error_at_min_scale": True,
    }
    if saved is not None and saved.get("dynamic"):
        state.update({k: v for k, v in saved.items() if k in state})
    return Standin(module, "DynamicLossScaler", (), {**state, "dtype": DtypeName("float16")})


def loss_scale_keys(config: EngineConfig, saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """The same as stage 0 keeps it, as plain values beside the optimizer's state."""
    state = loss_scaler(config, saved).state
    keys = ["cur_scale", "cur_iter"]
    out: dict[str, Any] = {"dynamic_loss_scale": config.dynamic_scale}
    if config.dynamic_scale:
        keys += ["last_overflow_iter", "scale_factor", "scale_window"]
    elif saved is not None and not saved.get("dynamic"):
        state = {**state, "cur_iter": saved.get("cur_iter", 0)}
    out.update({key: state.get(key, 0) for key in keys})
    return out


# --- values of a config file -----------------------------------------------------------------------------------------


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = raw.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise BadArgument(f"the DeepSpeed config's '{key}' is {found!r}; a section of keys is expected")
    return found


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    found = raw.get(key, False)
    if found is None:
        return False
    if not isinstance(found, bool):
        raise BadArgument(f"the DeepSpeed config's '{key}' is {found!r}; true or false is needed to know the layout")
    return found


def _number(raw: Mapping[str, Any], key: str, default: float) -> float:
    found = raw.get(key, default)
    try:
        return float(found)
    except (TypeError, ValueError):
        raise BadArgument(
            f"the DeepSpeed config's '{key}' is {found!r}; a number is needed to know the layout"
        ) from None


def _integer(raw: Mapping[str, Any], key: str, default: int) -> int:
    return int(_number(raw, key, default))
