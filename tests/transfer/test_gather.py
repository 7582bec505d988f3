"""Gathering from real files: every byte is compared with what plain numpy indexing puts there."""

from __future__ import annotations

import itertools
import threading
import tracemalloc
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests import property as p
from ucp import limits
from ucp.catalog import Catalog, LogicalTensor, SourceFile, TrainingState
from ucp.errors import DamagedCheckpoint, DigestMismatch, Mismatch
from ucp.geometry import Blocks, box, concat, empty, flat_ranges, intersect, numel, region, whole
from ucp.parallel.mesh import Layout
from ucp.parallel.zero import ceil_partition, flat_partition
from ucp.storage.digests import CHUNK, digest_file
from ucp.storage.files import Files
from ucp.transfer import gather as room
from ucp.transfer.gather import Want, gather, plan, widen
from ucp.transfer.reader import Reader

DTYPES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "bool": 1, "int64": 8, "uint8": 1, "complex128": 16}
_KEYS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray:
    """Random elements: any bits at all (not-a-numbers too), 0 and 1 for bool."""
    width = DTYPES[dtype]
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(np.uint8)
    return rng.integers(0, 256, (*shape, width), np.uint8).view(_KEYS[width]).reshape(shape)


def write_tensor(
    rng: np.random.Generator, folder: Path, name: str, blocks: Blocks, lengths: Sequence[int], bits: NDArray, dtype: str
) -> tuple[LogicalTensor, list[SourceFile]]:
    """One file per buffer, its elements from a random byte on; what no block covers is noise."""
    width = DTYPES[dtype]
    at = rng.integers(0, 64, len(lengths))
    sources = []
    raw = bits.reshape(-1).view(np.uint8).reshape(-1, width) if bits.size else np.zeros((0, width), np.uint8)
    contents = [rng.integers(0, 256, int(at[f]) + n * width + 7, np.uint8) for f, n in enumerate(lengths)]
    for i, (elements, where) in enumerate(p.held(blocks, bits.shape)):
        f = int(blocks.buffers[i])
        contents[f][at[f] + where[:, None] * width + np.arange(width)] = raw[elements]
    for f, content in enumerate(contents):
        path = folder / f"{name}-{f}.bin"
        path.write_bytes(content.tobytes())
        sources.append(SourceFile(str(path), len(content), path.stat().st_mtime_ns))
    tensor = LogicalTensor(name, "param", bits.shape, dtype, blocks, at[blocks.buffers].astype(np.int64))
    return tensor, sources


def catalog(sources: Sequence[SourceFile], tensors: Sequence[LogicalTensor], digests: bool = False) -> Catalog:
    return Catalog(
        format="raw",
        writer="numpy",
        layout=Layout(),
        files=tuple(sources),
        parameters={},
        tensors={(t.name, t.state): t for t in tensors},
        training_state=TrainingState(),
        chunk_digests={i: digest_file(f.path) for i, f in enumerate(sources)} if digests else {},
    )


