"""The rest of a DeepSpeed engine's training state: counters, lr scheduler, loss scaler, samplers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from ucp.catalog import TrainingState
from ucp.deepspeed.live import generators, releases
from ucp.errors import Mismatch
from ucp.formats.shared.schedulers import entries_by_group, of_groups
from ucp.job import ranks
from ucp.loading.options import stays_at
from ucp.printable import logger
from ucp.units import counted

log = logger(__name__)

# A loss scaler's progress. Its other attributes are configuration, and stay as the target has them.
_SCALER_PROGRESS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_SCALER_CONFIG = ("scale_factor", "scale_window", "min_scale", "delayed_shift", "consecutive_hysteresis")


def check_state(
    engine: Any, state: TrainingState, sources: Mapping[int, int], groups: int, load_lr_scheduler: bool
) -> None:
    """Raise Mismatch if the lr scheduler's state does not fit this engine. Changes nothing."""
    if not load_lr_scheduler or engine.lr_scheduler is None:
        return
    if state.lr_scheduler is None:
        raise Mismatch(
            f"nothing was loaded: the engine has an lr scheduler ({type(engine.lr_scheduler).__name__}), the "
            "checkpoint has no state for one; pass load_lr_scheduler_states=False to keep the engine's"
        )
    _scheduler_state(state, sources, groups)


def restore_state(engine: Any, state: TrainingState, load_lr_scheduler: bool, sources: Mapping[int, int]) -> None:
    """Set everything that is not a tensor of a parameter, as DeepSpeed's own load does."""
    groups = len(getattr(engine.optimizer, "param_groups", ()))
    if load_lr_scheduler and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(_scheduler_state(state, sources, groups))
    _restore_scaler(engine, state.loss_scaler)
    sampler = state.extra.get("data_sampler")
    if sampler is not None and engine.training_dataloader is not None and engine.curriculum_learning_enabled():
        engine.training_dataloader.data_sampler.load_state_dict(sampler)
    elif sampler is not None:
        warn("the checkpoint's data sampler state is not used: this engine has no curriculum learning data loader")
    random_ltd = state.extra.get("random_ltd")
    if random_ltd is not None and engine.random_ltd_enabled() and engine.random_ltd_scheduler is not None:
        engine.random_ltd_scheduler.load_state_dict(random_ltd)
    elif random_ltd is not None:
        warn("the checkpoint's random layer token dropping state is not used: this engine drops no tokens")
    if state.global_steps is not None:
        engine.global_steps = state.global_steps
        samples = state.global_samples
        if samples is None:
            samples = state.global_steps * samples_per_step(engine)
        engine.global_samples = samples * times_counted(engine)
    if state.skipped_steps is not None:
        engine.skipped_steps = state.skipped_steps
    _restore_rng(engine, state.extra.get("ranks", ()))
    engine.loaded_checkpoint_dp_world_size = state.dp_world_size
    engine.loaded_checkpoint_mp_world_size = 1
    batch = samples_per_step(engine)
    if state.global_batch_size is not None and state.global_batch_size != batch:
        warn(
            f"the global batch size changes from {state.global_batch_size} to {batch} samples with this resume; "
            f"engine.ucp.samples_seen ({samples_seen(engine)}) says where the data stands"
        )


def samples_seen(engine: Any) -> int:
    """How many samples of the training data all ranks have consumed. Each is counted once."""
    return int(engine.global_samples) // times_counted(engine)


