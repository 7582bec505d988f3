"""From a case to a live engine, on a rank."""

from __future__ import annotations

from typing import Any

import torch

from tests.engines import models
from tests.engines.configs import OPTIMIZERS, Case, make_config, parameter_groups
from tests.engines.lion import Lion
from tests.engines.zygote import resolve


def build_model(case: Case) -> torch.nn.Module:
    """The module that ``case`` trains, before DeepSpeed sees it."""

    def build() -> torch.nn.Module:
        model = models.build(
            case.model, seed=case.seed, frozen=case.frozen, tied=case.tied, buffers=case.buffers, cube=case.cube
        )
        return models.Wrapped(model) if case.wrapped else model

    if case.zero_init:
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=make_config(case)):
            return build()
    return build()


def build_engine(
    case: Case, initialize: str = "deepspeed:initialize", extra: dict[str, Any] | None = None, **arguments: Any
) -> Any:
    """A fresh engine.

    ``initialize`` is "module:function" of what to call in place of ``deepspeed.initialize``; ``extra`` is merged into
    the config at its top level; ``arguments`` are handed on.
    """
    model = build_model(case)
    groups = parameter_groups(case, model)
    parameters = groups[0]["params"] if case.groups == 1 else groups
    arguments = {"model": model, "config": make_config(case) | (extra or {})} | arguments
    if case.optimizer == "lion_reference":
        arguments["optimizer"] = Lion(parameters, **OPTIMIZERS[case.optimizer][1])
    else:
        arguments["model_parameters"] = parameters
    engine, *_ = resolve(initialize)(**arguments)
    return engine
