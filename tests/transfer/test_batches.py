"""Windows that share chunks of the source are filled together: each chunk is read about once, and no byte differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ucp
from tests.formats import raw
from tests.formats.deepspeed.write.test_native import ADAMW
from tests.slow_cases import slow_but
from tests.transfer.test_write import LEAST
from ucp.catalog import ParamGroup, TrainingState
from ucp.geometry import box
from ucp.storage.digests import CHUNK
from ucp.transfer.batches import batches
from ucp.transfer.gather import Want
from ucp.transfer.targets import TargetFile

SHAPES = {f"w{k}": (512, 1024) for k in range(6)} | {"bias": (7,)}
RANKS = 16


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A consolidated checkpoint, of which a rank of 16 has 128 KiB of each tensor."""
    state = TrainingState((ParamGroup(tuple(SHAPES), {"lr": 0.1}),), global_steps=7, config=ADAMW)
    made = raw.make(tmp_path / "raw", shapes=SHAPES, states=("param", "exp_avg"), dp=2, training_state=state)
    return raw.write_consolidated(tmp_path / "universal", made.catalog)


@pytest.mark.parametrize("memory", slow_but([LEAST], [None, LEAST + 4 * CHUNK, LEAST]))
def test_short_pieces_for_many_files(source: Path, tmp_path: Path, memory: int | None) -> None:
    """To ZeRO-3 on 16 ranks, and back, in all memory."""
    nbytes = sum(path.stat().st_size for path in source.iterdir())
    options: dict[str, Any] = {"to": "deepspeed", "layout": f"dp={RANKS},zero=3"}
    there = ucp.convert(source, tmp_path / "there", max_memory=memory, workers=2 if memory is None else 1, **options)
    if memory is None:
        assert there.bytes_read < 1.6 * nbytes
    ucp.convert(tmp_path / "there", tmp_path / "back")
    for path in source.glob("*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_short_pieces_from_many_files(source: Path, tmp_path: Path) -> None:
    """A virtual checkpoint with digests of 16 ranks' files, put together."""
    ucp.convert(source, tmp_path / "there", to="deepspeed", layout=f"dp={RANKS},zero=3")
    ucp.convert(tmp_path / "there", tmp_path / "virtual", virtual=True, digests=True)
    report = ucp.convert(tmp_path / "virtual", tmp_path / "back")
    assert report.bytes_read < 2 * sum(path.stat().st_size for path in source.iterdir())
    for path in source.glob("*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("verified", [False, True])
def test_every_window_is_in_one_batch(tmp_path: Path, verified: bool) -> None:
    made = raw.make(tmp_path / "raw", shapes={"w": (3000, 1000), "v": (40, 1000)}, states=("param",), dp=3)
    w, v = (made.catalog.tensors[name, "param"] for name in ("w", "v"))
    parts = [(w, box([k * 1000, 0], [1000, 1000]), 4_000_000) for k in range(3)]
    parts += [(v, box([0, 0], [0, 1000]), 0), (v, box([0, 0], [40, 1000]), 160_000)]
    files = [TargetFile(str(k), size, (), (Want(t, blocks, "float32"),)) for k, (t, blocks, size) in enumerate(parts)]
    share = [(0, 4_000_000), (2 * CHUNK, 4_000_000), (0, 4_000_000), (0, 0), (0, 160_000)]
    seen: list[list[tuple[int, int]]] = [[] for _ in files]
    for batch in batches(files, share, 2 * CHUNK, 4 * CHUNK, verified):
        assert len(batch) == 1 or (verified and len(batch) <= 4)
        for part in batch:
            seen[part.file].append((part.start, part.start + part.size))
    for windows, (first, last) in zip(seen, share, strict=True):
        edges = [edge for window in sorted(windows) for edge in window]
        assert edges[::2] == [first, *edges[1:-1:2]][: len(windows)]
        assert (edges[-1] if edges else first) == last
