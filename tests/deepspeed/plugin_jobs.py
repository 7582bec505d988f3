"""Jobs that run on the ranks: how the plugin meets a program that uses DeepSpeed."""

from __future__ import annotations

import argparse
import base64
import copy
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.deepspeed.jobs import altered
from tests.engines import build
from tests.engines.build import build_engine
from tests.engines.configs import Case, make_config
from tests.engines.load_jobs import Resumed, build_target, resume
from tests.engines.resume import continue_training
from tests.engines.runs import STEPS, Run
from tests.engines.sources import train
from tests.engines.truth import Truth, gather

ENABLED = {"ucp": {"enabled": True}}


class OfTheProgram:
    """A class that only the training program knows."""

    def __init__(self) -> None:
        self.epoch = 3

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OfTheProgram) and other.epoch == self.epoch

    __hash__ = None  # type: ignore[assignment]


def signatures() -> tuple[str, str]:
    import deepspeed

    import ucp.deepspeed

    return str(inspect.signature(deepspeed.initialize)), str(inspect.signature(ucp.deepspeed.initialize))


def returned() -> tuple[list[str], list[str]]:
    """The types that both functions return, for a program that hands over everything."""
    import deepspeed

    import ucp.deepspeed

    types = []
    for initialize in (deepspeed.initialize, ucp.deepspeed.initialize):
        model = nn.Linear(3, 3)
        optimizer = torch.optim.AdamW(model.parameters())
        found = initialize(
            None,
            model,
            optimizer,
            list(model.parameters()),
            torch.utils.data.TensorDataset(torch.zeros(24, 3)),
            lr_scheduler=torch.optim.lr_scheduler.LinearLR(optimizer),
            config=make_config(Case(dp=1)) | (ENABLED if initialize is ucp.deepspeed.initialize else {}),
        )
        types.append([f"{type(x).__module__}.{type(x).__qualname__}" for x in found])
    return types[0], types[1]


def ways_to_configure(folder: str) -> dict[str, bool]:
    """Is the engine bound, by the way in which its config came?"""
    import ucp.deepspeed

    config = make_config(Case(dp=1)) | ENABLED
    plain, commented = Path(folder) / "plain.json", Path(folder) / "commented.json"
    plain.write_text(json.dumps(config))
    commented.write_text("# DeepSpeed reads Hjson\n" + json.dumps(config))
    text = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
    ways: dict[str, dict[str, Any]] = {
        "config": {"config": config},
        "config path": {"config": str(plain)},
        "config path with comments": {"config": str(commented)},
        "config in base64": {"config": text},
        "config_params": {"config_params": config},
        "config_params path": {"config_params": str(plain)},
        "args.deepspeed_config": {"args": argparse.Namespace(deepspeed_config=str(plain), local_rank=0)},
        "enabled is false": {"config": config | {"ucp": {"enabled": False}}},
        "no section": {"config": make_config(Case(dp=1))},
        "empty section": {"config": config | {"ucp": {}}},
    }
    found = {}
    for way, arguments in ways.items():
        model = nn.Linear(3, 3)
        own = copy.deepcopy(arguments)  # before 0.18 DeepSpeed takes keys out of the config
        engine, *_ = ucp.deepspeed.initialize(model=model, model_parameters=model.parameters(), **own)
        found[way] = is_bound(engine)
    return found


