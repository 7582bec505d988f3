"""Whether all files are of one save: they must agree in what each says of the moment when it was written.

An optimizer file names neither run nor step. But it has what changes from step to step: the loss scaler's state and
hyperparameters that a scheduler sets (`join_states` compares the step counts). It also has the config and the version
of the DeepSpeed that wrote it. Contradictions are refused with both files and values. If nothing of that changes (plain
SGD without a scheduler), only the files' times are left: if they are far apart, that is reported. torch stores no times
in its archives (all records have the year 1980).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ucp.formats.deepspeed.read.optimizer_files import same_on_all_ranks
from ucp.storage.torch_pt.values import Standin

# Parts of a config that decide what is trained and saved. Others may name things of a rank's own (paths, monitors).
_DECIDING = (
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "data_types",
)
# Counters of DeepSpeed's and torch's schedulers; other state may depend on what a rank saw (ReduceLROnPlateau).
_COUNTERS = ("last_batch_iteration", "last_epoch", "_step_count")
_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "dynamic_loss_scale")


def check_models(models: Mapping[Path, Mapping[str, Any]]) -> None:
    """Compare model files of the ranks of one model-parallel part. Raises DamagedCheckpoint naming two that differ."""
    for key in ("global_steps", "global_samples", "skipped_steps", "dp_world_size", "mp_world_size"):
        _same(f"'{key}'", {path: raw.get(key) for path, raw in models.items()})
    for key in ("param_shapes", "frozen_param_shapes"):
        same_on_all_ranks(f"'{key}'", {path: _shapes(raw, key) for path, raw in models.items()})
    for key in _COUNTERS:
        found = {path: raw.get("lr_scheduler") for path, raw in models.items()}
        _same(f"the scheduler's '{key}'", {p: s.get(key) if isinstance(s, Mapping) else None for p, s in found.items()})
    check_writers(models)


def _shapes(raw: Mapping[str, Any], key: str) -> Any:
    """What a model file says of shapes. Ranks may have other numbers of AutoEP's experts, the first size of a stack."""
    prefixes = tuple(f"{layer['expert_key_prefix']}." for layer in raw.get("ds_autoep_layers") or ())
    found = raw.get(key)
    if not prefixes or found is None:
        return found
    groups = found if isinstance(found, (list, tuple)) else [found]
    return [{n: s[1:] if str(n).startswith(prefixes) else s for n, s in group.items()} for group in groups]


def check_optimizers(files: Mapping[Path, Mapping[str, Any]], models: Mapping[Path, Mapping[str, Any]]) -> None:
    """Compare the optimizer files of one model-parallel part with each other, and with its model files."""
    states = {path: raw.get("optimizer_state_dict") or {} for path, raw in files.items()}
    _same("the loss scaler", {path: scaler_of(state) for path, state in states.items()})
    _same("'clip_grad'", {path: state.get("clip_grad") for path, state in states.items()})
    check_writers({**files, **dict(list(models.items())[:1])})


def check_writers(files: Mapping[Path, Mapping[str, Any]]) -> None:
    """Compare the config and the version of DeepSpeed that files record."""
    _same("'ds_version'", {path: raw.get("ds_version") for path, raw in files.items()})
    configs = {path: raw.get("ds_config") for path, raw in files.items()}
    for key in _DECIDING:
        said = {path: (config.get(key),) for path, config in configs.items() if isinstance(config, Mapping)}
        _same(f"'{key}' of the config", said)
    stages = {}
    for path, config in configs.items():
        zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
        stages[path] = zero.get("stage") if isinstance(zero, Mapping) else None
    _same("the config's ZeRO stage", stages)


def scaler_of(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The loss scaler's numbers in an optimizer's state dict; None if it has no scaler."""
    scaler = state.get("loss_scaler")
    found = scaler.state if isinstance(scaler, Standin) else {k: state[k] for k in _SCALER_KEYS if k in state}
    return {k: v for k, v in found.items() if isinstance(v, (bool, int, float))} or None


def _same(what: str, values: Mapping[Path, Any]) -> None:
    """Raise DamagedCheckpoint if two files have values that differ. None is not a value."""
    said = {path: value for path, value in values.items() if value is not None}
    if said:
        same_on_all_ranks(what, said)
