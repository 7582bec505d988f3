"""Another framework's learning-rate schedule as Megatron's scheduler says the same.

Megatron's counts samples: a linear warm-up from ``init_lr`` (0 unless its arguments say otherwise), then a constant,
linear or cosine decay from ``max_lr`` to ``min_lr`` (megatron/core/optimizer_param_scheduler.py). What has the same
values in every further step is taken over; anything else is left out, and the reason is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucp.catalog import TrainingState


@dataclass(frozen=True)
class Schedule:
    """In steps. position: how many have been made, as Megatron counts them."""

    style: str
    max_lr: float
    min_lr: float
    warmup: int
    total: int
    position: int

    def state(self, samples: int, weight_decay: float) -> dict[str, Any]:
        """Megatron's state. samples: of one step."""
        return {
            "max_lr": self.max_lr,
            "lr_warmup_steps": self.warmup * samples,
            "num_steps": self.position * samples,
            "lr_decay_style": self.style,
            "lr_decay_steps": self.total * samples,
            "min_lr": self.min_lr,
            "start_wd": weight_decay,
            "end_wd": weight_decay,
            "wd_incr_style": "constant",
            "wd_incr_steps": self.total * samples,
        }


def translated(training: TrainingState) -> Schedule | str:
    """The schedule, or why it has no counterpart."""
    saved = training.lr_scheduler
    if not isinstance(saved, Mapping):
        return "its state is none that is known"
    if not training.global_batch_size:
        return "Megatron's counts samples, and the source does not say how many a step has"
    try:
        return _known(saved, training)
    except (TypeError, ValueError, KeyError):
        return "its values are none that are known"


def _known(saved: Mapping[str, Any], training: TrainingState) -> Schedule | str:
    config = training.config.get("scheduler")
    if "last_batch_iteration" in saved and isinstance(config, Mapping):
        return _deepspeed(str(config.get("type")), config.get("params") or {}, saved["last_batch_iteration"], training)
    if "last_epoch" in saved and "base_lrs" in saved:
        return _torch(saved)
    return "its state does not say which schedule it is of"


def _deepspeed(kind: str, params: Mapping[str, Any], made: Any, training: TrainingState) -> Schedule | str:
    """deepspeed/runtime/lr_schedules.py. made: its count of steps, which is one less than were made."""
    if kind not in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        return f"DeepSpeed's {kind} has no counterpart"
    if params.get("warmup_type", "log") != "linear":
        return f"DeepSpeed's {kind} warms up by a logarithm, and Megatron's by a line"
    if params.get("warmup_min_lr" if kind != "WarmupCosineLR" else "warmup_min_ratio", 0.0) != 0.0:
        return f"DeepSpeed's {kind} begins above 0, which is an argument of Megatron's and no state"
    if not isinstance(made, int) or made < 0:
        return f"DeepSpeed's {kind} has not begun"
    warmup = max(2, int(params.get("warmup_num_steps", 1000)))
    total = int(params.get("total_num_steps", warmup))
    if kind == "WarmupLR":
        peak = params.get("warmup_max_lr") or _initial(training)
        return (
            "its highest rate is not said"
            if peak is None
            else Schedule("constant", float(peak), float(peak), warmup, warmup + 1, made)
        )
    if total <= warmup:
        return f"DeepSpeed's {kind} has no steps after its warm-up"
    if kind == "WarmupDecayLR":
        return Schedule("linear", float(params.get("warmup_max_lr", 0.001)), 0.0, warmup, total, made)
    peak = _initial(training)
    if peak is None:
        return "its highest rate is not said"
    if made < warmup:
        return f"DeepSpeed's {kind} is in its warm-up, after which it is a step ahead of Megatron's"
    return Schedule("cosine", peak, peak * float(params.get("cos_min_ratio", 0.0001)), warmup, total, made + 1)


def _initial(training: TrainingState) -> float | None:
    """The rate that all groups had at first, or that the optimizer's section of the config has; None if not one."""
    found = {g.options["initial_lr"] for g in training.param_groups if g.options and "initial_lr" in g.options}
    section = training.config.get("optimizer")
    params = section.get("params") if isinstance(section, Mapping) else None
    if not found and isinstance(params, Mapping) and isinstance(params.get("lr"), (int, float)):
        found = {float(params["lr"])}
    return found.pop() if len(found) == 1 else None


def _torch(saved: Mapping[str, Any]) -> Schedule | str:
    """torch/optim/lr_scheduler.py, whose states are their attributes."""
    base: Sequence[Any] = saved["base_lrs"]
    if not base or len(set(base)) > 1:
        return "its groups have several rates"
    peak, made = float(base[0]), int(saved["last_epoch"])
    if "T_max" in saved and "eta_min" in saved and "T_mult" not in saved:
        if made > saved["T_max"]:
            return "torch's CosineAnnealingLR is beyond its end, where it rises again"
        return Schedule("cosine", peak, float(saved["eta_min"]), 0, int(saved["T_max"]), made)
    if "start_factor" in saved and "end_factor" in saved:
        if saved["start_factor"] != 1.0 or saved["end_factor"] > 1.0:
            return "torch's LinearLR does not fall from its highest rate"
        return Schedule("linear", peak, peak * float(saved["end_factor"]), 0, int(saved["total_iters"]), made)
    return "its state does not say which schedule it is of"
