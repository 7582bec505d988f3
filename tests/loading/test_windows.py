"""Windows of host memory on the way to a device. The host stands for the device here; `test_phases.py` has a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ucp
from ucp import limits
from ucp.errors import DigestMismatch
from ucp.geometry import box, whole
from ucp.job.stopwatch import Stopwatch
from ucp.loading.windows import Place, through_windows, window_bytes
from ucp.storage.files import Files
from ucp.transfer.copies import Copy, CopyTable
from ucp.transfer.gather import Want, plan
from ucp.transfer.reader import Reader

SHAPES = [(1200, 1000), (3, 5, 7), (2_000_003,), (1,), (17, 150_000), *[(100 + k,) for k in range(40)]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    path = tmp_path_factory.mktemp("windows") / "ck"
    ucp.save({f"w{k:02}": value for k, value in enumerate(values)}, path)
    return path, values


def copies_of(path: Path) -> tuple[Reader, list[list[Copy]]]:
    catalog = ucp.open(path).catalog
    tensors = [catalog.tensors[f"w{k:02}", "param"] for k in range(len(SHAPES))]
    wants = [Want(tensor, whole(tensor.shape).in_buffer(k), "float32") for k, tensor in enumerate(tensors)]
    by_buffer: list[list[Copy]] = [[] for _ in wants]
    for copy in plan(wants):
        by_buffer[copy.buffer].append(copy)
    return Reader(catalog, Files()), by_buffer


def places(lives: Sequence[torch.Tensor], copies: Sequence[Sequence[Copy]], keeps: bool = False) -> list[Place]:
    numbered = enumerate(zip(lives, copies, strict=True))
    return [Place(k, live.view(-1).view(torch.uint8), keeps, own) for k, (live, own) in numbered]


def blank() -> list[torch.Tensor]:
    return [torch.full(shape, 7.0) for shape in SHAPES]


@pytest.mark.parametrize("window", [40_000, limits.LOAD_WINDOW_BYTES])
@pytest.mark.parametrize("threads", [1, 5])
def test_every_place_is_filled(
    saved: tuple[Path, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch, window: int, threads: int
) -> None:
    path, values = saved
    monkeypatch.setattr(limits, "LOAD_WINDOW_BYTES", window)
    reader, copies = copies_of(path)
    lives = blank()
    through_windows(reader, places(lives, copies), threads, limits.LOAD_MEMORY_BYTES, Stopwatch())
    assert all(torch.equal(live, value) for live, value in zip(lives, values, strict=True))


@pytest.mark.parametrize("window", [4_000, 40_000, limits.LOAD_WINDOW_BYTES])
def test_columns_and_wider_elements_are_cut_at_windows(
    saved: tuple[Path, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(limits, "LOAD_WINDOW_BYTES", window)
    path, values = saved
    catalog = ucp.open(path).catalog
    columns, wider, plain = box((0, 300), (1200, 450)), whole((17, 150_000)), whole((2_000_003,))
    wants = [
        Want(catalog.tensors["w00", "param"], columns.in_buffer(0), "float32"),
        Want(catalog.tensors["w04", "param"], wider.in_buffer(1), "float64"),
        Want(catalog.tensors["w02", "param"], plain.in_buffer(2), "float32"),
    ]
    table = plan(wants)
    wanted = [values[0][:, 300:750].contiguous(), values[4].double(), values[2]]
    lives = [torch.full_like(value, 7.0) for value in wanted]
    own = [[copy for copy in table if copy.buffer == k] for k in range(3)]
    reader = Reader(catalog, Files())
    through_windows(reader, places(lives, own), 3, limits.LOAD_MEMORY_BYTES, Stopwatch())
    assert all(torch.equal(live, value) for live, value in zip(lives, wanted, strict=True))


def test_nothing_is_worked_out_window_by_window(
    saved: tuple[Path, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What copies have in common is asked of all together: threads that fill windows would wait for one another."""
    asked: list[str] = []

    def counted(name: str) -> property:
        own = getattr(CopyTable, name)

        def get(table: CopyTable) -> object:
            asked.append(name)
            return own.fget(table)

        return property(get)

    for name in ("nbytes", "is_plain", "extents", "target_nbytes"):
        monkeypatch.setattr(CopyTable, name, counted(name))
    reader, copies = copies_of(saved[0])
    counts = []
    for window in (4 << 20, 100_000):
        monkeypatch.setattr(limits, "LOAD_WINDOW_BYTES", window)
        asked.clear()
        through_windows(reader, places(blank(), copies), 2, limits.LOAD_MEMORY_BYTES, Stopwatch())
        counts.append(len(asked))
    assert 0 < counts[0] == counts[1] < 10