def expected(blocks: Blocks, base: int, bits: NDArray, buffers: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Copies of the buffers with the wanted elements put in by index arithmetic."""
    out = [b.copy() for b in buffers]
    width = bits.dtype.itemsize
    raw = bits.reshape(-1).view(np.uint8).reshape(-1, width)
    for i, (elements, where) in enumerate(p.held(blocks, bits.shape)):
        out[int(blocks.buffers[i])][base + where[:, None] * width + np.arange(width)] = raw[elements]
    return out


def simple(tmp_path: Path, bits: NDArray, dtype: str, digests: bool = False) -> tuple[Catalog, LogicalTensor]:
    """One file that is the dense tensor and nothing else."""
    path = tmp_path / "dense.bin"
    path.write_bytes(bits.tobytes())
    source = SourceFile(str(path), bits.nbytes, path.stat().st_mtime_ns)
    tensor = LogicalTensor("w", "param", bits.shape, dtype, whole(bits.shape), np.zeros(min(bits.size, 1), np.int64))
    return catalog([source], [tensor], digests), tensor


def read(held: Catalog, wants: Sequence[Want], buffers: Sequence[NDArray[np.uint8]], **options: int) -> int:
    """Gather, and the number of bytes that were read from files for it."""
    with Files() as files:
        gather(Reader(held, files), wants, buffers, **options)
        return files.bytes_read


# ---- any files to any buffers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gather")


@pytest.fixture(params=["as it is", "small"])
def constants(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Also with limits so small that random tensors take every path: runs in place, gaps, cuts."""
    if request.param == "small":
        monkeypatch.setattr(limits, "SHORT_RUN_BYTES", 24)
        monkeypatch.setattr(limits, "LONG_GAP_BYTES", 20)
        monkeypatch.setattr(limits, "SCRATCH_BYTES", 48)
    return request.param


@pytest.mark.usefixtures("constants")
@pytest.mark.parametrize("digests", [False, True])
def test_any_files_to_any_buffers(folder: Path, digests: bool) -> None:
    @given(p.generators, st.lists(st.tuples(p.shapes, st.sampled_from(sorted(DTYPES))), min_size=1, max_size=3))
    @p.law(25)
    def check(rng: np.random.Generator, kinds: list[tuple[tuple[int, ...], str]]) -> None:
        sources: list[SourceFile] = []
        tensors, wants = [], []
        buffers = [rng.integers(0, 256, 200_000, np.uint8) for _ in range(3)]
        truth = [b.copy() for b in buffers]
        base = 0
        for k, (shape, dtype) in enumerate(kinds):
            bits = random_bits(rng, shape, dtype)
            blocks, lengths = p.partitions(rng, shape)
            tensor, files = write_tensor(rng, folder, f"t{k}", blocks, lengths, bits, dtype)
            tensor = LogicalTensor(
                tensor.name,
                tensor.state,
                shape,
                dtype,
                Blocks(blocks.offsets, blocks.sizes, blocks.starts, blocks.strides, blocks.buffers + len(sources)),
                tensor.bases,
            )
            sources += files
            tensors.append(tensor)
            target, lengths = p.partitions(rng, shape)
            if rng.random() < 0.3:
                target = target.take(rng.random(len(target)) < 0.5)
            wants.append(Want(tensor, target, dtype, base))
            truth = expected(target, base, bits, truth)
            base += max(lengths) * DTYPES[dtype] + int(rng.integers(9))
        held = catalog(sources, tensors, digests)
        held.check()
        with Files() as files:
            moved = gather(Reader(held, files), wants, buffers, threads=int(rng.integers(1, 4)))
        assert moved == sum(int(w.blocks.counts.sum()) * DTYPES[w.dtype] for w in wants)
        for got, want in zip(buffers, truth, strict=True):
            assert np.array_equal(got, want)

    check()


def test_nothing_wanted_is_nothing_done(tmp_path: Path) -> None:
    held, tensor = simple(tmp_path, np.zeros((0, 3), np.float32), "float32")
    buffer = np.arange(9, dtype=np.uint8)
    assert read(held, [Want(tensor, empty(2), "float32")], [buffer]) == 0
    assert read(held, [], [buffer]) == 0
    assert buffer.tolist() == list(range(9))


# ---- how much is read


@pytest.mark.parametrize("digests", [False, True])
def test_each_byte_of_a_dense_tensor_is_read_once(tmp_path: Path, digests: bool) -> None:
    shape = (731, 1021)
    bits = np.random.default_rng(1).integers(0, 2**32, shape, np.uint32)
    held, tensor = simple(tmp_path, bits, "float32", digests)
    for target in [whole(shape), ceil_partition(shape, 0, 7).in_buffer(0), flat_ranges(shape, [0], [bits.size], [0])]:
        # ceil pieces lie over one another in a buffer; put each at its own place.
        first = target.offsets @ np.array([shape[1], 1])
        target = Blocks(target.offsets, target.sizes, first, target.strides, target.buffers)
        out = np.zeros(bits.nbytes, np.uint8)
        count = read(held, [Want(tensor, target, "float32")], [out], threads=1)
        assert out.tobytes() == bits.tobytes()
        # With digests, pieces that share a chunk share what was read of it.
        assert bits.nbytes <= count <= bits.nbytes + (CHUNK if digests else 0)


def test_one_row_reads_that_row(tmp_path: Path) -> None:
    shape = (500, 1000)
    bits = np.random.default_rng(2).integers(0, 2**32, shape, np.uint32)
    held, tensor = simple(tmp_path, bits, "float32")
    out = np.zeros(4000, np.uint8)
    offsets, sizes = region(shape, [slice(17, 18)])
    want = Want(tensor, box(offsets, sizes), "float32")
    assert read(held, [want], [out]) == 4000
    assert out.tobytes() == bits[17].tobytes()


def test_one_row_with_digests_reads_its_chunks(tmp_path: Path) -> None:
    shape = (3000, 1000)
    bits = np.random.default_rng(3).integers(0, 2**32, shape, np.uint32)
    held, tensor = simple(tmp_path, bits, "float32", digests=True)
    out = np.zeros(4000, np.uint8)
    row = CHUNK // 4000  # it straddles the first two chunks
    assert read(held, [Want(tensor, box((row, 0), (1, 1000)), "float32")], [out]) == 2 * CHUNK
    assert out.tobytes() == bits[row].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_column_of_long_rows_does_not_read_the_rows(tmp_path: Path, dtype: str) -> None:
    """Neighbours lie 20 KB apart; each is read by itself, converted or not."""
    shape = (60, 5000)
    values = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    held, tensor = simple(tmp_path, values, "float32")
    out = np.zeros(60 * DTYPES[dtype], np.uint8)
    assert read(held, [Want(tensor, box((0, 99), (60, 1)), dtype)], [out]) == 240
    assert np.array_equal(out.view(dtype), values[:, 99].astype(dtype))


def test_gaps_between_long_runs_are_not_read(tmp_path: Path) -> None:
    """Most of each 80 KB row, 12 KB left out: long enough to be worth a read of its own, however short the gap."""
    shape = (30, 20_000)
    bits = np.random.default_rng(17).integers(0, 2**32, shape, np.uint32)
    held, tensor = simple(tmp_path, bits, "float32")
    out = np.zeros(30 * 17_000 * 4, np.uint8)
    assert read(held, [Want(tensor, box((0, 2000), (30, 17_000)), "float32")], [out]) == out.nbytes
    assert out.tobytes() == bits[:, 2000:19_000].tobytes()


def test_a_narrow_column_shard_is_read_in_one_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs with short gaps: a few long reads, not one for each row."""
    shape = (4000, 100)
    bits = np.random.default_rng(5).integers(0, 2**32, shape, np.uint32)
    held, tensor = simple(tmp_path, bits, "float32")
    out = np.zeros(4000 * 25 * 4, np.uint8)
    calls: list[int] = []
    real = Files.read_into
    monkeypatch.setattr(Files, "read_into", lambda self, path, at, b: (calls.append(at), real(self, path, at, b))[1])
    count = read(held, [Want(tensor, box((0, 50), (4000, 25)), "float32")], [out])
    assert out.tobytes() == bits[:, 50:75].tobytes()
    assert count <= bits.nbytes
    assert len(calls) == 1


def test_far_groups_of_near_runs_are_one_read_for_each_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short gaps inside a group, a long one between groups: the long gap is not read, the short ones are."""
    shape = (3, 200, 64)
    bits = np.random.default_rng(6).integers(0, 2**32, shape, np.uint32)
    held, tensor = simple(tmp_path, bits, "float32")
    out = np.zeros(3 * 20 * 8 * 4, np.uint8)
    calls: list[int] = []
    real = Files.read_into
    monkeypatch.setattr(
        Files, "read_into", lambda self, path, at, b: (calls.append(len(b)), real(self, path, at, b))[1]
    )
    read(held, [Want(tensor, box((0, 30, 8), (3, 20, 8)), "float32")], [out])
    assert out.tobytes() == bits[:, 30:50, 8:16].tobytes()
    assert calls == [(19 * 64 + 8) * 4] * 3


@pytest.mark.parametrize("digests", [False, True])
def test_a_transposed_target_reads_each_byte_about_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digests: bool
) -> None:
    """However small the scratch, the file is walked forward once."""
    monkeypatch.setattr(limits, "SCRATCH_BYTES", 64 << 10)
    shape = (1200, 900)
    bits = np.random.default_rng(7).integers(0, 2**32, shape, np.uint32)
    held, tensor = simple(tmp_path, bits, "float32", digests)
    out = np.zeros(bits.nbytes, np.uint8)
    count = read(held, [Want(tensor, box((0, 0), shape, 0, (1, shape[0])), "float32")], [out], threads=1)
    assert out.tobytes() == np.ascontiguousarray(bits.T).tobytes()
    assert bits.nbytes <= count <= bits.nbytes * 1.01


