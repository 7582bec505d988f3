"""What `ucp doctor` tells, beside what the packages say themselves."""

from __future__ import annotations

import os
import shutil
import time
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


def test_a_build_that_was_killed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch itself waits for: its own lock, of a process that is gone."""
    from torch.utils.file_baton import FileBaton

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert "being compiled" not in {f.name for f in doctor.examine(tmp_path)}
    (tmp_path / "deepspeed_shm_comm").mkdir()
    lock = tmp_path / "deepspeed_shm_comm/lock"
    assert FileBaton(str(lock)).try_acquire()
    os.utime(lock, (0, time.time() - 600))
    found = {f.name: f for f in doctor.examine(tmp_path)}["being compiled"]
    assert found.found == "deepspeed_shm_comm"
    assert found.remark == f"since 10 minutes; if no compiler runs, DeepSpeed waits for ever: delete '{lock}'"


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="is no folder"):
        doctor.examine(tmp_path / "nowhere")
