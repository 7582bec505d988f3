"""A flipped bit in a torch file's tensor data ends a conversion: nothing damaged gets digests of its own."""

from __future__ import annotations

import os
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.formats import raw
from tests.formats.deepspeed.read.test_damaged import OLDER, TAG
from tests.slow_cases import slow_but
from ucp.errors import DamagedCheckpoint, DigestMismatch
from ucp.inspection.verify import verify
from ucp.units import bytes_text

RECORDS = 4  # of each file
TARGETS: dict[str, dict[str, Any]] = {
    "universal": {},
    "dcp": {},
    "deepspeed": {"layout": "dp=3,zero=3"},
    "deepspeed-universal": {},
    "virtual": {"virtual": True, "digests": True},
}


def storages(path: Path) -> dict[str, range]:
    """The bytes of every storage in the file that has any, by zipfile."""
    out = {}
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            head = info.header_offset
            start = head + 30 + sum(int.from_bytes(data[head + k : head + k + 2], "little") for k in (26, 28))
            if "/data/" in info.filename and info.file_size:
                out[info.filename.partition("/")[2]] = range(start, start + info.file_size)
    return out


def convert(source: Path, dest: Path, target: str) -> ucp.ConversionReport:
    return ucp.convert(source, dest, to="universal" if target == "virtual" else target, **TARGETS[target])


@pytest.mark.parametrize("target", slow_but(list(TARGETS)[::3], TARGETS))
@pytest.mark.parametrize("which", ["z1", pytest.param("z3", marks=pytest.mark.slow)])
def test_one_flipped_bit_of_any_tensor(tmp_path: Path, which: str, target: str) -> None:
    source = tmp_path / "saved"
    shutil.copytree(OLDER[which], source)
    randomly = random.Random(f"{which} {target}")
    convert(source, tmp_path / "truth", target)
    truth = raw.tree(tmp_path / "truth")
    shutil.rmtree(tmp_path / "truth")
    flipped = refused = 0
    for path in sorted((source / TAG).glob("*.pt")):
        before = path.stat()
        for name, place in some(randomly, storages(path)):
            at, mask = randomly.choice(place), 1 << randomly.randrange(8)
            raw.flip(path, at, mask)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            error = refusal(source, tmp_path / "dest", target)
            if error is None:  # weights that the masters replace are not read: what is written is the truth
                assert raw.tree(tmp_path / "dest") == truth, (path.name, name)
                shutil.rmtree(tmp_path / "dest")
            else:
                assert path.name in error or "mixed" in error, error
                refused += f"record '{name}'" in error
            assert list(tmp_path.iterdir()) == [source]
            flipped += 1
            raw.flip(path, at, mask)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert refused >= flipped // 2


def some(randomly: random.Random, found: dict[str, range]) -> list[tuple[str, range]]:
    return randomly.sample(list(found.items()), min(len(found), RECORDS))


def refusal(source: Path, dest: Path, target: str) -> str | None:
    """What the conversion says where it refuses; None where it does not."""
    try:
        convert(source, dest, target)
    except DamagedCheckpoint as error:
        return str(error)
    return None


def test_what_was_verified_is_reported(tmp_path: Path) -> None:
    report = ucp.convert(OLDER["z1"], tmp_path / "out")
    assert report.unverified_bytes == 0
    assert report.verified_bytes >= report.bytes_read // 2
    again = ucp.convert(tmp_path / "out", tmp_path / "again")
    assert (again.unverified_bytes, again.verified_bytes > 0) == (0, True)
    assert f"(verified {bytes_text(report.verified_bytes)} of what was read)" in str(report)