@pytest.mark.parametrize("keeps", [True, False])
def test_what_nothing_fills_is_kept_or_cleared(saved: tuple[Path, list[torch.Tensor]], keeps: bool) -> None:
    path, values = saved
    reader, copies = copies_of(path)
    copies[2], copies[7] = [], []
    lives = blank()
    through_windows(reader, places(lives, copies, keeps), 3, limits.LOAD_MEMORY_BYTES, Stopwatch())
    for k, (live, value) in enumerate(zip(lives, values, strict=True)):
        wanted = torch.full_like(value, 7.0 if keeps else 0.0) if k in (2, 7) else value
        assert torch.equal(live, wanted)


def test_each_chunk_of_a_large_tensor_is_read_once(
    saved: tuple[Path, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows end where the file's chunks end, wherever in the file the tensor begins."""
    monkeypatch.setattr(limits, "LOAD_WINDOW_BYTES", 2 << 20)
    reader, copies = copies_of(saved[0])
    lives, large = blank(), 4
    assert copies[large][0].at % (1 << 20)  # otherwise this shows nothing
    through_windows(reader, places(lives, copies)[large : large + 1], 1, limits.LOAD_MEMORY_BYTES, Stopwatch())
    assert lives[large].nbytes <= reader.verified_bytes <= lives[large].nbytes + (2 << 20)


@pytest.mark.parametrize("threads", [1, 4])
def test_damage_ends_every_thread(
    saved: tuple[Path, list[torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(limits, "LOAD_WINDOW_BYTES", 1 << 20)
    path = tmp_path / "ck"
    ucp.save({f"w{k:02}": value for k, value in enumerate(saved[1])}, path)
    reader, copies = copies_of(path)
    with open(max(path.glob("*.safetensors"), key=lambda file: file.stat().st_size), "r+b") as file:
        file.seek(9_000_000)
        byte = file.read(1)[0]
        file.seek(9_000_000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DigestMismatch, match="damaged"):
        through_windows(reader, places(blank(), copies), threads, limits.LOAD_MEMORY_BYTES, Stopwatch())


def test_a_device_that_refuses_ends_every_thread(
    saved: tuple[Path, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LOAD_WINDOW_BYTES", 1 << 20)
    reader, copies = copies_of(saved[0])
    whole_places = places(blank(), copies)
    # torch does not write to a tensor whose elements share their memory.
    refusing = torch.zeros(1, dtype=torch.uint8).expand(len(whole_places[4].live))
    whole_places[4] = replace(whole_places[4], live=refusing)
    with pytest.raises(RuntimeError, match="single memory location"):
        through_windows(reader, whole_places, 4, limits.LOAD_MEMORY_BYTES, Stopwatch())


@pytest.mark.parametrize(("memory", "threads", "mib"), [(64, 2, 3), (256, 9, 7), (512, 16, 15), (4096, 16, 15)])
def test_windows_take_at_most_half_of_the_memory(memory, threads, mib):
    found = window_bytes(memory << 20, threads)
    assert found == mib << 20
    count = min(threads, limits.LOAD_FILLING_THREADS_COUNT) + limits.LOAD_WINDOWS_AHEAD_COUNT
    assert count * (found + (1 << 20)) <= memory << 19
