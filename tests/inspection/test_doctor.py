"""What `ucp doctor` tells, beside what the packages say themselves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ucp.errors import BadArgument
from ucp.inspection import doctor
from ucp.tested import TESTED


def test_versions_are_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {f.name: f for f in doctor.examine(tmp_path)}
    assert found["torch"].found == torch.__version__
    assert found[f"free in {tmp_path}"].found.endswith(" GB")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(TESTED, "torch", ("1.0.0",))
    found = {f.name: f for f in doctor.examine(tmp_path)}
    assert found["torch"].remark == "the tests have run with 1.0.0"


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = {f.name: f for f in doctor.examine(tmp_path)}
    assert found["compiled optimizers"].found == "no"
    assert "ninja" in found["compiled optimizers"].remark


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="is no folder"):
        doctor.examine(tmp_path / "nowhere")