def test_files_without_crcs_are_said_not_to_be_verified(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    source = tmp_path / "saved"
    shutil.copytree(OLDER["z1"], source)
    torch.serialization.set_crc32_options(False)
    try:
        for path in (source / TAG).glob("*.pt"):
            torch.save(torch.load(path, weights_only=False), path)
    finally:
        torch.serialization.set_crc32_options(True)
    report = ucp.convert(source, tmp_path / "out")
    assert report.verified_bytes == 0
    assert report.unverified_bytes > 0
    assert "with nothing to verify" in str(report)
    verdict = verify(source)
    assert (verdict.whole, verdict.checked["digested_by_zip"]) == (True, 0)
    told = [finding.text for finding in verdict.findings if finding.kind == "unchecked"]
    assert any("no CRC-32s" in text for text in told)
    assert any(text.startswith("3 files have no digests, so flipped bits can't be seen") for text in told)


@pytest.mark.parametrize("where", ["one", "many"])
def test_dcp_records(tmp_path: Path, where: str) -> None:
    """Stock DCP's records: all alike ones too, whose directories are not read."""
    import torch.distributed.checkpoint as dcp

    names = ["a"] if where == "one" else [f"layer.{k}" for k in range(6)]
    state = {"model": {name: torch.randn(40, 30) for name in names}}
    dcp.save(state, checkpoint_id=tmp_path / "source", no_dist=True)
    report = ucp.convert(tmp_path / "source", tmp_path / "out")
    assert (report.verified_bytes, report.unverified_bytes) == (len(names) * 4800, 0)
    (file,) = (tmp_path / "source").glob("*.distcp")
    data = file.read_bytes()
    for k, tensor in enumerate(state["model"].values()):
        at = data.index(tensor.numpy().tobytes()) + 100 * k
        raw.flip(file, at, 64)
        with pytest.raises(DigestMismatch, match=file.name):
            ucp.convert(tmp_path / "source", tmp_path / "damaged")
        assert not (tmp_path / "damaged").exists()
        loaded = {"model": {name: torch.zeros(40, 30) for name in names}}
        with pytest.raises(DigestMismatch, match=file.name):
            ucp.load(loaded, tmp_path / "source")
        assert not any(found.any() for found in loaded["model"].values())
        raw.flip(file, at, 64)
    report = ucp.load(loaded, tmp_path / "source")
    assert (report.verified_bytes, report.unverified_bytes) == (len(names) * 4800, 0)
    report = ucp.load(loaded, tmp_path / "source", verify=False)
    assert (report.verified_bytes, report.unverified_bytes) == (0, len(names) * 4800)
    assert "; verified 0 B, not " in str(report)
    assert all(torch.equal(loaded["model"][name], state["model"][name]) for name in names)


def test_a_model_folders_bin_file(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    weights = {f"layer.{k}.weight": torch.randn(20, 30) for k in range(4)}
    torch.save(weights, model / "pytorch_model.bin")
    report = ucp.convert(model, tmp_path / "out")
    assert (report.verified_bytes, report.unverified_bytes) == (4 * 2400, 0)
    for name, place in storages(model / "pytorch_model.bin").items():
        raw.flip(model / "pytorch_model.bin", place[-1], 2)
        with pytest.raises(DigestMismatch, match=f"pytorch_model.bin: its record '{name}'"):
            ucp.convert(model, tmp_path / "damaged")
        with ucp.open(model) as checkpoint, pytest.raises(DigestMismatch):
            checkpoint.verify()
        raw.flip(model / "pytorch_model.bin", place[-1], 2)
    with ucp.open(model) as checkpoint:
        assert checkpoint.verify() == 4 * 2400


def test_tensors_of_the_training_state(tmp_path: Path) -> None:
    """The caller's tensors lie in records of their own."""
    pytest.importorskip("deepspeed")
    source = tmp_path / "saved"
    shutil.copytree(OLDER["z1"], source)
    path = next((source / TAG).glob("mp_rank_00_model_states.pt"))
    content = torch.load(path, weights_only=False)
    content["mine"] = mine = torch.randn(500)
    torch.save(content, path)
    ucp.convert(source, tmp_path / "whole")
    raw.flip(path, path.read_bytes().index(mine.numpy().tobytes()) + 999, 4)
    with pytest.raises(DigestMismatch, match=r"mp_rank_00_model_states\.pt: its record"):
        ucp.convert(source, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()
    with ucp.open(source) as checkpoint, pytest.raises(DigestMismatch):
        _ = checkpoint.training_state
