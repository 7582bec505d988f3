"""Two ranks' files under each other's names: refused, naming both; where that can't be seen, it is said once."""

from __future__ import annotations

import io
import itertools
import logging
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

import ucp
from tests.formats.deepspeed.read.test_damaged import OLDER, TAG, files, refusal
from ucp.inspection.verify import verify


@pytest.fixture(params=sorted(OLDER))
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shutil.copytree(OLDER[request.param], tmp_path / "saved")
    return tmp_path / "saved"


def swap(one: Path, other: Path) -> None:
    kept = one.with_name("kept")
    one.rename(kept)
    other.rename(one)
    kept.rename(other)


def rewrite(path: Path, how: str) -> None:
    """The same content as a tool would write it: through a stream, in the older format, under a temporary name."""
    content = torch.load(path, weights_only=False)
    if how == "stream":
        stream = io.BytesIO()
        torch.save(content, stream)
        path.write_bytes(stream.getvalue())
    elif how == "older":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(content, path.with_name("tmp1234.pt"))
        path.with_name("tmp1234.pt").rename(path)


def test_any_two_files_swapped(whole: Path) -> None:
    """Ranks' files, and a model file with an optimizer's: all pairs."""
    for one, other in itertools.combinations(files(whole), 2):
        swap(whole / TAG / one, whole / TAG / other)
        text = refusal(whole)
        assert one in text
        assert other in text
        found = [finding for finding in verify(whole / TAG).findings if finding.fault]
        assert found
        assert any(one in finding.text and other in finding.text for finding in found)
        swap(whole / TAG / one, whole / TAG / other)
    assert verify(whole / TAG).whole


def test_one_file_in_anothers_place(whole: Path) -> None:
    one, other = (n for n in files(whole) if "zero_pp_rank" in n and "optim" in n)
    shutil.copy(whole / TAG / one, whole / TAG / other)
    text = refusal(whole)
    assert one in text
    assert other in text


@pytest.mark.parametrize("how", ["stream", "older", "temporary"])
def test_what_could_not_be_checked_is_said_once(
    whole: Path, how: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    for name in files(whole):
        rewrite(whole / TAG / name, how)
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(whole, tag=TAG) as checkpoint:
        said = checkpoint.catalog.unchecked
    assert len(said) == (2 if how == "older" else 1)
    assert f"each of {len(files(whole))} files" in said[0]
    assert "not the name that it was written under" in said[0]
    assert sum("not the name that it was written under" in r.getMessage() for r in caplog.records) == 1
    assert said[0] in {finding.text for finding in verify(whole / TAG).findings if not finding.fault}


def test_whole_files_leave_nothing_unchecked(whole: Path) -> None:
    with ucp.open(whole, tag=TAG) as checkpoint:
        assert checkpoint.catalog.unchecked == ()


@pytest.mark.parametrize("to", ["deepspeed", "deepspeed-universal"])
def test_our_writer_names_its_files_as_torch_would(whole: Path, tmp_path: Path, to: str) -> None:
    ucp.convert(whole, tmp_path / "out", to=to, tag=TAG, **({"layout": "dp=2,zero=3"} if to == "deepspeed" else {}))
    written = sorted((tmp_path / "out").rglob("*.pt"))
    assert len(written) >= 4
    for path in written:
        torch.save(torch.load(path, weights_only=False), tmp_path / path.name)
        with zipfile.ZipFile(path) as ours, zipfile.ZipFile(tmp_path / path.name) as theirs:
            assert ours.namelist()[0] == theirs.namelist()[0] == f"{path.stem}/data.pkl"
            assert ours.testzip() is None
