"""Records that DCP writes otherwise than `torch.save` does: compressed by zstd, and in safetensors' format."""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import zstandard
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.metadata import MetadataIndex

import ucp
from tests.engines.truth import same
from tests.formats.dcp import states
from tests.formats.dcp.test_read import data_file, rewrite
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.inspection.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def compressed(folder: Path, state: Any) -> Path:
    """A checkpoint whose records torch's own extension compresses, which it calls experimental."""
    dcp.save(state, storage_writer=FileSystemWriter(folder, _extensions=[ZStandard()]))
    return folder


def test_compressed_records_are_read(tmp_path: Path) -> None:
    """Of every type, by a load, by a region, as values of steps, and through conversions."""
    state = {**states.nested(), "types": states.types(), "more": [torch.arange(3), "a"]}
    path = compressed(tmp_path / "zstd", state)
    loaded = states.blank(state)
    assert ucp.load(loaded, path).unused == ()
    assert same(loaded, state)
    with ucp.open(path) as opened:
        assert opened.parameters["up.weight"].scalars["step"] == 3
        weight = opened.read("up.weight")
        assert torch.equal(opened.read("up.weight", region=(slice(2, 5), slice(1, 3))), weight[2:5, 1:3])
    ucp.convert(path, tmp_path / "out", "dcp")
    with ucp.open(tmp_path / "out") as opened:
        assert torch.equal(opened.read("up.weight"), weight)
    with pytest.raises(Unsupported, match="is computed as it is read, which lies in no file"):
        ucp.convert(path, tmp_path / "virtual", virtual=True)


def _other_record(path: Path, raw: bytes) -> None:
    """Put these bytes in the place of the only tensor's record."""

    def change(meta: Any) -> None:
        for index, info in meta.storage_data.items():
            if index.fqn == "w":
                info.offset, info.length = data_file(path).stat().st_size, len(raw)

    with data_file(path).open("ab") as stream:
        rewrite(change)(path)
        stream.write(raw)


def test_compressed_records_that_are_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compressed(tmp_path / "zstd", {"w": torch.arange(900.0), "v": torch.arange(900.0).flip(0), "step": 3})
    raw = data_file(path).read_bytes()
    bomb = zstandard.compress(bytes(1 << 28))
    assert len(bomb) < 1 << 16
    cases = {
        "bomb": (bomb, "decompress to more than 1052176, which is the most"),
        "junk": (b"junk" * 9, "what zstd has compressed there is damaged"),
        "cut": (
            zstandard.compress(b"PK\3\4" + bytes(2000))[:-9],
            "truncated or damaged|what zstd has compressed there is damaged",
        ),
        "other": (zstandard.compress(b"no archive"), "#.*the file is truncated or damaged"),
    }
    for name, (record, says) in cases.items():
        shutil.copytree(path, tmp_path / name)
        _other_record(tmp_path / name, record)
        with pytest.raises(DamagedCheckpoint, match=says):
            ucp.open(tmp_path / name)
    shutil.copytree(path, tmp_path / "short")
    os.truncate(data_file(tmp_path / "short"), len(raw) - 9)
    with pytest.raises(DamagedCheckpoint, match="the file is truncated"):
        ucp.open(tmp_path / "short")
    for package in ("compression.zstd", "zstandard", "pyzstd"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Unsupported, match=r"no package that reads that is installed; pip install zstandard"):
        ucp.open(path)


def test_a_flipped_bit_in_a_compressed_record(tmp_path: Path) -> None:
    """zstd has no sum of its own here; torch's archive inside has one."""
    path = compressed(tmp_path / "zstd", {"w": torch.arange(900.0)})
    plain = io.BytesIO()
    torch.save(torch.arange(900.0), plain)
    raw = bytearray(plain.getvalue())
    raw[raw.index(torch.arange(900.0).numpy().tobytes()) + 5] ^= 1
    _other_record(path, zstandard.compress(bytes(raw)))
    with ucp.open(path) as opened, pytest.raises(DamagedCheckpoint, match="are not those of its CRC-32"):
        opened.read("w")


def test_safetensors_in_dcp(tmp_path: Path) -> None:
    """The metadata has no place of a tensor of its own, only where a file's part in safetensors begins."""
    state = states.nested()
    form = SerializationFormat.SAFETENSORS
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path / "form", serialization_format=form))
    loaded = states.blank(state)
    assert ucp.load(loaded, tmp_path / "form").unused == ()
    assert same(loaded, state)
    # Objects are archives with CRC-32s in front, which say nothing of the tensors.
    assert [f.text for f in verify(tmp_path / "form").findings if "flipped bits can't be seen" in f.text]
    for at, says in ((40, "not a safetensors file, or truncated|is not valid|should be"), (-3, "truncated")):
        shutil.copytree(tmp_path / "form", tmp_path / f"cut{at}")
        file = data_file(tmp_path / f"cut{at}")
        begin = file.read_bytes().index(b'{"__metadata__"')
        os.truncate(file, begin + at if at > 0 else file.stat().st_size + at)
        with pytest.raises(DamagedCheckpoint, match=says):
            ucp.open(tmp_path / f"cut{at}")

    def elsewhere(meta: Any) -> None:
        chunk = meta.state_dict_metadata["model.up.weight"].chunks[0]
        old = chunk.offsets
        chunk.offsets = torch.Size([1, 0])
        info = meta.storage_data.pop(MetadataIndex("model.up.weight", old, 0))
        meta.storage_data[MetadataIndex("model.up.weight", chunk.offsets, 0)] = info

    rewrite(elsewhere)(tmp_path / "form")
    with pytest.raises(DamagedCheckpoint, match="torch's writer keeps one part of each tensor in a file of this kind"):
        ucp.open(tmp_path / "form")
