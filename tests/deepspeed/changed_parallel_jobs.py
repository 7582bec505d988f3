"""Jobs for the ranks: models changed since the checkpoint, under tensor and pipeline parallelism, and LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.deepspeed.change_jobs import Gone
from tests.engines import autoep, parallel_runs, pipe_models, tp_models, tp_runs
from tests.engines.autoep import AutoCase
from tests.engines.models import LLAMA_VOCABULARY
from tests.engines.resume import continue_training
from tests.engines.runs import STEPS

ROWS = 36  # of the vocabulary, in place of 29


def goes_on(case: Any, folder: str, changes: Mapping[str, Any] | None, lora: bool = False, save: str = "") -> Gone:
    """Load into a model of more rows, other frozen parameters and with ``lora`` adapters, and take three steps."""
    from ucp.errors import UcpError

    if changes is None or "resized" in changes:
        tp_models.VOCABULARY = pipe_models.VOCABULARY = ROWS
    original = tp_runs.build_model

    def build_and_change(tp: Any, mesh: Any) -> nn.Module:
        model = original(tp, mesh)
        if lora:
            import peft

            torch.manual_seed(5)
            config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            return peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" not in name or not changes or "frozen" not in changes)
        return model

    tp_runs.build_model = build_and_change
    load = {"prove": "always"} | ({"changes": changes} if changes else {})
    rig = parallel_runs.rig_of(case)
    engine = rig.build_engine(case, {"load": load, "save": {"async": False}})
    before = rig.gather(engine)
    try:
        engine.load_checkpoint(folder)
    except UcpError as error:
        return Gone(before, rig.gather(engine), error.whole, (), False, ())
    report, after = engine.ucp.last_load, rig.gather(engine)
    losses = tuple(rig.continue_training(engine, case, STEPS, 3))
    if save:
        engine.save_checkpoint(save)
    complete = report.proof is not None and report.proof.complete
    return Gone(before, after, str(report), report.changes, complete, losses)


GROWN = LLAMA_VOCABULARY + 7


def with_experts(case: AutoCase, folder: str, changes: Mapping[str, Any] | None, how: str = "") -> Gone:
    """Load into a Mixtral under AutoEP, and take three steps. how: 'grown' for more rows, frozen norms and a trained
    projection of the keys; 'lora' for adapters on the attention."""
    from ucp.errors import UcpError

    original = autoep.mixtral

    def changed(seed: int) -> nn.Module:
        if how == "grown":
            autoep.LLAMA_VOCABULARY = GROWN
        model = original(seed)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(how != "grown" or "norm" not in name)
        if how == "lora":
            import peft

            torch.manual_seed(5)
            config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            model = peft.get_peft_model(model, config)
            model.set_experts_implementation = lambda _: model.base_model.model.set_experts_implementation("eager")
        return model

    autoep.mixtral = changed
    load = {"prove": "always"} | ({"changes": changes} if changes else {})
    engine = autoep.build_engine(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True, "load": load}})
    before = autoep.gather(engine)
    try:
        engine.load_checkpoint(folder)
    except UcpError as error:
        return Gone(before, autoep.gather(engine), error.whole, (), False, ())
    report, after = engine.ucp.last_load, autoep.gather(engine)
    losses = tuple(continue_training(engine, case.case, STEPS, 3, case.tp))
    complete = report.proof is not None and report.proof.complete
    return Gone(before, after, str(report), report.changes, complete, losses)