def is_bound(engine: Any) -> bool:
    """Whether this engine is bound; an engine that is not has to be DeepSpeed's own, untouched."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    if not hasattr(engine, "ucp"):
        for name in ("load_checkpoint", "save_checkpoint"):
            assert name not in vars(engine)
            assert getattr(type(engine), name) is getattr(DeepSpeedEngine, name)
        return False
    assert "load_checkpoint" not in vars(DeepSpeedEngine) or DeepSpeedEngine.load_checkpoint.__module__.startswith(
        "deepspeed"
    )
    assert inspect.signature(engine.load_checkpoint) is not None
    stock = inspect.signature(DeepSpeedEngine.load_checkpoint).parameters
    ours = inspect.signature(engine.load_checkpoint).parameters
    assert [(n, p.default) for n, p in ours.items()] == [(n, p.default) for n, p in stock.items() if n != "self"]
    return True


def attached(folder: str, tag: str) -> tuple[bool, bool, bool]:
    """Attach to an engine whose config does not even have the section, and load."""
    import ucp.deepspeed

    case = Case(stage=3, dp=2, seed=5)
    engine = build_engine(case)
    before = is_bound(engine)
    same = ucp.deepspeed.attach(engine) is engine
    path, _ = engine.load_checkpoint(folder, tag)
    return before, same and is_bound(engine), path is not None


def what_auto_replaces() -> tuple[list[str], bool, bool]:
    """Every attribute of every DeepSpeed module and of the engine's classes that importing ``auto`` changes; and
    whether ``deepspeed.initialize`` then binds with the section and leaves alone without."""
    import deepspeed

    import ucp.deepspeed

    before = everything_of_deepspeed()
    import ucp.deepspeed.auto  # noqa: F401 - for what the import does

    after = everything_of_deepspeed()
    changed = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
    bound = []
    for extra in (ENABLED, {}):
        model = nn.Linear(3, 3)
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=make_config(Case(dp=1)) | extra
        )
        bound.append(is_bound(engine))
        if bound[-1] and engine.ucp.saver is not None:
            raise ValueError("a save goes on after it returned, which these programs do not expect")
    return changed, bound[0], bound[1]


def everything_of_deepspeed() -> dict[str, int]:
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "deepspeed":
            for key, value in vars(module).items():
                found[f"{name}.{key}"] = id(value)
                if isinstance(value, type) and value.__module__.startswith("deepspeed"):
                    found |= {f"{name}.{key}.{k}": id(v) for k, v in vars(value).items()}
    return found


def both_returns(case: Case, folder: str, tag: str | None) -> list[tuple[str | None, dict[str, Any]]]:
    """What DeepSpeed's own load returns, and what ours does, for the same checkpoint."""
    out = []
    for initialize in ("deepspeed:initialize", "ucp.deepspeed:initialize"):
        engine = build_engine(case, initialize, ENABLED)
        path, client_state = engine.load_checkpoint(folder, tag)
        out.append((path, client_state))
    return out


@dataclass(frozen=True)
class Told:
    """One load: what it returned, the records that it logged here, and what the engine is like then."""

    path: str | None
    client_state: Any
    warnings: tuple[str, ...]
    summaries: tuple[str, ...]
    samples_seen: int
    clip: float
    truth: Truth | None


