"""The common state of a Megatron checkpoint: ``common.pt`` as Megatron's training program reads it.

What the source says in Megatron's own words is written as it was. Of another framework's param groups, the values that
have the same names are taken (``lr``, ``betas``, ``eps``, ``weight_decay``), in the groups that Megatron makes
(megatron/core/optimizer/__init__.py). A warning names what has no counterpart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ucp.catalog import Catalog, ParamGroup, TrainingState
from ucp.formats.megatron.read.common import EXTRA, RUN, UnnamedGroup
from ucp.formats.megatron.write.schedule import Schedule, translated
from ucp.parallel.mesh import Layout
from ucp.printable import logger

log = logger(__name__)

DISTRIBUTED, MASTERS, FULL = "distributed", "masters", "full"
"""Megatron's optimizers: the distributed one, one with masters of 16-bit weights, one of full-precision weights."""

# What tells Megatron's groups apart (megatron/core/optimizer/optimizer.py: param_group_identifier_keys).
_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
_SHARED = ("lr", "betas", "eps", "weight_decay", "momentum")
# Of other frameworks' states, what Megatron makes anew or asks its arguments for.
_ANEW = ("config", "clip_grad", "dp_world_size", "global_batch_size")


def state(catalog: Catalog, layout: Layout, *, stacked: bool, kind: str, ndims: Mapping[str, int]) -> dict[str, Any]:
    """The object to write. stacked: whether layers share keys. kind: of the optimizer. ndims: of the trained
    parameters, by their names."""
    training = catalog.training_state
    kept = dict(training.extra.get(EXTRA, {}))
    for key in ("objects", "weights", "param_groups", RUN):
        kept.pop(key, None)  # what reading has put there
    content = {
        k: v for k, v in dict(kept.pop("content_metadata", None) or {}).items() if k != "distrib_optim_sharding_type"
    }
    content.update(singleton_local_shards=False, non_homogeneous_layers=not stacked, chained_optim_avoid_prefix=True)
    if ndims and kind == DISTRIBUTED:
        content["distrib_optim_sharding_type"] = "fully_reshardable"
    out: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": training.global_steps or 0, **kept}
    args = out.get("args")
    if args is not None:
        out["args"] = _with_layout(args, layout)
    schedule = None
    if _is_own_scheduler(training):
        out["opt_param_scheduler"] = training.lr_scheduler
    elif training.lr_scheduler is not None:
        schedule = _schedule(training)
        if schedule is not None:
            out["opt_param_scheduler"] = schedule.state(training.global_batch_size or 1, _decay(training))
    if ndims:
        out["optimizer"] = _optimizer(training, _steps(catalog), layout, kind, ndims, schedule)
    out["content_metadata"] = content
    _say_what_is_left(training)
    return out


def _is_own_scheduler(training: TrainingState) -> bool:
    """Whether the scheduler's state is Megatron's, be it in another framework's checkpoint of a Megatron run."""
    saved = training.lr_scheduler
    own = isinstance(saved, Mapping) and {"max_lr", "num_steps", "lr_decay_style"} <= saved.keys()
    return saved is not None and (own or is_megatron(training))


def _schedule(training: TrainingState) -> Schedule | None:
    found = translated(training)
    if isinstance(found, Schedule):
        return found
    log.warning(
        "the learning-rate schedule is left out, since %s; give Megatron its arguments and "
        "--override-opt_param-scheduler. 'max_lr' of the param groups is their first rate, or the present one where "
        "that is not said",
        found,
    )
    return None


def _decay(training: TrainingState) -> float:
    return float(max(((g.options or {}).get("weight_decay") or 0.0 for g in training.param_groups), default=0.0))


def is_megatron(training: TrainingState) -> bool:
    """Whether it was read from Megatron's files."""
    return EXTRA in training.extra


def _with_layout(args: Any, layout: Layout) -> Any:
    """The arguments with the sizes of this layout; others are the run's own."""
    import argparse

    new = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "data_parallel_size": layout.dp,
        "world_size": layout.world_size,
    }
    if isinstance(args, argparse.Namespace):
        return argparse.Namespace(**{**vars(args), **{k: v for k, v in new.items() if k in vars(args)}})
    if isinstance(args, Mapping):
        return {**args, **{key: value for key, value in new.items() if key in args}}
    return args


def _steps(catalog: Catalog) -> float | int | None:
    """The optimizer's step, of the parameter that has made most."""
    found = [i.scalars["step"] for i in catalog.parameters.values() if isinstance(i.scalars.get("step"), (int, float))]
    if len(set(found)) > 1:
        log.warning(
            "parameters have made %d to %d steps; Megatron has one count for all: the highest", min(found), max(found)
        )
    return max(found, default=None)


