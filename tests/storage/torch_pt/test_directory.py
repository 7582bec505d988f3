"""The quick way to read an archive's directory: it finds what ``zipfile`` finds, or leaves the archive to it."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ucp.storage.torch_pt.directory import ZipEntry, as_torch_writes, by_zipfile, entries


def saved(**more: Any) -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.arange(12.0), "none": torch.zeros(0), **more}, stream)
    return stream.getvalue()


def reading(raw: bytes) -> Any:
    return lambda at, count: raw[at : at + count] if at >= 0 else b""


def by(way: str, raw: bytes) -> tuple[list[ZipEntry], int] | None:
    if way == "quick":
        return as_torch_writes(reading(raw), len(raw))
    return by_zipfile(io.BytesIO(raw), reading(raw), len(raw))


def test_both_ways_find_the_same() -> None:
    raw = saved()
    found = by("quick", raw)
    assert found is not None
    assert found == by("zipfile", raw) == entries(io.BytesIO(raw), reading(raw), len(raw))
    for entry in found[0]:
        assert raw[entry.at : entry.at + 4] == b"PK\x03\x04"
        assert struct.unpack_from("<I", raw, entry.crc_at) == (entry.crc,)


def test_a_bit_that_flips_is_seen_by_zipfile_or_by_both() -> None:
    """Every bit of the directory and of what follows it: nothing is accepted that ``zipfile`` reads otherwise."""
    whole = saved()
    found = by("quick", whole)
    assert found is not None
    accepted = 0
    for at in range(found[1], len(whole)):
        for bit in range(8):
            raw = bytearray(whole)
            raw[at] ^= 1 << bit
            quick = by("quick", bytes(raw))
            if quick is not None:
                accepted += 1
                assert quick == by("zipfile", bytes(raw)), (at, bit)
    assert accepted  # of dates, CRCs, sizes: whoever reads the record compares those


@pytest.mark.parametrize("kind", ["a comment", "bytes before", "a name that is not ASCII", "extra bytes", "cut off"])
def test_other_archives_are_left_to_zipfile(tmp_path: Path, kind: str) -> None:
    raw = saved()
    if kind == "bytes before":
        raw = b"#!/bin/sh\n" + raw
    elif kind == "cut off":
        raw = raw[:-1]
    else:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            info = zipfile.ZipInfo("ä/data.pkl" if kind == "a name that is not ASCII" else "a/data.pkl")
            info.extra = b"\x07\x00\x01\x00x" if kind == "extra bytes" else b""
            archive.writestr(info, b"x")
            archive.comment = b"hello" if kind == "a comment" else b""
        raw = (tmp_path / "a.zip").read_bytes()
    assert by("quick", raw) is None
    if kind == "cut off":
        with pytest.raises(zipfile.BadZipFile):
            entries(io.BytesIO(raw), reading(raw), len(raw))
    else:
        names = [entry.name for entry in entries(io.BytesIO(raw), reading(raw), len(raw))[0]]
        assert any(name.endswith("data.pkl") for name in names)