def load_and_listen(
    case: Case,
    folder: str,
    tag: str | None = None,
    section: Mapping[str, Any] | None = None,
    trained: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Told:
    import logging

    warnings: list[str] = []
    summaries: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            (warnings if record.levelno >= logging.WARNING else summaries).append(record.getMessage())

    engine = build_target(case, section, trained)
    logger = logging.getLogger("ucp")
    logger.setLevel(logging.INFO)
    logger.addHandler(Listener())
    path, client_state = engine.load_checkpoint(folder, tag, **(options or {}))
    clip = float(getattr(engine.optimizer, "clip_grad", 0.0))
    return Told(path, client_state, tuple(warnings), tuple(summaries), engine.ucp.samples_seen, clip, gather(engine))


def save_client_state(case: Case, folder: str, kind: str) -> None:
    engine = build_engine(case)
    continue_training(engine, case, 0, 1)
    engine.save_checkpoint(folder, "tag", client_state=client_state(kind))


def client_state(kind: str) -> dict[str, Any]:
    if kind == "custom":
        return {"mine": OfTheProgram()}
    if kind == "numpy scalar":
        return {"best": np.float64(0.25)}
    return {
        "tensor": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t(),
        "rng": torch.get_rng_state()[:16],
        "array": np.arange(12, dtype=np.int16).reshape(3, 4)[:, ::2],
        "number": np.float32(1.5),
        "args": argparse.Namespace(lr=0.1, layers=[1, 2], nested=argparse.Namespace(a=None)),
        "plain": {"a": (1, 2.5, "b"), "c": [True, b"bytes", {1, 2}], 3: complex(1, 2)},
        "dtype": torch.float16,
    }


def load_client_state(case: Case, folder: str, trust: bool) -> tuple[str, str, Any]:
    from ucp.errors import UcpError

    engine = build_target(case, {"trust_client_state": trust})
    before = gather(engine)
    try:
        _, found = engine.load_checkpoint(folder, "tag")
    except UcpError as error:
        after = gather(engine)
        changed = before is not None and after is not None and before.params.keys() != after.params.keys()
        return type(error).__name__, error.whole, changed
    return "", "", found


def save_several(case: Case, folder: str, tags: Sequence[str]) -> list[Truth | None]:
    """A run that saves after each of its steps; the truths."""
    engine = build_engine(case)
    truths = []
    for step, tag in enumerate(tags):
        continue_training(engine, case, step, 1)
        truths.append(gather(engine))
        engine.save_checkpoint(folder, tag)
    return truths


def load_each(case: Case, places: Sequence[tuple[str, str | None]]) -> list[Truth | None]:
    """Load all of these, one after the other, into one engine."""
    engine = build_target(case, trained=1)
    out = []
    for folder, tag in places:
        engine.load_checkpoint(folder, tag)
        out.append(gather(engine))
    return out


def reversed_groups(case: Case, folder: str, tag: str, steps: int, scheduler: bool) -> Resumed:
    """Into an engine whose param groups come in the reverse order."""
    original = build.parameter_groups

    def turned(case: Case, model: nn.Module) -> list[dict[str, Any]]:
        return original(case, model)[::-1]

    build.parameter_groups = turned
    extra: dict[str, Any] = {}
    if scheduler:
        extra["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    engine = build_engine(case, "ucp.deepspeed:initialize", ENABLED, **extra)
    path, found = engine.load_checkpoint(folder, tag)
    truth = gather(engine)
    after = continue_training(engine, case, steps, 2)
    return Resumed(str(path), found or {}, truth, tuple(after), gather(engine))


def train_with_torch_scheduler(case: Case, folder: str) -> Resumed:
    """A source with torch's own scheduler, whose state has one value for each group."""
    engine = build_engine(case, lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5))
    continue_training(engine, case, 0, 3)
    truth = gather(engine)
    engine.save_checkpoint(folder, "tag")
    after = continue_training(engine, case, 3, 2)
    return Resumed(folder, {}, truth, tuple(after), gather(engine))


def data_pipeline(clusters: str) -> dict[str, Any]:
    """A config section: a curriculum over the samples, and random layer-token dropping."""
    schedule = {"min_difficulty": 2, "max_difficulty": 40, "schedule_type": "fixed_linear"}
    metric = {
        "difficulty_type": "value",
        "clustering_type": "single_cluster",
        **schedule,
        "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 1},
    }
    curriculum = {"enabled": True, "data_cluster_path": clusters, "curriculum_metrics": {"length": metric}}
    dropping = {
        "enabled": True,
        "total_layer_num": 3,
        "random_ltd_layer_num": 1,
        "random_ltd_layer_id": [1],
        "model_mask_name": None,
        "model_type": "decoder",
        "hidden_state_order": "seq_batch_dim",
        "random_ltd_schedule": {
            "min_value": 2,
            "max_value": 9,
            "schedule_type": "fixed_linear",
            "schedule_config": {"require_steps": 10, "seq_per_step": 1},
        },
        "random_ltd_layer_token_lr_schedule": {"enabled": False},
    }
    return {
        "data_efficiency": {
            "enabled": True,
            "seed": 7,
            "data_sampling": {"enabled": True, "num_epochs": 4, "num_workers": 0, "curriculum_learning": curriculum},
            "data_routing": {"enabled": True, "random_ltd": dropping},
        }
    }


def through_a_data_pipeline(case: Case, folder: str, clusters: str, save: bool) -> tuple[Any, Any, int]:
    """The data sampler's and the dropping schedule's state: after some batches and a save, or after a load.

    Stage 1 saves as DeepSpeed does, stage 3 in the universal format.
    """
    data = torch.utils.data.TensorDataset(torch.arange(96.0))
    section = {"enabled": True, "save": {"format": "deepspeed" if case.stage == 1 else "universal"}}
    extra = {"ucp": section, **data_pipeline(clusters)}
    engine = build_engine(case, "ucp.deepspeed:initialize", extra, training_data=data)
    if save:
        batches = iter(engine.training_dataloader)
        for step in range(3):
            next(batches)
            continue_training(engine, case, step, 1)
        engine.save_checkpoint(folder, "tag")
        engine.ucp.wait()
    else:
        engine.load_checkpoint(folder)
    sampler = engine.training_dataloader.data_sampler.state_dict()
    return sampler, engine.random_ltd_scheduler.state_dict(), engine.global_steps


def save_without_frozen(case: Case, folder: str) -> Truth | None:
    engine = build_engine(case)
    continue_training(engine, case, 0, 2)
    truth = gather(engine)
    engine.save_checkpoint(folder, "tag", exclude_frozen_parameters=True)
    return truth


def load_to_compute(case: Case, folder: str, tag: str, persistent: int) -> tuple[dict[str, Any], float, Any, str]:
    """An engine without an optimizer: its weights after a load, a loss, the client state and the summary."""
    import ucp.deepspeed
    from tests.engines import models
    from tests.engines.truth import module_weights

    config = make_config(case) | ENABLED
    del config["optimizer"]
    config["zero_optimization"]["stage3_param_persistence_threshold"] = persistent
    engine, *_ = ucp.deepspeed.initialize(model=build.build_model(case), config=config)
    _, found = engine.load_checkpoint(folder, tag)
    engine.eval()
    with torch.no_grad():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        loss = models.loss(case.model, engine, *models.batch(case.model, 7, rank, world_size))
    torch.distributed.all_reduce(loss)
    buffers = {n: b.detach().clone() for n, b in engine.module.named_buffers()}
    return {**module_weights(engine), **buffers}, loss.item() / world_size, found, str(engine.ucp.last_load)


def reference_loss(case: Case, weights: Mapping[str, Any]) -> float:
    """The loss of the plain module with these weights."""
    from tests.engines import models

    model = build.build_model(case).eval()
    model.load_state_dict({n: t for n, t in weights.items() if n in model.state_dict()})
    with torch.no_grad():
        return models.loss(case.model, model, *models.batch(case.model, 7, 0, 1)).item()


def split_norms() -> None:
    """Have every engine of this process put two parameters in a group of their own; other groups have parameters of
    the same shapes."""

    def split(case: Case, model: nn.Module) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.5}]
        for name, parameter in model.named_parameters():
            groups[name in ("norm.weight", "down.bias")]["params"].append(parameter)
        return groups

    build.parameter_groups = split


def train_with_split_norms(case: Case, folder: str) -> Resumed:
    split_norms()
    engine = build_engine(case)
    continue_training(engine, case, 0, 3)
    truth = gather(engine)
    engine.save_checkpoint(folder, "tag")
    after = continue_training(engine, case, 3, 2)
    return Resumed(folder, {}, truth, tuple(after), gather(engine))


def load_with_split_norms(case: Case, folder: str, split: bool) -> Resumed | str:
    from ucp.errors import UcpError

    if split:
        split_norms()
    engine = build_target(case)
    try:
        path, found = engine.load_checkpoint(folder)
    except UcpError as error:
        return f"{type(error).__name__}: {error}"
    truth = gather(engine)
    after = continue_training(engine, case, 3, 2)
    return Resumed(str(path), found or {}, truth, tuple(after), gather(engine))


def train_altered(case: Case, folder: str, change: str) -> Run:
    """A source whose model is changed so (see jobs.ALTER)."""
    altered(change)
    return train(case, folder, "tag")


def load_altered(case: Case, folder: str, change: str) -> Resumed:
    altered(change)
    return resume(case, folder, "tag", STEPS, trained=1)
