"""Which gradients an optimizer's states are of, where that is not their mean over the micro steps of a step.

Plain modules step with the mean, but where DeepSpeed divides in each tensor that the module returns, and one of them
was computed from another: 0.18.3 to 0.19.5, and later releases where a program calls backward of its own loss.
DeepSpeed's pipelines have not always done so, as measured with stock releases (``tests/deepspeed/test_gradients.py``)
and read in DeepSpeed's own history:

- before 0.16.0 the mean: the last stage divides its loss (``runtime/engine.py: backward``);
- 0.16.0 to 0.18.2 the sum: the loss is divided only if backward reduces gradients, which pipelines do by themselves;
- 0.18.3 to 0.19.2 the mean, divided once more by each stage that passes a gradient on: every engine divides what
  arrives (``_backward_prologue_per_tensor``);
- since 0.19.3 the mean.

A state goes from one to the other exactly. What it is of does not change with that, so loads tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ucp.catalog import TrainingState

MEAN, SUM, AGAIN, OUTPUTS = "mean", "sum", "divided again", "divided in outputs"

KEY = "gradients"
"""Where `TrainingState.extra` has them, if they are no mean."""

_WHERE = {
    SUM: "DeepSpeed's pipelines of 0.16.0 to 0.18.2 take no mean",
    AGAIN: "DeepSpeed's pipelines of 0.18.3 to 0.19.2 take no mean",
    OUTPUTS: "DeepSpeed of 0.18.3 to 0.19.5 divides so, and since then where a program calls backward of its own loss; "
    "if this one does, too, it goes on alike",
}


@dataclass(frozen=True)
class Gradients:
    """What one step's gradients are.

    how: 'mean' over its micro steps; 'sum'; 'divided again': the mean, divided by their number once more for each stage
    of the pipeline that comes after a parameter's own; or 'divided in outputs': once more for each tensor that the
    module has returned, where another was computed from it.
    micro_steps, stages: how many there are; 1 where they do not count. micro_steps is 0 if it is not known.
    """

    how: str = MEAN
    micro_steps: int = 1
    stages: int = 1

    def __str__(self) -> str:
        if self.how == MEAN:
            return "the mean over its micro steps"
        count = self.micro_steps or "an unknown number of"
        if self.how == SUM:
            return f"the sum over its {count} micro steps"
        if self.how == OUTPUTS:
            return f"the mean over its {count} micro steps, divided once more in tensors that the module returned"
        return f"the mean over its {count} micro steps, divided once more by each later one of {self.stages} stages"


def of_pipeline(how: str, micro_steps: int, stages: int) -> Gradients:
    """What a pipeline's are. With one micro step all are the same, and with one stage nothing is divided again."""
    if micro_steps == 1 or how == MEAN or (how == AGAIN and stages == 1):
        return Gradients()
    return Gradients(how, micro_steps, stages if how == AGAIN else 1)


def micro_steps_of(config: Mapping[str, Any], dp: int) -> int:
    """Micro steps of a step, by DeepSpeed's configuration; 0 if it does not say."""
    said = _count(config.get("gradient_accumulation_steps"))
    batch, micro = _count(config.get("train_batch_size")), _count(config.get("train_micro_batch_size_per_gpu"))
    return said or (batch // (micro * max(dp, 1)) if micro else 0)


def entry(gradients: Gradients) -> dict[str, Any]:
    """What `TrainingState.extra` gets of them: nothing for the mean."""
    if gradients.how == MEAN:
        return {}
    return {KEY: {"how": gradients.how, "micro_steps": gradients.micro_steps, "stages": gradients.stages}}


def recorded(state: TrainingState) -> Gradients:
    """What this state's moments are of; the mean if it does not say."""
    said = state.extra.get(KEY)
    how = said.get("how") if isinstance(said, Mapping) else None
    if not isinstance(said, Mapping) or not isinstance(how, str) or how not in _WHERE:
        return Gradients()
    return Gradients(how, _count(said.get("micro_steps")), _count(said.get("stages")) or 1)


def note(saved: Gradients, live: Gradients) -> str:
    """What to warn of after a load of optimizer states; '' if both are the same, as far as is known."""
    if saved == live and saved.micro_steps:
        return ""
    odd = saved if saved.how != MEAN else live
    return (
        f"the checkpoint's optimizer states are of gradients that are {saved}, and gradients here are {live} "
        f"({_WHERE[odd.how]}): the states are restored exactly, but steps "
        "from here on differ in size from the saved run's; Adam follows in some steps, SGD needs another learning rate"
    )


def _count(value: object) -> int:
    """A count of something; 0 for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else 0
