"""How many samples a DeepSpeed run has consumed, if DeepSpeed has counted some of them several times.

Under AutoTP without a mesh or an mpu, DeepSpeed's config takes every rank for a data-parallel one
(``runtime/config.py``: ``world_size``), though tensor-parallel ranks see the same samples. So its global batch size and
``global_samples`` are autotp_size times what was consumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ucp.catalog import TrainingState


def autotp_size(config: Mapping[str, Any]) -> int:
    """The tensor-parallel ranks that DeepSpeed made by its config; 1 where it made none."""
    section = config.get("tensor_parallel")
    found = section.get("autotp_size") if isinstance(section, Mapping) else None
    return found if isinstance(found, int) and found > 1 else 1


def counted_once(state: TrainingState) -> TrainingState:
    """The state of DeepSpeed's own files, its samples and its batch counted once each."""
    times = autotp_size(state.config)
    return state if times == 1 else _divided(state, times)


def counted_by_us(state: TrainingState) -> TrainingState:
    """The state of a universal checkpoint, in which releases up to 0.1.0 recorded what DeepSpeed had counted."""
    times = autotp_size(state.config)
    if times == 1 or state.dp_world_size is None or state.global_batch_size is None:
        return state
    batch = _batch_of(state.config, state.dp_world_size)
    return _divided(state, times) if batch is not None and state.global_batch_size == batch * times else state


def _batch_of(config: Mapping[str, Any], dp: int) -> int | None:
    """The samples that dp data-parallel ranks consume in a step by this config; None if it leaves that open."""
    micro, steps = config.get("train_micro_batch_size_per_gpu"), config.get("gradient_accumulation_steps")
    if isinstance(micro, int):
        return micro * (steps if isinstance(steps, int) else 1) * dp
    batch = config.get("train_batch_size")
    return batch // autotp_size(config) if isinstance(batch, int) else None


def _divided(state: TrainingState, times: int) -> TrainingState:
    samples, batch = state.global_samples, state.global_batch_size
    return replace(
        state,
        global_samples=None if samples is None else samples // times,
        global_batch_size=None if batch is None else batch // times,
    )