def test_a_transposed_source_reads_each_byte_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SCRATCH_BYTES", 64 << 10)
    shape = (1200, 900)
    bits = np.random.default_rng(8).integers(0, 2**32, shape, np.uint32)
    held, tensor = simple(tmp_path, np.ascontiguousarray(bits.T), "float32")
    tensor = LogicalTensor("w", "param", shape, "float32", box((0, 0), shape, 0, (1, shape[0])), tensor.bases)
    out = np.zeros(bits.nbytes, np.uint8)
    count = read(held, [Want(tensor, whole(shape), "float32")], [out], threads=1)
    assert out.tobytes() == bits.tobytes()
    assert bits.nbytes <= count <= bits.nbytes * 1.01


def test_scratch_stays_within_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 32 << 10
    monkeypatch.setattr(limits, "SCRATCH_BYTES", limit)
    spans: list[int] = []
    real = Files.read_into
    monkeypatch.setattr(
        Files, "read_into", lambda self, path, at, b: (spans.append(len(b)), real(self, path, at, b))[1]
    )
    shape = (40, 50, 60)
    bits = np.random.default_rng(9).integers(0, 2**16, shape, np.uint16)
    held, tensor = simple(tmp_path, bits, "bfloat16")
    for offsets, sizes, dtype in [
        ((0, 0, 0), shape, "float32"),
        ((0, 10, 7), (40, 30, 5), "bfloat16"),
        ((0, 10, 7), (40, 30, 5), "float64"),
        ((3, 0, 59), (30, 50, 1), "bfloat16"),
    ]:
        spans.clear()
        out = np.zeros(numel(sizes) * DTYPES[dtype], np.uint8)
        read(held, [Want(tensor, box(offsets, sizes), dtype)], [out])
        part = bits[p.inside(np.array(offsets), np.array(sizes))]
        with np.errstate(invalid="ignore"):
            truth = part if dtype == "bfloat16" else (part.astype(np.uint32) << 16).view(np.float32).astype(dtype)
        if dtype == "float64":
            odd, wide = np.isnan(truth), part.astype(np.uint64)
            # numpy makes a signalling not-a-number quiet; its bits are to stay.
            truth.view(np.uint64)[odd] = ((wide >> 15 << 63) | (0x7FF << 52) | ((wide & 0x7F) << 45))[odd]
        assert out.tobytes() == truth.tobytes()
        assert len(spans) > 1
        assert max(spans) <= limit


