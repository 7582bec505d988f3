"""What tells that a checkpoint is not the one that its name says."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import ucp
from tests.attacks import formats
from ucp.inspection.verify import verify


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_an_older_checkpoint_in_a_newer_ones_place(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = formats.make(name, tmp_path)
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(run) as opened:
        assert opened.training_state.global_steps == 3
    assert "named after step" not in caplog.text
    (run / "global_step3").rename(run / "global_step9")
    (run / "latest").write_text("global_step9")
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(run) as opened:
        (note,) = [text for text in opened.catalog.unchecked if "named after" in text]
    assert "its files are of step 3, and it is named after step 9" in caplog.text
    assert note in str(verify(run).as_json())
    (run / "global_step9").rename(run / "best")
    with ucp.open(run, tag="best") as opened:
        assert not [text for text in opened.catalog.unchecked if "named after" in text]
