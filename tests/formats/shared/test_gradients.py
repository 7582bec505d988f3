"""What a state's moments are of, by what a checkpoint says wrote it."""

from __future__ import annotations

from typing import Any

import pytest

from ucp.catalog import TrainingState
from ucp.formats.shared.gradients import (
    AGAIN,
    MEAN,
    SUM,
    Gradients,
    entry,
    micro_steps_of,
    note,
    of_pipeline,
    recorded,
)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({"gradient_accumulation_steps": 4, "train_batch_size": 8}, 4),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3}, 4),
        ({"gradient_accumulation_steps": "auto", "train_batch_size": 24, "train_micro_batch_size_per_gpu": 3}, 4),
        ({"gradient_accumulation_steps": True}, 0),
        ({"train_batch_size": 24}, 0),
        ({"gradient_accumulation_steps": -2}, 0),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 0}, 0),
    ],
)
def test_micro_steps(config: dict[str, Any], steps: int) -> None:
    assert micro_steps_of(config, dp=2) == steps


def test_where_nothing_is_divided_otherwise_it_is_the_mean() -> None:
    assert of_pipeline(SUM, 1, 4) == of_pipeline(AGAIN, 4, 1) == of_pipeline(MEAN, 4, 4) == Gradients()
    assert of_pipeline(SUM, 4, 2) == of_pipeline(SUM, 4, 3)
    assert of_pipeline(AGAIN, 4, 2) != of_pipeline(AGAIN, 4, 3)


@pytest.mark.parametrize("gradients", [of_pipeline(SUM, 2, 2), of_pipeline(AGAIN, 2, 3), of_pipeline(SUM, 0, 1)])
def test_kept_and_told(gradients: Gradients) -> None:
    assert recorded(TrainingState(extra=entry(gradients))) == gradients
    assert "take no mean" in note(gradients, Gradients())
    assert "take no mean" in note(Gradients(), gradients)
    # Of one whose micro steps nobody knows nothing says that they are as many.
    assert bool(note(gradients, gradients)) == (gradients.micro_steps == 0)
    assert note(Gradients(), Gradients()) == ""


@pytest.mark.parametrize(
    "said", [None, "sum", {"how": "\x1b[2J"}, {"how": ["sum"]}, {"how": MEAN, "micro_steps": 3}, {"micro_steps": 2}]
)
def test_what_is_no_such_entry_counts_as_the_mean(said: object) -> None:
    assert recorded(TrainingState(extra={"gradients": said})) == Gradients()


def test_odd_counts_are_unknown() -> None:
    said = {"how": SUM, "micro_steps": -1, "stages": "\x1b[2J"}
    assert recorded(TrainingState(extra={"gradients": said})) == Gradients(SUM, 0, 1)
