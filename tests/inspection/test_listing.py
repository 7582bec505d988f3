"""The checkpoints in a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.formats import raw
from ucp.errors import NotACheckpoint
from ucp.formats.universal import manifest
from ucp.inspection.listing import listing


def test_a_run(tmp_path: Path, made: raw.Raw) -> None:
    for k, tag in enumerate(("step3", "step2", "step1")):
        folder = raw.write_consolidated(tmp_path / "run" / tag, made.catalog)
        for path in folder.iterdir():
            os.utime(path, (1000 + k, 1000 + k))
    (tmp_path / "run/latest").write_text("step1\n")
    (tmp_path / "run/step2/model-00001-of-00001.safetensors").unlink()
    (tmp_path / "run/.ucp-tmp-step4-1-0123456789abcdef").mkdir()
    (tmp_path / "run/notes").mkdir()
    found = listing(tmp_path / "run")
    assert [entry.tag for entry in found.checkpoints] == ["step3", "step2", "step1"]  # by age
    assert [entry.whole for entry in found.checkpoints] == [True, False, True]
    assert [entry.latest for entry in found.checkpoints] == [False, False, True]
    assert [entry.step for entry in found.checkpoints] == [7, None, 7]
    assert found.checkpoints[0].written == 1000
    assert found.checkpoints[0].bytes == sum(p.stat().st_size for p in (tmp_path / "run/step3").iterdir())
    assert "model-00001-of-00001.safetensors" in str(found.checkpoints[1].problem)
    assert found.unfinished == (".ucp-tmp-step4-1-0123456789abcdef",)
    assert found.latest == "step1"


def test_what_is_not_understood_is_not_called_damaged(consolidated: Path) -> None:
    path = consolidated / manifest.NAME
    ours = f'"ucp":"{manifest.VERSION}"'.encode()
    assert ours in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(ours, b'"ucp":"2.0"'))
    (entry,) = listing(consolidated).checkpoints
    assert entry.whole is None
    assert "manifest version '2.0' is not supported" in str(entry.problem)


def test_native_ones(native: Path) -> None:
    found = listing(native)
    (entry,) = found.checkpoints
    assert (entry.tag, entry.step, entry.format, entry.latest, entry.whole) == (
        "global_step3",
        3,
        "deepspeed",
        True,
        True,
    )
    assert entry.bytes == sum(p.stat().st_size for p in (native / "global_step3").iterdir())
    (alone,) = listing(native / "global_step3").checkpoints
    assert alone == entry


def test_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint):
        listing(tmp_path)