def _optimizer(
    training: TrainingState,
    step: float | int | None,
    layout: Layout,
    kind: str,
    ndims: Mapping[str, int],
    schedule: Schedule | None,
) -> dict[Any, Any]:
    """The optimizer's own state; with experts that are spread over ranks, one for these and one for all others."""
    groups = list(_groups(training, ndims, layout.ep > 1, schedule))
    chains = [False, True] if any(g["is_expert_parallel"] for g in groups) else [False]
    made = []
    for expert in chains:
        own = [g for g in groups if bool(g["is_expert_parallel"]) == expert]
        if kind == DISTRIBUTED:
            if step is not None:
                own = [{**group, "step": step} for group in own]
            one: dict[str, Any] = {"optimizer": {"param_groups": own}, "param_state_sharding_type": "fully_reshardable"}
        else:
            state = {} if step is None else {"common_step": step}
            inner = {"param_groups": own, "state": state}
            one = {"optimizer": inner} if kind == MASTERS else inner
        if training.loss_scaler is not None and "growth_tracker" in training.loss_scaler:
            scaler = {k: v for k, v in training.loss_scaler.items() if k not in ("dynamic", "cur_scale")}
            one["grad_scaler"] = scaler
        made.append(one)
    return made[0] if len(made) == 1 else dict(enumerate(made))


def _groups(
    training: TrainingState, ndims: Mapping[str, int], apart: bool, schedule: Schedule | None
) -> Iterator[dict[str, Any]]:
    """The groups that Megatron makes of these parameters, each with the values of its first one."""
    owner = {name: group for group in training.param_groups for name in group.names}
    seen: dict[tuple[Any, ...], tuple[dict[str, Any], list[str]]] = {}
    for name, ndim in ndims.items():
        source = owner.get(name)
        options = dict(source.options or {}) if source is not None else {}
        expert = apart and ".experts." in name
        if is_megatron(training) and options:
            own = {**options, "is_expert_parallel": expert}
        else:
            no_decay = not UnnamedGroup({"wd_mult": 1.0}, False).has(name, ndim, False)
            own = _from_others(options, no_decay=no_decay, expert=expert, schedule=schedule)
        own.pop("step", None)
        identity = tuple(own.get(key) for key in _IDENTITY)
        first, names = seen.setdefault(identity, (own, []))
        names.append(name)
        if {k: first.get(k) for k in _SHARED} != {k: own.get(k) for k in _SHARED}:
            log.warning(
                "'%s' has other hyperparameters than '%s', and Megatron keeps them in one group", name, names[0]
            )
    _say_what_differs(training.param_groups, seen)
    yield from (group for group, _ in seen.values())


def _from_others(
    options: Mapping[str, Any], *, no_decay: bool, expert: bool, schedule: Schedule | None
) -> dict[str, Any]:
    """A group of Megatron's with the values of another framework's that are called alike."""
    shared = {key: _tuple(options[key]) for key in _SHARED if key in options}
    return {
        "is_expert_parallel": expert,
        "default_config": True,
        "wd_mult": 0.0 if no_decay else 1.0,
        "lr_mult": 1.0,
        "is_decoupled_lr": False,
        # Megatron's scheduler goes by these, and by its own arguments only where a group has none.
        "max_lr": options.get("initial_lr", options.get("lr")) if schedule is None else schedule.max_lr,
        "min_lr": 0.0 if schedule is None else schedule.min_lr,
        **shared,
    }


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _say_what_differs(
    groups: Sequence[ParamGroup], seen: Mapping[tuple[Any, ...], tuple[dict[str, Any], list[str]]]
) -> None:
    for group, names in seen.values():
        if group.get("wd_mult") == 0.0 and group.get("weight_decay") and len(groups) == 1:
            log.warning(
                "%d biases and parameters of one dimension ('%s', …) had a weight decay of %s; with a scheduler of its "
                "own Megatron gives them none",
                len(names),
                names[0],
                group["weight_decay"],
            )


def _say_what_is_left(training: TrainingState) -> None:
    """Name the state of another framework that Megatron has no place for."""
    if is_megatron(training):
        return
    left = [name for name in _ANEW if getattr(training, name)]
    left += [f"client state '{key}'" for key in training.client_state]
    left += [f"'{key}'" for key in training.extra]
    if training.loss_scaler is not None and "growth_tracker" not in training.loss_scaler:
        left.append("loss_scaler")
    if left:
        log.warning("Megatron has no place for %s, which is left out", ", ".join(left))
