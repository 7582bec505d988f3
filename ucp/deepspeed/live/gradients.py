"""What an engine's optimizer steps with, where that is not the mean over the micro steps of a step."""

from __future__ import annotations

from typing import Any

from ucp.deepspeed.live import outputs, releases
from ucp.deepspeed.live.parallel import layout_of
from ucp.formats.shared.gradients import OUTPUTS, Gradients, of_pipeline


def gradients_of(engine: Any) -> Gradients:
    """By what the installed release makes of a pipeline's gradients, and by what was seen of a module's outputs."""
    if not releases.PIPELINE.has(engine):
        return Gradients(OUTPUTS, engine.gradient_accumulation_steps()) if outputs.are_divided(engine) else Gradients()
    how = releases.pipeline_gradients()
    return of_pipeline(how, engine.gradient_accumulation_steps(), layout_of(engine).pp)
