"""Training state that lies in or beside a folder and is not read is named, and a part is never the whole."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import ucp
from tests.formats import raw
from tests.formats.foreign_programs import made_by
from tests.inspection.conftest import OLDER
from ucp import formats
from ucp.cli import convert as convert_command
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
    """DeepSpeed's tag in a Trainer's folder: the Trainer reads the rest itself, so a conversion says it, not a load."""
    ours = raw.write_consolidated(tmp_path / "checkpoint-7/global_step7", raw.make(tmp_path / "raw").catalog)
    for name in ("trainer_state.json", "rng_state_0.pth", "scheduler.pt", "zero_to_fp32.py", "config.json"):
        (ours.parent / name).write_bytes(b"")
    (ours.parent / "latest").write_text("global_step7")
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(ours.parent):
        assert not caplog.records
    ucp.convert(ours.parent, tmp_path / "out")
    (record,) = caplog.records
    names = "'rng_state_0.pth', 'scheduler.pt', 'trainer_state.json', beside it"
    assert record.getMessage().endswith(names)
    assert [f.text.endswith(names) for f in verify(ours.parent).findings if f.kind == "unread"] == [True]


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
