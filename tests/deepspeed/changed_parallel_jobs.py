"""Jobs for the ranks: models changed since the checkpoint, under tensor and pipeline parallelism, and LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.deepspeed.change_jobs import Gone
from tests.engines import parallel_runs, pipe_models, tp_models, tp_runs
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
