"""CRC-32s of a source whose records several processes, or several attempts, read in part."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import ucp
from tests.formats import raw
from tests.test_conversion_crc32 import storages
from tests.test_conversion_resume import SHAPES, interrupted
from ucp.errors import DigestMismatch, UcpError
from ucp.transfer.team import Team

TEAM = 3


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of DeepSpeed's form: each record has parts of all parameters, in an order of its own."""
    folder = tmp_path_factory.mktemp("native")
    made = raw.make(folder / "raw", shapes=SHAPES, states=("param", "exp_avg"), dp=3)
    source = raw.virtual_checkpoint(folder / "source", made)
    config = {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}
    ucp.convert(source, folder / "native", to="deepspeed", layout="dp=2,zero=1", ds_config=config)
    return folder / "native"


@pytest.fixture
def source(native: Path, tmp_path: Path) -> Path:
    shutil.copytree(native, tmp_path / "native")
    return tmp_path / "native"


def flip(path: Path, at: int) -> None:
    """One bit, the file's times as they were."""
    before = path.stat()
    raw.flip(path, at, 16)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def by_a_team(source: Path, dest: Path) -> list[ucp.ConversionReport]:
    """As processes would, in threads."""
    with ThreadPoolExecutor(TEAM) as pool:

        def one(process: int) -> ucp.ConversionReport:
            return ucp.convert(source, dest, team=Team(process, TEAM, join=20.0, lost=5.0, beat=0.05), workers=1)

        return list(pool.map(one, range(TEAM)))


def test_a_team_reads_every_byte_once(source: Path, tmp_path: Path) -> None:
    alone = ucp.convert(source, tmp_path / "alone")
    reports = by_a_team(source, tmp_path / "team")
    assert raw.tree(tmp_path / "team") == raw.tree(tmp_path / "alone")
    # The leader knows of all records by what the others have noted, and has read next to nothing for that.
    assert (reports[0].verified_bytes, reports[0].unverified_bytes) == (alone.verified_bytes, 0)
    assert sum(report.bytes_read for report in reports) < 1.2 * alone.bytes_read


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_team_refuses_a_flipped_bit(source: Path, tmp_path: Path, part: float) -> None:
    path = next((source).glob("*/*zero_pp_rank_1_*optim_states.pt"))
    place = max(storages(path).values(), key=len)
    flip(path, place[int(part * len(place))])
    with pytest.raises(UcpError, match="CRC-32 should be"):
        by_a_team(source, tmp_path / "team")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["native"]


def test_a_continued_conversion_knows_what_was_read(source: Path, tmp_path: Path) -> None:
    whole = ucp.convert(source, tmp_path / "whole")
    interrupted(source, tmp_path / "dest")
    report = ucp.convert(source, tmp_path / "dest")
    assert report.bytes_read < 0.6 * whole.bytes_read
    assert (report.verified_bytes, report.unverified_bytes) == (whole.verified_bytes, 0)
    assert raw.tree(tmp_path / "dest") == raw.tree(tmp_path / "whole")


def test_a_continued_conversion_refuses_a_bit_flipped_before_it_began(source: Path, tmp_path: Path) -> None:
    """Its half was written from damaged bytes, and the source mended with its times kept: nothing of it is taken."""
    path = next((source).glob("*/*zero_pp_rank_0_*optim_states.pt"))
    at = max(storages(path).values(), key=len)[100]
    ucp.convert(source, tmp_path / "whole")
    flip(path, at)
    interrupted(source, tmp_path / "dest")
    flip(path, at)
    with pytest.raises(DigestMismatch, match="CRC-32 should be"):
        ucp.convert(source, tmp_path / "dest")
    assert not list(tmp_path.glob(".ucp*"))
    ucp.convert(source, tmp_path / "dest")
    assert raw.tree(tmp_path / "dest") == raw.tree(tmp_path / "whole")