# ---- threads


@pytest.mark.parametrize("digests", [False, True])
def test_more_than_4_mib_are_shared_among_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digests: bool
) -> None:
    shape = (3001, 1009)  # 12 MB
    rng = np.random.default_rng(10)
    bits = rng.integers(0, 2**32, shape, np.uint32)
    source = flat_partition(shape, 5, 1_000_003)
    lengths = [1_000_003] * (int(source.buffers.max()) + 1)
    tensor, files = write_tensor(rng, tmp_path, "w", source, lengths, bits, "float32")
    held = catalog(files, [tensor], digests)
    ran: list[int] = []
    real = room.execute

    def note(*args):
        ran.append(threading.get_ident())
        return real(*args)

    monkeypatch.setattr(room, "execute", note)
    target = ceil_partition(shape, 0, 4)
    piece = -(-bits.size // 4)
    buffers = [np.zeros(piece * 4, np.uint8) for _ in range(4)]
    count = read(held, [Want(tensor, target, "float32")], buffers, threads=3)
    flat = np.concatenate([bits.ravel(), np.zeros(4 * piece - bits.size, np.uint32)])
    assert b"".join(b.tobytes() for b in buffers) == flat.tobytes()
    assert len(ran) >= 3
    assert threading.get_ident() not in ran
    assert bits.nbytes <= count <= bits.nbytes + (16 * CHUNK if digests else 0)


def test_one_huge_run_is_cut_so_that_all_threads_have_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = np.random.default_rng(11).integers(0, 2**32, (3 << 20,), np.uint32)
    held, tensor = simple(tmp_path, bits, "float32")
    work: list[int] = []
    real = room.execute
    monkeypatch.setattr(room, "execute", lambda r, c, b: (work.append(sum(x.nbytes for x in c)), real(r, c, b))[1])
    out = np.zeros(bits.nbytes, np.uint8)
    assert read(held, [Want(tensor, whole(bits.shape), "float32")], [out], threads=4) == bits.nbytes
    assert out.tobytes() == bits.tobytes()
    assert len(work) == 4
    assert max(work) <= bits.nbytes // 4 * 9 // 8


def test_an_error_in_a_thread_reaches_the_caller(tmp_path: Path) -> None:
    bits = np.zeros((3 << 20,), np.uint32)
    held, tensor = simple(tmp_path, bits, "float32")
    with open(held.files[0].path, "r+b") as file:
        file.truncate(bits.nbytes - 4)
    with pytest.raises(DamagedCheckpoint, match=r"dense\.bin"):
        read(held, [Want(tensor, whole(bits.shape), "float32")], [np.zeros(bits.nbytes, np.uint8)], threads=4)


# ---- element types


def test_bfloat16_widens_exactly() -> None:
    torch = pytest.importorskip("torch")
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = torch.from_numpy(every.copy()).view(torch.bfloat16).to(torch.float32)
    finite = ~torch.isnan(wide).numpy()
    got = widen(every, "bfloat16", "float32")
    assert np.array_equal(got.view(np.uint32)[finite], wide.numpy().view(np.uint32)[finite])
    assert np.all(np.isnan(got[~finite]))
    doubled = widen(every, "bfloat16", "float64")
    assert np.array_equal(doubled[finite], wide.numpy()[finite].astype(np.float64))


def test_float16_widens_exactly() -> None:
    torch = pytest.importorskip("torch")
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    wide = torch.from_numpy(every.copy()).to(torch.float32).numpy()
    finite = ~np.isnan(wide)
    for dtype in ("float32", "float64"):
        got = widen(every, "float16", dtype)
        assert got.dtype == dtype
        assert np.array_equal(got[finite], wide[finite].astype(dtype))


@pytest.mark.usefixtures("constants")
@pytest.mark.parametrize(
    ("source", "target"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float64")]
)
def test_widened_pieces_land_where_they_belong(tmp_path: Path, source: str, target: str) -> None:
    shape = (13, 7, 11)
    rng = np.random.default_rng(12)
    values = rng.standard_normal(shape).astype(np.float32)
    if source == "bfloat16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        truth = (bits.astype(np.uint32) << 16).view(np.float32)
    else:
        bits = values.astype(source)
        truth = bits.astype(target)
    blocks, lengths = p.partitions(rng, shape)
    tensor, files = write_tensor(rng, tmp_path, "w", blocks, lengths, bits, source)
    held = catalog(files, [tensor])
    for _ in range(6):
        goal, lengths = p.partitions(rng, shape)
        buffers = [rng.integers(0, 256, n * DTYPES[target] + 3, np.uint8) for n in lengths]
        wanted = expected(goal, 3, truth, buffers)
        read(held, [Want(tensor, goal, target, 3)], buffers)
        for got, want in zip(buffers, wanted, strict=True):
            assert np.array_equal(got, want)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("float32", "bfloat16"),
        ("float32", "float16"),
        ("float64", "float32"),
        ("bfloat16", "float16"),
        ("float16", "bfloat16"),
        ("int64", "float32"),
        ("uint8", "bool"),
        ("int64", "float64"),
    ],
)
def test_what_would_lose_bits_is_refused(tmp_path: Path, source: str, target: str) -> None:
    bits = np.zeros(4 * DTYPES[source], np.uint8).view(_KEYS[DTYPES[source]])
    held, tensor = simple(tmp_path, bits, source)
    out = np.full(64, 7, np.uint8)
    with pytest.raises(Mismatch, match=f"'w' .param. is {source} in the checkpoint and {target} in the target"):
        read(held, [Want(tensor, whole((4,)), target)], [out])
    assert set(out.tolist()) == {7}


