"""What the release that wrote a checkpoint did, where the checkpoint does not say."""

from __future__ import annotations

import pytest

from ucp.formats.deepspeed.writers import default_clipping, pipeline_gradients
from ucp.formats.shared.gradients import AGAIN, MEAN, SUM


@pytest.mark.parametrize(
    ("version", "how"),
    [
        ("0.15.4", MEAN),
        ("0.16.0", SUM),
        ("0.17.6+abc", SUM),
        ("0.18.2", SUM),
        ("0.18.3", AGAIN),
        ("0.19.2", AGAIN),
        ("0.19.3", MEAN),
        ("1.0.0", MEAN),
        ("", MEAN),
        ("0.16", MEAN),
        ("9" * 5000 + ".1.1", MEAN),
        (None, MEAN),
        ([0, 16, 0], MEAN),
    ],
)
def test_pipeline_gradients(version: object, how: str) -> None:
    assert pipeline_gradients(version) == how


@pytest.mark.parametrize(
    ("version", "norm"),
    [
        ("0.15.4", 0.0),
        ("0.19.2", 0.0),
        ("0.19.3", 1.0),
        ("0.19.8+cpu", 1.0),
        ("of unknown version", None),
        (None, None),
    ],
)
def test_default_clipping(version: object, norm: float | None) -> None:
    assert default_clipping(version) == norm
