"""A bit flipped at any place of any file: `ucp verify` names it, and a load refuses it and changes nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import ucp
from tests.engines.truth import same
from tests.formats import raw
from tests.formats.dcp import states
from ucp.errors import DamagedCheckpoint
from ucp.inspection.verify import verify

FLIPS = 8  # at random places of every file, beside its first and its last byte


@pytest.mark.parametrize("form", ["fragmented", "consolidated"])
def test_every_bit_of_every_file_counts(tmp_path: Path, form: str) -> None:
    truth = states.nested()
    folder = tmp_path / "fragmented"
    ucp.save(truth, folder)
    if form == "consolidated":
        ucp.convert(folder, tmp_path / form)
        folder = tmp_path / form
    assert verify(folder).whole
    before = states.blank(truth)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) >= (2 if form == "fragmented" else 7)
    randomly = random.Random(7)
    for path in files:
        size = path.stat().st_size
        for at in (0, size - 1, *(randomly.randrange(size) for _ in range(FLIPS))):
            where = f"{path.name}, byte {at}"
            mask = 1 << randomly.randrange(8)
            raw.flip(path, at, mask)
            assert not verify(folder).whole, where
            loaded = states.blank(truth)
            if path.name.endswith(".index.json"):
                # For transformers alone: what a load brings does not depend on it.
                ucp.load(loaded, folder)
                assert same(loaded, truth), where
            else:
                with pytest.raises(DamagedCheckpoint):
                    ucp.load(loaded, folder)
                assert same(loaded, before), where
            raw.flip(path, at, mask)
    assert verify(folder).whole
    loaded = states.blank(truth)
    ucp.load(loaded, folder)
    assert same(loaded, truth)
