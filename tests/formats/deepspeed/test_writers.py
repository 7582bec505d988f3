"""What the release that wrote a checkpoint did, where the checkpoint does not say."""

from __future__ import annotations

from typing import Any

import pytest

from ucp.formats.deepspeed.read.replicated import cuts_said
from ucp.formats.deepspeed.writers import default_clipping, pipeline_gradients
from ucp.formats.shared.gradients import AGAIN, MEAN, SUM

AUTOTP = {"tensor_parallel": {"autotp_size": 2}}
ROWS_ALONE: dict[str, Any] = {
    "parameter_with_row_parallelism_patterns": ["o_proj"],
    "tp_replicated_parameter_patterns": [],
}


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


@pytest.mark.parametrize(
    ("info", "config", "counts"),
    [
        (ROWS_ALONE, AUTOTP, False),  # as 0.18.9 writes it: what of the rest each rank has whole, it does not say
        ({**ROWS_ALONE, "tp_replicated_parameter_patterns": ["norm"]}, AUTOTP, True),
        ({**ROWS_ALONE, "affine_map": {}}, AUTOTP, True),
        (ROWS_ALONE, {}, True),  # a Megatron-style model's own words
        (ROWS_ALONE, {"tensor_parallel": {"autotp_size": 0}}, True),
        (None, AUTOTP, False),
    ],
)
def test_cuts_that_autotp_says_in_part_do_not_count(info: Any, config: dict[str, Any], counts: bool) -> None:
    assert cuts_said(info, config) == (info if counts else None)
