"""CRCs that a file stores of its own data, computed window by window while they are written."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from tests.formats.raw import make
from ucp.geometry import whole
from ucp.storage.digests import CHUNK, digest_file
from ucp.storage.files import Files
from ucp.storage.torchwriter import Placeholder, plan_torch_file
from ucp.transfer.gather import SCRATCH, Reader, Want
from ucp.transfer.targets import TargetFile
from ucp.transfer.write import write_files


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
            max_memory=SCRATCH + 6 * CHUNK,
            threads=3,
        )
    path = tmp_path / "out" / "a" / "b.pt"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            # The local header has it too, for readers that start there.
            data = path.read_bytes()
            assert data[info.header_offset + 14 : info.header_offset + 18] == info.CRC.to_bytes(4, "little")
            assert zlib.crc32(archive.read(info)) == info.CRC
    loaded = torch.load(path, weights_only=True)
    for name in shapes:
        np.testing.assert_array_equal(loaded[name].numpy(), raw.truth[name, "param"])
    # Digests are of the file as it is in the end.
    assert found == {"a/b.pt": digest_file(path)}
