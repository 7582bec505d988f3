"""The archive's CRC-32s and its file's name, against files that torch itself wrote."""

from __future__ import annotations

import random
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from tests.formats import raw
from ucp.errors import DamagedCheckpoint, DigestMismatch
from ucp.storage import crc32
from ucp.storage.torch_pt.reader import load, load_file
from ucp.storage.torch_pt.writer import stem_of

STATE = {"a": torch.arange(100.0), "none": torch.empty(0), "text": "x" * 300, "n": [1, 2, 3]}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "some.thing_states.pt"
    torch.save(STATE, path)
    return path


def place(path: Path, name: str) -> tuple[int, int]:
    """A record's bytes, by Python's zipfile and the header that it points at."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{path.name.removesuffix('.pt')}/{name}")
    header = path.read_bytes()[info.header_offset :]
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return start, start + info.file_size


def test_every_bit_of_the_pickle_counts(saved: Path) -> None:
    start, stop = place(saved, "data.pkl")
    for at in range(start, stop):
        raw.flip(saved, at, 1 << at % 8)
        with pytest.raises(DigestMismatch, match=r"record 'data\.pkl'.*CRC-32"):
            load(saved)
        raw.flip(saved, at, 1 << at % 8)
    assert load(saved)["text"] == STATE["text"]


@pytest.mark.parametrize("name", ["byteorder", ".format_version", ".storage_alignment", "version"])
def test_every_bit_of_the_small_records_counts(saved: Path, name: str) -> None:
    if name.startswith(".") and not any(n.endswith(f"/{name}") for n in zipfile.ZipFile(saved).namelist()):
        pytest.skip(f"torch {torch.__version__} writes no {name}")
    for at in range(*place(saved, name)):
        raw.flip(saved, at, 1)
        with pytest.raises(DigestMismatch, match=f"record '{name}'"):
            load(saved)
        raw.flip(saved, at, 1)


def test_a_header_that_points_elsewhere_is_damage(saved: Path) -> None:
    """No CRC covers the lengths in a record's header, and they say where its data begin."""
    start, _ = place(saved, "data/0")
    header = saved.read_bytes().rindex(b"PK\3\4", 0, start)
    for at in range(header + 26, header + 30):
        for bit in range(8):
            raw.flip(saved, at, 1 << bit)
            with pytest.raises(DamagedCheckpoint, match="header of zip entry 'data/0' is damaged"):
                load(saved)
            raw.flip(saved, at, 1 << bit)


def test_storages_know_their_crcs_and_where_they_stand(saved: Path) -> None:
    record = load(saved)["a"].record
    assert record is not None
    data = saved.read_bytes()
    assert (record.start, record.stop) == place(saved, "data/0")
    assert record.crc == zlib.crc32(data[record.start : record.stop])
    assert int.from_bytes(data[record.at : record.at + 4], "little") == record.crc


def test_a_file_without_crcs_says_so(tmp_path: Path) -> None:
    path = tmp_path / "none.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, path)
    finally:
        torch.serialization.set_crc32_options(True)
    file = load_file(path)
    assert not file.has_crcs
    assert file.graph["a"].record is None
    torch.save(STATE, path)
    assert load_file(path).has_crcs


@pytest.mark.parametrize(
    "name", ["plain.pt", "two.dots.pt", "noextension", "mp_rank_00_model_states.pt", "spa ce.pt", "\u00fcn\u00ef.pt"]
)
def test_the_stem_is_torchs(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save(STATE, path)
    assert load_file(path).stem == stem_of(name)
    assert load_file(path).stem == zipfile.ZipFile(path).namelist()[0].partition("/")[0]


def test_a_stream_has_no_name_and_the_older_format_none(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with open(path, "wb") as stream:
        torch.save(STATE, stream)
    assert load_file(path).stem == "archive"
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    assert (load_file(path).stem, load_file(path).has_crcs) == (None, False)


def test_the_faster_crc_is_zlibs() -> None:
    randomly = random.Random(1)
    for size in (0, 1, 7, 64, 1000, 70_001):
        data = randomly.randbytes(size)
        assert crc32.crc32(data) == zlib.crc32(data)
        assert crc32.crc32(data, 12345) == zlib.crc32(data, 12345)
