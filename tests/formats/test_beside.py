"""Training state that lies in or beside a folder and is not read is named, and a part is never the whole."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ucp
from tests.formats import raw
from tests.formats.foreign_programs import made_by
from tests.inspection.conftest import OLDER
from ucp import formats
from ucp.cli import convert as convert_command
from ucp.errors import DamagedCheckpoint
from ucp.inspection.verify import verify
from ucp.storage import locations


def unread(path: Path, caplog: pytest.LogCaptureFixture) -> str:
    """What opening the folder says of it, which is what a check says."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(path):
        pass
    (line,) = [r.getMessage() for r in caplog.records if "not read" in r.getMessage()]
    (finding,) = [f for f in verify(path, quick=True).findings if f.kind == "unread"]
    assert not finding.fault
    assert line == f"{path}: {finding.text}"
    return finding.text


@pytest.mark.slow
def test_a_trainers_checkpoint(
    foreign: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made_by("trainer", foreign) / "checkpoint-2"
    names = "'training_args.bin'"
    assert unread(path, caplog) == f"not read, though training state is kept under such names: {names}, in it"
    assert convert_command.main([str(path), str(tmp_path / "converted")]) == 0
    assert names in capsys.readouterr().err


@pytest.mark.slow
def test_accelerates_folders_of_parts(foreign: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are read as one; a part by itself is never taken for the whole."""
    path = made_by("accelerate_fsdp", foreign)
    with ucp.open(path) as opened:
        assert opened.unread == ()
    for part, other in (("optimizer_0", "pytorch_model_fsdp_0"), ("pytorch_model_fsdp_0", "optimizer_0")):
        (finding,) = [f for f in verify(path / part, quick=True).findings if f.kind == "unread"]
        assert f"'{other}', 'scheduler.bin', beside it" in finding.text


def test_a_trainers_state_beside_a_tag(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One of ours in a Trainer's folder is read with what the Trainer keeps beside it. What is left, the Trainer reads
    itself, so a conversion says it, not a load."""
    made = raw.make(tmp_path / "raw").catalog
    ours = raw.write_consolidated(tmp_path / "checkpoint-7/global_step7", made)
    step, around = made.training_state.global_steps, ours.parent
    (around / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_metric": 0.5}))
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    for rank in range(made.layout.world_size):
        torch.save(states, around / f"rng_state_{rank}.pth")
    torch.save({"last_epoch": step, "_step_count": (step or 0) + 1}, around / "scheduler.pt")
    for name in ("training_args.bin", "zero_to_fp32.py", "config.json"):
        (around / name).write_bytes(b"")
    (around / "latest").write_text("global_step7")
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(around) as opened:
        assert not caplog.records
        state = opened.training_state
        assert state.client_state["trainer_state"]["best_metric"] == 0.5
        assert state.lr_scheduler == made.training_state.lr_scheduler or state.lr_scheduler["last_epoch"] == step
        assert len(state.extra["ranks"]) >= made.layout.world_size
    ucp.convert(around, tmp_path / "out")
    (record,) = caplog.records
    assert record.getMessage().endswith(": 'training_args.bin', beside it")
    assert [f.text.endswith("'training_args.bin', beside it") for f in verify(around).findings if f.kind == "unread"]
    # What was converted from it has the Trainer's state, whatever lies around it then.
    shutil.copytree(tmp_path / "out", around.with_name("checkpoint-9") / "global_step7")
    (around.with_name("checkpoint-9") / "trainer_state.json").write_text('{"global_step": 9}')
    with ucp.open(around.with_name("checkpoint-9") / "global_step7") as opened:
        assert opened.training_state.client_state["trainer_state"]["best_metric"] == 0.5
    (around / "trainer_state.json").write_text(json.dumps({"global_step": (step or 0) + 1}))
    with pytest.raises(DamagedCheckpoint, match=r"and 'trainer_state.json' of step \d+; parts of two steps are mixed"):
        ucp.open(around)


def test_a_folder_around_that_cannot_be_listed_keeps_nothing_from_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a bucket of which a user may read one prefix alone."""
    path = OLDER / "0.19.8-z1-bf16/global_step3"
    names, is_file = locations.names, locations.is_file

    def refused(folder: Path) -> bool:
        return Path(folder) == path.parent

    def names_here(folder: Path) -> Any:
        if refused(folder):
            raise PermissionError(13, "Permission denied", str(folder))
        return names(folder)

    def is_file_here(file: Path) -> bool:
        if refused(Path(file).parent):
            raise PermissionError(13, "Permission denied", str(file))
        return is_file(file)

    monkeypatch.setattr(locations, "names", names_here)
    monkeypatch.setattr(locations, "is_file", is_file_here)
    assert [folder for _, folder in formats.completing(path, formats.built_in()[1])] == [None] * 3


@pytest.mark.parametrize("form", ["consolidated", "fragmented", "virtual"])
def test_nothing_is_said_of_our_own(tmp_path: Path, form: str) -> None:
    path = raw.write_form(form, tmp_path / form, raw.make(tmp_path / "source"))
    with ucp.open(path) as opened:
        assert opened.unread == ()
        (path / "model_ema.pt").write_bytes(b"")
        (path / "notes.txt").write_bytes(b"")
        assert opened.unread == ("model_ema.pt",)


@pytest.mark.parametrize("name", sorted(p.name for p in OLDER.glob("[0-9]*")))
def test_nothing_is_said_of_deepspeeds(name: str) -> None:
    with ucp.open(OLDER / name) as opened:
        assert opened.unread == ()


def test_nothing_is_said_of_what_we_convert_to(tmp_path: Path) -> None:
    source = raw.write_form("consolidated", tmp_path / "source", raw.make(tmp_path / "raw"))
    for to, layout in (("dcp", None), ("huggingface", None), ("deepspeed", "dp=2,zero=3")):
        options = {"ds_config": {}} if layout else {}
        ucp.convert(source, tmp_path / to, to, layout, **options)
        with ucp.open(tmp_path / to) as opened:
            assert opened.unread == ()
