"""Other frameworks' learning-rate schedules as Megatron's: the same rates in every further step, or a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from ucp.catalog import ParamGroup, TrainingState
from ucp.formats.megatron.write.schedule import Schedule, translated

BATCH, RATE = 8, 2e-3
# Name -> (type and parameters of DeepSpeed's, steps made before).
DEEPSPEED: Mapping[str, tuple[str, dict[str, Any], int]] = {
    "constant, in its warm-up": ("WarmupLR", {"warmup_max_lr": RATE, "warmup_num_steps": 6}, 3),
    "constant": ("WarmupLR", {"warmup_max_lr": RATE, "warmup_num_steps": 6}, 9),
    "linear, in its warm-up": (
        "WarmupDecayLR",
        {"warmup_max_lr": RATE, "warmup_num_steps": 6, "total_num_steps": 14},
        4,
    ),
    "linear": ("WarmupDecayLR", {"warmup_max_lr": RATE, "warmup_num_steps": 6, "total_num_steps": 14}, 8),
    "cosine": ("WarmupCosineLR", {"warmup_num_steps": 6, "total_num_steps": 14, "cos_min_ratio": 0.1}, 8),
}
TORCH: Mapping[str, Callable[[Any], Any]] = {
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=1e-5),
    "linear": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12),
}


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=RATE, weight_decay=0.1)


def _training(state: Any, config: Mapping[str, Any]) -> TrainingState:
    groups = (ParamGroup(("w",), {"lr": RATE, "initial_lr": RATE}),)
    return TrainingState(groups, lr_scheduler=state, global_batch_size=BATCH, config=config)


def _megatrons_rates(schedule: Schedule, steps: int) -> list[float]:
    """What Megatron's own scheduler gives from its state on."""
    scheduler_of = pytest.importorskip("megatron.core.optimizer_param_scheduler").OptimizerParamScheduler
    state = schedule.state(BATCH, 0.1)
    optimizer = _optimizer()
    optimizer.param_groups[0].update(max_lr=schedule.max_lr, min_lr=schedule.min_lr, default_config=True)
    given = {k: v for k, v in state.items() if k != "num_steps"}
    made = scheduler_of(optimizer, init_lr=0.0, use_checkpoint_opt_param_scheduler=True, **given)
    made.load_state_dict(state)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        made.step(BATCH)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeeds(name: str) -> None:
    schedules = pytest.importorskip("deepspeed.runtime.lr_schedules")
    kind, params, before = DEEPSPEED[name]
    params = {**params, "warmup_type": "linear"}
    optimizer = _optimizer()
    theirs = getattr(schedules, kind)(optimizer, **params)
    for _ in range(before):
        theirs.step()
    found = translated(_training(theirs.state_dict(), {"scheduler": {"type": kind, "params": params}}))
    assert isinstance(found, Schedule), found
    wanted = [optimizer.param_groups[0]["lr"]]
    for _ in range(9):
        theirs.step()
        wanted.append(optimizer.param_groups[0]["lr"])
    assert _megatrons_rates(found, 9) == pytest.approx(wanted, rel=1e-9, abs=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCH)
def test_torchs(name: str) -> None:
    optimizer = _optimizer()
    theirs = TORCH[name](optimizer)
    for _ in range(5):
        optimizer.step()
        theirs.step()
    found = translated(_training(theirs.state_dict(), {}))
    assert isinstance(found, Schedule), found
    wanted = [optimizer.param_groups[0]["lr"]]
    for _ in range(7):
        theirs.step()
        wanted.append(optimizer.param_groups[0]["lr"])
    assert _megatrons_rates(found, 7) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("state", "config", "why"),
    [
        ({"last_batch_iteration": 3}, {"type": "WarmupLR", "params": {}}, "warms up by a logarithm"),
        ({"last_batch_iteration": 3}, {"type": "OneCycle", "params": {}}, "OneCycle has no counterpart"),
        (
            {"last_batch_iteration": 3},
            {"type": "WarmupLR", "params": {"warmup_type": "linear", "warmup_min_lr": 0.1}},
            "begins above 0",
        ),
        (
            {"last_batch_iteration": 3},
            {"type": "WarmupCosineLR", "params": {"warmup_type": "linear", "total_num_steps": 5000}},
            "a step ahead",
        ),
        ({"last_batch_iteration": 3}, {"type": "WarmupDecayLR", "params": {"warmup_type": "linear"}}, "no steps after"),
        ({"last_batch_iteration": "x"}, {"type": "WarmupLR", "params": {"warmup_type": "linear"}}, "has not begun"),
        ({"last_epoch": 3, "base_lrs": [1.0], "lr_lambdas": [None]}, {}, "does not say which schedule"),
        ({"last_epoch": 3, "base_lrs": [1.0, 2.0], "T_max": 4, "eta_min": 0}, {}, "several rates"),
        ({"last_epoch": 9, "base_lrs": [1.0], "T_max": 4, "eta_min": 0}, {}, "rises again"),
        ({"last_epoch": 9, "base_lrs": [None], "T_max": 4, "eta_min": 0}, {}, "none that are known"),
        ([1], {}, "none that is known"),
    ],
)
def test_what_has_no_counterpart_is_said(state: Any, config: Mapping[str, Any], why: str) -> None:
    found = translated(_training(state, {"scheduler": config} if config else {}))
    assert isinstance(found, str)
    assert why in found