def data_world(engine: Any) -> int:
    """How many ranks get different data."""
    return int(engine.seq_dp_world_size // engine.sequence_parallel_size)


def data_rank(engine: Any) -> int:
    """This rank's number among those."""
    return int(dist.get_rank(engine.seq_data_parallel_group) // engine.sequence_parallel_size)


def samples_per_step(engine: Any) -> int:
    """How many samples all ranks consume in an optimizer step. Only the data-parallel ranks of the mesh count: ranks of
    tensor, pipeline and sequence parallelism see the same samples. Uneven micro-batches are not all full."""
    fitted = getattr(getattr(engine, "ucp", None), "fitted", None)
    return _places_per_step(engine) if fitted is None else int(fitted.batch)


def _places_per_step(engine: Any) -> int:
    """Samples of a step if each micro-batch is as large as the engine's config says."""
    return int(engine.train_micro_batch_size_per_gpu() * engine.gradient_accumulation_steps() * data_world(engine))


def times_counted(engine: Any) -> int:
    """How often DeepSpeed counts a sample in ``global_samples``; see `ucp.formats.shared.samples`."""
    return max(int(engine.train_batch_size()) // _places_per_step(engine), 1)


def _restore_rng(engine: Any, saved: Sequence[Mapping[str, Any]]) -> None:
    """Restore each rank's generators, if as many ranks resume as saved; see `generators`."""
    if not any("rng" in own for own in saved):
        return
    if len(saved) == ranks.world_size():
        generators.restore(engine, saved[ranks.rank()]["rng"])
    elif not _are_per_sample(engine):
        now = counted(ranks.world_size(), "resumes", "resume")
        warn(
            "random number generators stay as this program seeded them: "
            f"{counted(len(saved), 'rank')} saved theirs, and {now}"
        )


def _are_per_sample(engine: Any) -> bool:
    """Whether the config says that random numbers belong to samples, so that those of ranks do not count."""
    elastic = getattr(getattr(getattr(engine, "ucp", None), "config", None), "elastic", None)
    return elastic is not None and elastic.rng == "per_sample"


def warn_of_scheduler(engine: Any, state: TrainingState) -> None:
    """Warn if the checkpoint has a scheduler's state and the engine no scheduler. Param groups are restored by now."""
    if engine.lr_scheduler is None and state.lr_scheduler is not None:
        warn(
            "the checkpoint's lr scheduler state is not used: this engine has no lr scheduler"
            + stays_at(getattr(engine.optimizer, "param_groups", ()))
        )


def warn_of_clipping(engine: Any, state: TrainingState) -> None:
    """Warn if the checkpoint's gradient clipping differs from the engine's. The engine's configuration counts."""
    live = getattr(engine.optimizer, "clip_grad", None)
    if isinstance(live, (int, float)) and state.clip_grad is not None and float(live) != state.clip_grad:
        warn(
            f"gradient clipping is {float(live)} by this engine's configuration; the checkpoint's run had "
            f"{state.clip_grad}"
        )


def _scheduler_state(state: TrainingState, sources: Mapping[int, int], groups: int) -> Any:
    """The lr scheduler's state, with its per-group entries in the order of the live param groups."""
    saved = state.lr_scheduler
    if not isinstance(saved, Mapping):
        return saved
    count = len(state.param_groups)
    lists = entries_by_group(saved, count)
    order = [sources.get(g) for g in range(groups)]
    if not lists or order == list(range(count)):
        return dict(saved)
    if any(i is None for i in order):
        raise Mismatch(
            f"nothing was loaded: the lr scheduler's '{lists[0]}' has one value for each of the checkpoint's {count} "
            f"param groups, and the engine's {groups} are no rearrangement of them; pass load_lr_scheduler_states=False"
        )
    return of_groups(saved, count, [i for i in order if i is not None])


def _restore_scaler(engine: Any, saved: Mapping[str, Any] | None) -> None:
    """Restore fp16's dynamic loss scale. A static one is configuration, so only its count is restored."""
    live = releases.loss_scale(engine.optimizer)
    if live is None or saved is None:
        return
    live_dynamic = bool(getattr(live, "dynamic", getattr(live, "dynamic_loss_scale", False)))
    saved_dynamic = bool(saved.get("dynamic"))
    if not live_dynamic or not saved_dynamic:
        if live_dynamic == saved_dynamic:
            _set_progress(live, saved, ("cur_iter",))
        else:
            says = {True: "dynamic", False: "static"}
            warn(
                f"the loss scaling here is {says[live_dynamic]}, the checkpoint's {says[saved_dynamic]}: its scale of "
                f"{saved.get('cur_scale')} is not restored, {getattr(live, 'cur_scale', None)} stays"
            )
        return
    _set_progress(live, saved, _SCALER_PROGRESS)
    changed = [n for n in _SCALER_CONFIG if n in saved and hasattr(live, n) and getattr(live, n) != saved[n]]
    if changed:
        n = changed[0]
        warn(
            f"loss scaling's '{n}' is {getattr(live, n)} by this engine's configuration; the checkpoint's run had "
            f"{saved[n]}"
        )


def _set_progress(live: Any, saved: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if name in saved and hasattr(live, name):
            setattr(live, name, saved[name])


def warn(text: str) -> None:
    """Log a warning on rank 0 only."""
    if ranks.rank() == 0:
        log.warning("%s", text)