@pytest.mark.usefixtures("constants")
@pytest.mark.parametrize(
    ("source", "target"),
    [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float16"), ("float16", "bfloat16")],
)
def test_a_want_that_is_a_rounded_copy_gets_torchs_rounding(tmp_path: Path, source: str, target: str) -> None:
    torch = pytest.importorskip("torch")
    shape = (13, 7, 11)
    rng = np.random.default_rng(16)
    values = torch.from_numpy(rng.standard_normal(shape)).to(getattr(torch, source))
    bits = values.view(torch.uint32 if source == "float32" else torch.uint16).numpy()
    truth = values.to(getattr(torch, target)).view(torch.uint16).numpy()
    blocks, lengths = p.partitions(rng, shape)
    tensor, files = write_tensor(rng, tmp_path, "w", blocks, lengths, bits, source)
    held = catalog(files, [tensor])
    for _ in range(6):
        goal, lengths = p.partitions(rng, shape)
        buffers = [rng.integers(0, 256, n * 2 + 3, np.uint8) for n in lengths]
        wanted = expected(goal, 3, truth, buffers)
        read(held, [Want(tensor, goal, target, 3, round=True)], buffers)
        for got, want in zip(buffers, wanted, strict=True):
            assert np.array_equal(got, want)


def test_rounding_is_for_training_types_only(tmp_path: Path) -> None:
    held, tensor = simple(tmp_path, np.zeros(4, np.float64), "float64")
    with pytest.raises(Mismatch, match="float64 in the checkpoint and bfloat16"):
        read(held, [Want(tensor, whole((4,)), "bfloat16", round=True)], [np.zeros(8, np.uint8)])


# ---- what is missing or damaged


def test_elements_that_no_fragment_holds_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    bits = np.arange(24, dtype=np.uint32).reshape(4, 6)
    held, tensor = simple(tmp_path, bits, "float32")
    part = LogicalTensor("w", "exp_avg", (4, 6), "float32", box((0, 0), (3, 6)), tensor.bases)
    out = np.full(96, 7, np.uint8)
    with pytest.raises(DamagedCheckpoint, match=r"'w' \(exp_avg\): 24 elements are wanted.*hold 18"):
        read(held, [Want(part, whole((4, 6)), "float32")], [out])
    assert set(out.tolist()) == {7}
    assert read(held, [Want(part, box((1, 0), (2, 6)), "float32")], [out]) == 48


def test_a_truncated_file_is_damaged(tmp_path: Path) -> None:
    bits = np.arange(24, dtype=np.uint32)
    held, tensor = simple(tmp_path, bits, "float32")
    Path(held.files[0].path).write_bytes(bits.tobytes()[:-1])
    with pytest.raises(DamagedCheckpoint, match="truncated"):
        read(held, [Want(tensor, whole((24,)), "float32")], [np.zeros(96, np.uint8)])


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("chunk", [0, 1, 2, 3])
def test_a_flipped_bit_is_noticed_in_the_chunks_that_are_touched(tmp_path: Path, chunk: int, strided: bool) -> None:
    """The last chunk is shorter than the others."""
    shape = (1000, 900)  # 3.6 MB: three whole chunks and a part
    bits = np.random.default_rng(13).integers(0, 2**32, shape, np.uint32)
    held, tensor = simple(tmp_path, bits, "float32", digests=True)
    path = Path(held.files[0].path)
    raw = bytearray(path.read_bytes())
    at = min(chunk * CHUNK + 777_777, len(raw) - 1)
    raw[at] ^= 1
    path.write_bytes(raw)
    columns = slice(100, 110) if strided else slice(None)
    touched = missed = 0
    for first in range(0, 1000, 50):
        offsets, sizes = region(shape, [slice(first, first + 50), columns])
        out = np.zeros(numel(sizes) * 4, np.uint8)
        want = Want(tensor, box(offsets, sizes), "float32")
        low = (first * 900 + offsets[1]) * 4
        high = ((first + 49) * 900 + offsets[1] + sizes[1]) * 4
        if low // CHUNK <= chunk <= (high - 1) // CHUNK:
            touched += 1
            with pytest.raises(DigestMismatch, match=rf"dense\.bin: chunk {chunk} "):
                read(held, [want], [out])
        else:
            missed += 1
            read(held, [want], [out])
            assert out.tobytes() == bits[first : first + 50, columns].tobytes()
    assert touched
    assert missed
    out = np.zeros(bits.nbytes, np.uint8)
    for target in (whole(shape), box((0, 0), shape, 0, (1, 1000))):  # chunks read in place, and through scratch
        with pytest.raises(DigestMismatch, match=f"chunk {chunk} "):
            read(held, [Want(tensor, target, "float32")], [out], threads=1)
    with Files() as files:  # and not at all by who asks not to verify
        gather(
            Reader(held, files, verify=False), [Want(tensor, whole(shape), "float32")], [np.zeros(3_600_000, np.uint8)]
        )


@pytest.mark.parametrize("count", [1, 9, 700], ids=["one part", "few parts", "many parts"])
@pytest.mark.parametrize("gap", [0, 3_000], ids=["all", "with gaps"])
def test_neighbours_in_a_file_that_go_to_places_apart(tmp_path: Path, count: int, gap: int) -> None:
    """Chunks that several wants have between them are read and verified once, whichever parts they are in."""
    total = 6 * CHUNK + 12_345
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 256, total, np.uint8)
    held, tensor = simple(tmp_path, bits, "uint8", digests=True)
    cuts = [0, *sorted(rng.choice(np.arange(1, total), count - 1, replace=False).tolist()), total]
    ranges = [(low, high - gap) for low, high in itertools.pairwise(cuts) if low < high - gap]
    buffers = [np.zeros(high - low, np.uint8) for low, high in ranges]
    wants = [Want(tensor, box((low,), (high - low,)).in_buffer(k), "uint8") for k, (low, high) in enumerate(ranges)]
    read_bytes = read(held, wants, buffers, threads=1)
    for (low, high), buffer in zip(ranges, buffers, strict=True):
        assert np.array_equal(buffer, bits[low:high])
    if not gap:
        assert read_bytes == total
    path = Path(held.files[0].path)
    for at in (ranges[0][0], ranges[len(ranges) // 2][0], ranges[-1][1] - 1):
        raw = bytearray(bits.tobytes())
        raw[at] ^= 4
        path.write_bytes(raw)
        with pytest.raises(DigestMismatch, match=rf"chunk {at // CHUNK} "):
            read(held, wants, buffers, threads=1)


def test_what_lies_in_one_chunk_is_seen_where_it_was_verified(tmp_path: Path) -> None:
    """Each chunk is read once for all that follows in it, the next one takes its memory, and damage is noticed."""
    bits = random_bits(np.random.default_rng(5), (2 * CHUNK + 1000,), "uint8")
    held, _ = simple(tmp_path, bits, "uint8", digests=True)
    path, raw, cache = held.files[0].path, Path(held.files[0].path).read_bytes(), OrderedDict()
    with Files() as files:
        reader = Reader(held, files)

        def seen(at: int, count: int) -> bytes | None:
            found = reader.within_chunk(0, at, count, cache)
            return None if found is None else found.tobytes()

        first = reader.within_chunk(0, 10, 100, cache)
        assert seen(500, CHUNK - 500) == raw[500:CHUNK]
        assert files.bytes_read == CHUNK
        assert seen(CHUNK, CHUNK) == raw[CHUNK : 2 * CHUNK]
        assert first is not None
        assert first.tobytes() == raw[CHUNK + 10 : CHUNK + 110]  # valid until then only
        assert seen(2 * CHUNK, 1000) == raw[2 * CHUNK : 2 * CHUNK + 1000]
        assert files.bytes_read == reader.verified_bytes == len(raw)
        assert [seen(CHUNK - 1, 2), seen(2 * CHUNK, len(raw)), seen(0, 0)] == [None] * 3  # in two chunks, or beyond
    damaged = bytearray(raw)
    damaged[CHUNK + 7] ^= 1
    Path(path).write_bytes(damaged)
    with Files() as files, pytest.raises(DigestMismatch, match="chunk 1"):
        Reader(held, files).within_chunk(0, CHUNK + 500_000, 4, OrderedDict())


def test_bytes_beyond_the_digests_are_damaged(tmp_path: Path) -> None:
    bits = np.arange(24, dtype=np.uint32)
    held, tensor = simple(tmp_path, bits, "float32", digests=True)
    beyond = LogicalTensor("w", "param", (24,), "float32", whole((24,), 1), tensor.bases)
    with pytest.raises(DamagedCheckpoint, match="digests cover 96"):
        read(held, [Want(beyond, whole((24,)), "float32")], [np.zeros(96, np.uint8)])


# ---- the plan


def test_the_plan_walks_files_in_order_and_can_be_narrowed(folder: Path) -> None:
    rng = np.random.default_rng(14)
    shape = (9, 8, 7)
    bits = random_bits(rng, shape, "bfloat16")
    blocks, lengths = p.partitions(rng, shape)
    tensor, _ = write_tensor(rng, folder, "narrow", blocks, lengths, bits, "bfloat16")
    target = box((0, 0, 0), shape, 0, (1, 63, 9))
    copies = plan([Want(tensor, target, "float32", 100)])
    assert [(c.file, c.at) for c in copies] == sorted((c.file, c.at) for c in copies)
    assert sum(c.nbytes for c in copies) == bits.nbytes
    assert len(copies) == len(intersect(tensor.blocks, target))

    def addresses(copy) -> set[tuple[int, int, int]]:
        at = p.positions(copy.sizes, 0, copy.steps).ravel() * 2 + copy.at
        to = p.positions(copy.sizes, 0, copy.target_steps).ravel() * 4 + copy.to
        return set(zip([copy.file] * len(at), at.tolist(), to.tolist(), strict=True))

    for copy in copies:
        last = max(at for _, at, _ in addresses(copy))
        assert copy.at + copy.span == last + 2
        for axis, n in enumerate(copy.sizes):
            cut = int(rng.integers(n + 1))
            parts = [copy.narrow(axis, a, b - a) for a, b in [(0, cut), (cut, n)] if b > a]
            assert set().union(*map(addresses, parts)) == addresses(copy)
            assert sum(part.nbytes for part in parts) == copy.nbytes


def test_wants_of_several_tensors_share_buffers(tmp_path: Path) -> None:
    rng = np.random.default_rng(15)
    a, b = random_bits(rng, (5,), "float32"), random_bits(rng, (), "float32")
    first, files_a = write_tensor(rng, tmp_path, "a", whole((5,)), [5], a, "float32")
    second, files_b = write_tensor(rng, tmp_path, "b", whole((), 0, 1), [0, 1], b, "float32")
    held = catalog([files_a[0], files_b[1]], [first, second])
    out = np.zeros(24, np.uint8)
    read(held, [Want(first, whole((5,)), "float32"), Want(second, whole(()), "float32", 20)], [out])
    assert out.tobytes() == a.tobytes() + b.tobytes()


def test_a_fragment_may_be_wanted_twice(tmp_path: Path) -> None:
    """A tied weight goes to two places of one target."""
    bits = np.arange(24, dtype=np.uint32).reshape(4, 6)
    held, tensor = simple(tmp_path, bits, "float32")
    out = [np.zeros(96, np.uint8), np.zeros(96, np.uint8)]
    both = concat([whole((4, 6)), whole((4, 6), 0, 1)], 2)
    read(held, [Want(tensor, both, "float32")], out)
    assert out[0].tobytes() == out[1].tobytes() == bits.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_memory_beside_the_buffers_is_the_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(limits, "SCRATCH_BYTES", 1 << 20)
    shape = (2048, 1024)
    held, tensor = simple(tmp_path, np.ones(shape, np.float32), "float32")
    out = np.zeros(numel(shape) * DTYPES[dtype], np.uint8)
    want = Want(tensor, box((0, 0), shape, 0, (1, shape[0])), dtype, round=True)
    read(held, [want], [out], threads=1)
    tracemalloc.start()
    try:
        read(held, [want], [out], threads=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (1 << 20) + (1 << 18)
