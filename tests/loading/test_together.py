"""What ranks verify together: they read less, and damage in anybody's part is found by all before anything changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ucp
from tests.loading import together_jobs as jobs
from ucp.loading.strategy import HOLD, VERIFY_THEN_READ, VERIFY_WHILE_BRINGING
from ucp.storage.digests import CHUNK

if TYPE_CHECKING:
    from tests.engines.pool import RankPool

WAYS = (HOLD, VERIFY_THEN_READ, VERIFY_WHILE_BRINGING)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together") / "saved"
    ucp.save({"model": jobs.values()}, folder)
    return folder


@pytest.mark.slow(seconds=6)
def test_chunks_across_the_cuts_are_read_once(ranks: RankPool, saved: Path) -> None:
    """Each rank alone would read up to two chunks more for each tensor."""
    for world in (2, 3):
        for way in WAYS:
            for fine, wanted, read, verified in ranks.run(jobs.load, str(saved), way, world_size=world):
                assert fine
                assert wanted <= read < 1.4 * wanted
                assert verified >= wanted


@pytest.mark.slow(seconds=6)
def test_damage_in_anybodys_part_is_found_by_all(ranks: RankPool, saved: Path, tmp_path: Path) -> None:
    [file] = saved.glob("*.safetensors")
    for chunk in range(file.stat().st_size // CHUNK):
        folder = tmp_path / str(chunk)
        shutil.copytree(saved, folder)
        data = bytearray((folder / file.name).read_bytes())
        at = chunk * CHUNK + chunk * 123_457 % CHUNK + 5_000
        data[at] ^= 1
        (folder / file.name).write_bytes(data)
        way = WAYS[chunk % len(WAYS)]
        for kind, text, same in ranks.run(jobs.refused, str(folder), way, world_size=2 + chunk % 2):
            assert kind == ("PartlyLoaded" if way == VERIFY_WHILE_BRINGING else "DigestMismatch"), (at, way, text)
            assert same or way == VERIFY_WHILE_BRINGING
            assert f"chunk {chunk} " in text
