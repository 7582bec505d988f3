"""CRCs that a file stores of its own data, computed window by window while they are written."""

from __future__ import annotations

import random
import struct
import zipfile
import zlib
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.formats.raw import make, write_files
from ucp import limits
from ucp.geometry import whole
from ucp.storage.crc32 import Crc32Entry, PassingEntries
from ucp.storage.digests import CHUNK, digest_file
from ucp.storage.files import Files
from ucp.storage.torch_pt.pickler import Placeholder
from ucp.storage.torch_pt.writer import plan_torch_file
from ucp.transfer.gather import Want
from ucp.transfer.reader import Reader
from ucp.transfer.targets import TargetFile


def test_records_longer_than_a_window(tmp_path: Path) -> None:
    """Windows of one chunk; records that end in the middle of one, several in one, one over several, one of nothing."""
    shapes = {"long": (3 * CHUNK // 4 + 12345,), "short": (7,), "none": (0,), "middle": (CHUNK // 4, 1), "last": (5, 5)}
    raw = make(tmp_path / "source", dp=3, shapes=shapes, states=("param",))
    placeholders = {name: Placeholder(shape, "float32") for name, shape in shapes.items()}
    planned = plan_torch_file({"known": b"bytes", **placeholders})
    wants = tuple(
        Want(raw.catalog.tensors[name, "param"], whole(shape), "float32", planned.offsets[placeholders[name]])
        for name, shape in shapes.items()
    )
    file = TargetFile("a/b.pt", planned.size, planned.literals, wants, planned.crc32_entries)
    (tmp_path / "out").mkdir()
    with Files() as files:
        found = write_files(
            Reader(raw.catalog, files),
            tmp_path / "out",
            [file],
            max_memory=limits.SCRATCH_BYTES + 6 * CHUNK,
            threads=3,
        )
    path = tmp_path / "out" / "a" / "b.pt"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        data = path.read_bytes()
        for info in archive.infolist():
            # Readers that go from record to record find it, too: in the header, or behind the bytes.
            name, extra = struct.unpack_from("<2H", data, info.header_offset + 26)
            end = info.header_offset + 30 + name + extra + info.file_size
            at = end + 4 if info.flag_bits & 8 else info.header_offset + 14
            assert data[at : at + 4] == info.CRC.to_bytes(4, "little")
            assert zlib.crc32(archive.read(info)) == info.CRC
    loaded = torch.load(path, weights_only=True)
    for name in shapes:
        np.testing.assert_array_equal(loaded[name].numpy(), raw.truth[name, "param"])
    # Digests are of the file as it is in the end.
    assert found == {"a/b.pt": digest_file(path)}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.lists(st.integers(1, 7), min_size=1))
def test_crcs_are_stored_while_the_bytes_pass(sizes: list[int], steps: list[int]) -> None:
    """Whatever pieces the file passes in, even such as end within a CRC."""
    entries, at = [], 0
    for size in sizes:
        entries.append(Crc32Entry(at + 1, size, (at + 1 + size,)))
        at += size + 7
    entries = [replace(e, positions=(*e.positions, at + 4 * k)) for k, e in enumerate(entries)]
    raw = bytearray(random.Random(0).randbytes(at + 4 * len(entries) + 2))
    wanted = bytearray(raw)
    for entry in entries:
        for position in entry.positions:
            wanted[position : position + 4] = zlib.crc32(raw[entry.offset : entry.end]).to_bytes(4, "little")
    passing = PassingEntries(entries)
    start = 0
    for step in cycle(steps):
        passing.store(start, memoryview(raw)[start : start + step])
        start += step
        if start >= len(raw):
            break
    assert raw == wanted


def test_a_crc_ahead_of_its_bytes_is_a_fault_of_the_plan() -> None:
    with pytest.raises(ValueError, match="ahead of the bytes"):
        PassingEntries([Crc32Entry(10, 5, (4,))])
