"""Logical digests: equal to the definition, additive over any cut in any order, and different after every fault."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import property as p
from tests.slow_cases import slow_but
from ucp.geometry import Blocks, box, concat, flat_ranges, row_major, whole
from ucp.job import device_digest, device_products, live_digest
from ucp.job.live_digest import LiveElements, digests, on_device
from ucp.logical import digest as logical
from ucp.logical import runs as running
from ucp.logical.digest import Digest, digest_bytes, digest_sampling, row_keys, table, total
from ucp.logical.record import EVERY, drawn
from ucp.logical.runs import Runs, Sample, mixed, runs_of

WIDTHS = [1, 2, 4, 8, 16]


def by_definition(raw: bytes) -> Digest:
    """As the module's docstring says it, word by word in Python's own numbers."""
    words = np.frombuffer(raw + b"\0" * (-len(raw) % 4), "<i4").tolist()
    weights = table().tolist()
    sums = [0, 0]
    for row in range(-(-len(words) // 256)):
        for lane in range(2):
            key = int(mixed(np.array([2 * row + lane], np.uint64) + np.uint64(logical.KEY_SEED))[0]) | 1
            columns = zip(weights[lane], words[256 * row : 256 * row + 256], strict=False)
            sums[lane] += key * sum(weight * word for weight, word in columns)
    return Digest(sums[0] % 2**64, sums[1] % 2**64)


def of_blocks(shape, blocks: Blocks, width: int, buffer: np.ndarray) -> Digest:
    return total(digest_bytes(buffer, part) for part in runs_of(shape, blocks, width))


def of_array(array: np.ndarray) -> Digest:
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return of_blocks(array.shape, whole(array.shape), array.itemsize, raw)


def random_bytes(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 256, count, dtype=np.uint8)


@given(p.with_empty, st.sampled_from(WIDTHS), p.generators)
@p.law(60)
def test_it_is_what_the_definition_says(shape, width, rng) -> None:
    raw = random_bytes(rng, int(np.prod(shape)) * width)
    assert of_blocks(shape, whole(shape), width, raw) == by_definition(raw.tobytes())


def test_table_and_keys_are_what_they_always_were() -> None:
    # Digests are kept in checkpoints: a change of the construction needs another scheme's name.
    assert logical.SCHEME == "rows-256x2"
    raw = np.arange(5000, dtype=np.uint32).view(np.uint8)
    assert str(of_blocks((5000,), whole((5000,)), 4, raw)) == "f6e45df675b28c98cd1033f24433829b"
    assert np.all(table() >> 60 >= -1)
    assert np.all(table() >> 60 <= 0)
    assert len(np.unique(table())) == 512
    assert np.all(row_keys(np.arange(1000)) & 1)


@given(p.shapes, st.sampled_from(WIDTHS), p.generators, st.integers(0, 12), st.booleans())
@p.law(120)
def test_any_cut_adds_up_to_the_whole_in_any_order(shape, width, rng, cuts, boxes) -> None:
    n = int(np.prod(shape))
    tensor = random_bytes(rng, n * width).reshape(*shape, width)
    parts = []
    if boxes or n == 0:
        for offsets, sizes in p.box_splits(rng, shape, cuts):
            piece = tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
            order = rng.permutation(len(shape)).tolist()  # the buffer's own order of the dimensions
            buffer = np.ascontiguousarray(piece.transpose(*order, len(shape))).reshape(-1)
            strides = np.empty(len(shape), np.int64)
            strides[order] = row_major([sizes[k] for k in order])
            parts.append(
                (box(offsets, sizes, 3, strides.tolist()), np.concatenate([np.full(3 * width, 7, np.uint8), buffer]))
            )
    else:
        ends = p.flat_splits(rng, n, cuts + 1).tolist()
        flat = tensor.reshape(-1)
        for low, high in itertools.pairwise(ends):
            parts.append(
                (
                    flat_ranges(shape, [low], [high], [1]),
                    np.concatenate([np.full(width, 9, np.uint8), flat[low * width : high * width]]),
                )
            )
    rng.shuffle(parts)
    found = Digest()
    for blocks, buffer in parts:
        found = found + of_blocks(shape, blocks, width, buffer)
    assert found == by_definition(tensor.tobytes())


@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ((700, 1000), 4),
        *(
            pytest.param(shape, width, marks=pytest.mark.slow)
            for shape, width in [
                *itertools.product([(64, 9, 1111), (300, 2048)], [1, 2, 4]),
                *(((700, 1000), 1), ((700, 1000), 2), *itertools.product([(900_001,)], [1, 2, 4])),
            ]
        ),
    ],
)
def test_large_cuts_take_every_way_and_add_up(shape, width) -> None:
    rng = np.random.default_rng(3)
    n = int(np.prod(shape))
    tensor = random_bytes(rng, n * width).reshape(*shape, width)
    wanted = of_array(tensor.reshape(-1))
    for axis in range(len(shape)):
        for parts in (1, 3, 50):
            ends = [shape[axis] * k // parts for k in range(parts + 1)]
            found, live = Digest(), []
            for low, high in itertools.pairwise(ends):
                piece = np.ascontiguousarray(np.take(tensor, range(low, high), axis)).reshape(-1)
                offsets = [0] * len(shape)
                offsets[axis] = low
                blocks = box(offsets, [high - low if k == axis else size for k, size in enumerate(shape)])
                found = found + of_blocks(shape, blocks, width, piece)
                kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[width]
                live.append(LiveElements(torch.from_numpy(piece).view(kind), shape, blocks))
            assert found == wanted
            assert total(on_device(live)) == wanted
            assert total(digests(live, threads=2)) == wanted
    turned = np.ascontiguousarray(np.moveaxis(tensor, -2, 0)).reshape(-1)
    strides = [*(s * shape[-1] if False else s for s in row_major(shape[:-1])), int(np.prod(shape[:-1]))]
    blocks = box([0] * len(shape), shape, 0, strides)
    assert of_blocks(shape, blocks, width, turned) == wanted


@pytest.mark.parametrize("size", [3, 700, 1500, 70_000, 9 << 20])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_one_pass_has_the_digest_of_all_and_of_a_sample(size, count) -> None:
    rng = np.random.default_rng(size)
    count = min(count, max((24 << 20) // size, 1))
    raw = random_bytes(rng, size * count)
    gaps = rng.integers(0, 5000, count)
    order = rng.permutation(count)
    places = np.cumsum(gaps + size)[order] - size
    runs = Runs(np.arange(count) * size, places, np.full(count, size))
    nbytes = int(places.max()) + size
    for every, first in itertools.product((1, 3, 32), (True, False)):
        sample = Sample(7, every, first)
        found = digest_sampling(raw, runs, sample, nbytes)
        assert found[0] == digest_bytes(raw, runs)
        assert found[1] == digest_bytes(raw, sample.of(runs, nbytes))
        blocks = np.arange((nbytes - 1) // running.SAMPLE_BLOCK + 1)
        assert np.array_equal(np.flatnonzero(sample.takes(blocks, nbytes)), sample.picks(nbytes))


@given(p.with_empty, p.generators, st.integers(0, 5))
@p.law(80)
def test_few_blocks_have_the_runs_that_a_plan_finds(shape, rng, cuts) -> None:
    n = int(np.prod(shape))
    ends = p.flat_splits(rng, n, cuts + 1).tolist()
    for low, high in itertools.pairwise(ends):
        blocks = flat_ranges(shape, [low], [high], [2])
        found = list(runs_of(shape, blocks, 4, np.full(len(blocks), 12, np.int64)))
        assert [(part.sources.tolist(), part.places.tolist(), part.sizes.tolist()) for part in found] == (
            [([20], [4 * low], [4 * (high - low)])] if high > low else []
        )


def test_many_runs_are_listed_a_bounded_number_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr(running, "LIMIT", 100)
    rng = np.random.default_rng(5)
    tensor = rng.integers(-(2**31), 2**31, (40, 30, 7)).astype(np.int32)
    turned = np.ascontiguousarray(tensor.transpose(2, 1, 0)).reshape(-1)
    listed = list(runs_of(tensor.shape, box([0, 0, 0], tensor.shape, 0, [1, 40, 1200]), 4))
    assert max(len(part) for part in listed) <= 100
    assert total(digest_bytes(turned.view(np.uint8), part) for part in listed) == of_array(tensor)


# --- faults ----------------------------------------------------------------------------------------------------------


def fault(name: str, values: np.ndarray, rng: np.random.Generator) -> None:
    flat = values.reshape(-1)
    n = len(flat)
    if name == "one element off":
        flat[n // 3] = np.nextafter(flat[n // 3], np.float32(9))
    elif name == "two neighbours swapped":
        flat[[10, 11]] = flat[[11, 10]]
    elif name == "two elements swapped a row of the table apart":
        flat[[5, 5 + 256]] = flat[[5 + 256, 5]]
    elif name == "two elements swapped 2^16 apart":
        flat[[9, 9 + 65536]] = flat[[9 + 65536, 9]]
    elif name == "two rows swapped":
        values[[3, 40]] = values[[40, 3]]
    elif name == "two blocks of 1 KiB swapped":
        flat[: 2 * 256].reshape(2, 256)[[0, 1]] = flat[: 2 * 256].reshape(2, 256)[[1, 0]].copy()
    elif name == "transposed":
        square = values[:256, :256]
        square[...] = square.T.copy()
    elif name == "a row twice":
        values[7] = values[8]
    elif name == "the sign of zero":
        flat[100] = -flat[100]
    elif name == "a sign":
        flat[77] = -flat[77]
    elif name == "all signs":
        flat *= -1
    elif name == "the payload of what is no number":
        flat[200:201].view(np.uint32)[0] ^= 1
    elif name == "one up and one down":
        words = flat.view(np.int32)
        words[50] += 1
        words[51] -= 1
    elif name == "shifted by one":
        flat[1:] = flat[:-1].copy()


FAULTS = [
    "one element off",
    "two neighbours swapped",
    "two elements swapped a row of the table apart",
    "two elements swapped 2^16 apart",
    "two rows swapped",
    "two blocks of 1 KiB swapped",
    "transposed",
    "a row twice",
    "the sign of zero",
    "a sign",
    "all signs",
    "the payload of what is no number",
    "one up and one down",
    "shifted by one",
]


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str) -> None:
    rng = np.random.default_rng(11)
    for _ in range(20):
        values = rng.standard_normal((300, 512)).astype(np.float32)
        values.reshape(-1)[100] = 0.0
        values.reshape(-1)[200] = np.nan
        before = of_array(values)
        damaged = values.copy()
        fault(name, damaged, rng)
        after = of_array(damaged)
        assert after.first != before.first
        assert after.second != before.second
        live = LiveElements(torch.from_numpy(damaged), damaged.shape, whole(damaged.shape))
        assert on_device([live]) == digests([live]) == [after]


def test_a_shard_twice_is_found() -> None:
    values = np.random.default_rng(1).standard_normal((8, 1000)).astype(np.float32)
    shards = [
        LiveElements(torch.from_numpy(values[k : k + 2].copy()), values.shape, box([k, 0], [2, 1000]))
        for k in range(0, 8, 2)
    ]
    parts = digests(shards)
    assert total(parts) == of_array(values)
    assert total([*parts, parts[2]]) != of_array(values)
    assert total(parts[1:]) != of_array(values)
    # The first shard's values in the second one's place, too.
    wrong = LiveElements(shards[0].tensor, values.shape, shards[1].blocks)
    assert total([parts[0], *digests([wrong]), *parts[2:]]) != of_array(values)


@given(p.generators, st.integers(1, 400))
@p.law(60)
def test_random_changes_are_found(rng, count) -> None:
    values = rng.standard_normal((40, 256)).astype(np.float32)
    changed = values.copy()
    where = rng.integers(0, values.size, count)
    changed.reshape(-1).view(np.uint32)[where] ^= np.uint32(1) << rng.integers(0, 32, count).astype(np.uint32)
    assert (of_array(changed) == of_array(values)) == (changed.tobytes() == values.tobytes())


# --- samples ---------------------------------------------------------------------------------------------------------


def test_a_sample_is_the_digest_of_the_blocks_that_it_picks() -> None:
    rng = np.random.default_rng(2)
    raw = random_bytes(rng, 100 * running.SAMPLE_BLOCK + 1234)
    shape = (len(raw),)
    for every, first in itertools.product((1, 3, 32), (True, False)):
        sample = Sample(12345, every, first)
        picks = sample.picks(len(raw)).tolist()
        assert picks[0] == 0 or not first
        assert len(set(picks)) == len(picks)
        for group in range(101 // every):  # of every so many one
            assert any(group * every <= k < (group + 1) * every for k in picks)
        if not first:
            assert [k // every for k in picks] == list(range(-(-101 // every)))
        cut = np.zeros_like(raw)
        for k in picks:
            cut[k * running.SAMPLE_BLOCK : (k + 1) * running.SAMPLE_BLOCK] = raw[
                k * running.SAMPLE_BLOCK : (k + 1) * running.SAMPLE_BLOCK
            ]
        wanted = of_array(cut)
        ends = [0, 70_001, 1 << 20, (1 << 20) + 5, len(raw)]
        lives = [
            LiveElements(torch.from_numpy(raw[low:high].copy()), shape, flat_ranges(shape, [low], [high], [0]))
            for low, high in itertools.pairwise(ends)
        ]
        assert total(digests(lives, sample=sample)) == wanted
        assert total(on_device(lives, sample)) == wanted
    assert Sample(1, 32).picks(len(raw)).tolist() != Sample(2, 32).picks(len(raw)).tolist()
    assert Sample(1, 32).picks(running.SAMPLE_BLOCK).tolist() == [0]
    assert Sample(1, 32).picks(0).tolist() == []


def test_a_sample_without_first_blocks_has_one_of_each_tensor_wherever_it_begins() -> None:
    """Else the ranks that hold the first rows would have most of the work."""
    for count in (1, 2, 5, EVERY - 1, EVERY, EVERY + 1, 3 * EVERY + 7):
        nbytes = count * running.SAMPLE_BLOCK - 3
        picks = np.array([drawn(seed).picks(nbytes) for seed in range(3000)])
        assert picks.shape[1] == -(-count // EVERY)
        assert (picks // EVERY == np.arange(picks.shape[1])).all()
        last = picks[:, -1] % EVERY
        alone = (count - 1) % EVERY + 1
        assert last.max() == alone - 1
        assert abs(last.mean() - (alone - 1) / 2) < alone / 40
    assert drawn(1).picks(0).tolist() == []
    assert drawn(5).seen(70_000) in (65_536, 70_000 - 65_536)


def test_a_sample_finds_faults_as_often_as_it_says() -> None:
    """A fault in any block but the first, over many checkpoints' seeds; and a fault in every block of a run of them."""
    nbytes = 640 * running.SAMPLE_BLOCK
    found = np.array([Sample(seed, EVERY).takes(np.arange(640), nbytes) for seed in range(2000)])
    assert found[:, 0].all()
    assert abs(found[:, 1:].mean() * EVERY - 1) < 0.02
    assert abs(found[:, 100].mean() * EVERY - 1) < 0.5
    assert found[:, 1 : 1 + 2 * EVERY].any(axis=1).all()
    values = torch.zeros(640 * running.SAMPLE_BLOCK // 4, dtype=torch.int32)
    sample = Sample(11, EVERY)
    live = LiveElements(values, tuple(values.shape), whole(tuple(values.shape)))
    picks = sample.picks(values.nbytes)
    assert sample.seen(values.nbytes) == len(picks) * running.SAMPLE_BLOCK
    assert [sample.seen(n) for n in (0, 1, 70_000)] == [
        0,
        1,
        70_000 if sample.picks(70_000).tolist() == [0, 1] else 65_536,
    ]
    (before,) = digests([live], sample=sample)
    for block in (int(picks[3]), int(picks[3]) + 1):
        values[block * running.SAMPLE_BLOCK // 4 + 77] = 1
        (after,) = digests([live], sample=sample)
        assert (after != before) == (block in picks.tolist())
        values.zero_()


# --- live tensors ----------------------------------------------------------------------------------------------------


def test_live_tensors_are_digested_as_another_type() -> None:
    rounded = torch.randn(3000).to(torch.bfloat16)
    rounded[5] = float("nan")
    rounded.view(torch.int16)[6] = 0x7FC1
    rounded.view(torch.int16)[7] = 0x7F81
    wide = (rounded.view(torch.int16).to(torch.int32) << 16).view(torch.float32)
    narrow = LiveElements(rounded, (3000,), whole((3000,)))
    again = LiveElements(wide, (3000,), whole((3000,)), "bfloat16")
    assert digests([narrow]) == digests([again]) == on_device([again])
    assert digests([LiveElements(wide, (3000,), whole((3000,)))]) != digests([narrow])


def test_tensors_of_every_type_and_none(monkeypatch) -> None:
    monkeypatch.setattr(live_digest, "PIECE", 64 << 10)
    rng = np.random.default_rng(4)
    lives = []
    for dtype in (torch.bool, torch.int8, torch.float16, torch.bfloat16, torch.float64, torch.complex64):
        raw = torch.from_numpy(rng.integers(0, 2, 40_960, dtype=np.uint8))
        tensor = raw.view(dtype)
        lives.append(LiveElements(tensor, tuple(tensor.shape), whole(tensor.shape)))
        lives.append(LiveElements(tensor[:1].reshape(()), (), whole(())))
    lives.append(LiveElements(torch.empty(0), (0, 3), whole((0, 3))))
    wanted = [of_array(live.tensor.reshape(-1).view(torch.uint8).numpy()) for live in lives]
    assert digests(lives) == digests(lives, threads=3) == on_device(lives) == wanted


def test_views_at_odd_places_of_a_buffer() -> None:
    buffer = torch.randn(5000).to(torch.bfloat16)
    shape = (1, 4000)
    for start in (0, 1, 2, 3):
        own = buffer[start : start + 4000].clone()
        held = LiveElements(buffer, shape, box([0, 0], shape, start))
        view = LiveElements(buffer[start:], shape, whole(shape))
        assert (
            digests([held])
            == digests([view])
            == on_device([held])
            == on_device([view])
            == digests([LiveElements(own, shape, whole(shape))])
        )
    parts = concat([flat_ranges(shape, [0, 1001], [1001, 4000], [999, 2000])], 2)
    moved = torch.zeros(5000, dtype=torch.bfloat16)
    moved[999:2000], moved[2000:4999] = own[:1001], own[1001:]
    assert (
        on_device([LiveElements(moved, shape, parts)])
        == digests([LiveElements(moved, shape, parts)])
        == digests([LiveElements(own, shape, whole(shape))])
    )


def test_texts() -> None:
    digest = Digest(1, 2**63)
    assert str(digest) == "0000000000000001" + "8000000000000000"
    assert Digest.parse(str(digest)) == digest
    for text in ("", "12", "g" * 32, "A" * 32):
        with pytest.raises(ValueError, match="32 hexadecimal digits"):
            Digest.parse(text)
    assert total([]) == Digest() == digest_bytes(b"", Runs(*[np.zeros(0, np.int64)] * 3))


@pytest.mark.parametrize(
    "tensor", [torch.arange(40.0)[::2], torch.arange(40.0).view(20, 2)[:, 1:], torch.arange(12.0).view(3, 4).t()]
)
def test_elements_that_lie_apart(tensor: torch.Tensor) -> None:
    blocks = whole(tuple(tensor.shape))
    lying = [
        LiveElements(t, tuple(t.shape), blocks) for t in (tensor, tensor.clone(memory_format=torch.contiguous_format))
    ]
    assert digests(lying[:1]) == digests(lying[1:]) == on_device(lying[:1])


@pytest.mark.parametrize("every", slow_but([3], [None, 1, 3, 32]))
def test_tensors_together_have_the_digests_that_each_has(every) -> None:
    rng = np.random.default_rng(11)
    sample = None if every is None else Sample(5, every)
    lives, wanted = [], []
    for k in range(200):
        shape = (int(rng.integers(0, 40)), int(rng.integers(1, 3000 if k % 10 else 40_000)))
        tensor = torch.from_numpy(rng.integers(-(2**31), 2**31, shape).astype(np.int32))
        n = tensor.numel()
        low, high = sorted(rng.integers(0, n + 1, 2).tolist()) if k % 2 else (0, n)
        blocks = flat_ranges(shape, [low], [high], [0])
        part = tensor.reshape(-1)[low:high].clone()
        lives.append(LiveElements(part, shape, blocks))
        parts = list(runs_of(shape, blocks, 4))
        if sample is not None:
            parts = [sample.of(part, 4 * n) for part in parts]
        wanted.append(total(digest_bytes(part.numpy(), one) for one in parts))
    assert digests(lives, sample=sample) == wanted
    assert digests(lives, sample=sample, threads=3) == wanted
    assert on_device(lives, sample) == wanted


@pytest.mark.parametrize("by_bytes", [True, False])
@pytest.mark.parametrize("rows", [(40, 160), (64, 4096)])
def test_a_device_has_two_ways_to_multiply(monkeypatch, by_bytes, rows) -> None:
    assert device_products.has_byte_products(torch.device("cpu"))
    monkeypatch.setattr(device_products, "ROWS_AT_ONCE", rows[0])
    monkeypatch.setattr(device_products, "ROWS_KEPT", rows[1])
    monkeypatch.setattr(device_digest, "LONG", 2048)
    rng = np.random.default_rng(3)
    lives, wanted = [], []
    sizes = [0, 1, 255, 256, 100_000, *rng.integers(1, 5000, 60).tolist(), 30_001, 300, 70_000]
    for n in sizes:
        tensor = torch.from_numpy(rng.integers(-(2**31), 2**31, n).astype(np.int32))
        for edge, value in ((0, -(2**31)), (1, 2**31 - 1), (2, 0x7F7F7F7F), (3, -0x7F7F7F80)):
            tensor[edge:7:4] = value
        lives.append(LiveElements(tensor, (n,), whole((n,))))
        wanted.append(of_array(tensor.numpy()))
    assert on_device(lives, by_bytes=by_bytes) == wanted
    wide = [
        LiveElements(t, tuple(t.shape), whole(tuple(t.shape)), "bfloat16", rounded=True)
        for t in (torch.randn(70_001), torch.randn(9))
    ]
    monkeypatch.setattr(live_digest, "PIECE", 64 << 10)
    assert on_device(wide, by_bytes=by_bytes) == digests(wide)


def test_a_device_that_multiplies_bytes_wrongly_is_asked_for_doubles(monkeypatch) -> None:
    device = torch.device("cpu")
    real = torch._int_mm

    def wrong(left, right, *, out):
        real(left, right, out=out)[5, 3] += 1

    def lacks(*_, **__):
        raise RuntimeError("not implemented")

    for found in (wrong, lacks):
        device_products.has_byte_products.cache_clear()
        monkeypatch.setattr(torch, "_int_mm", found)
        assert not device_products.has_byte_products(device)
        values = torch.randn(400_000)
        live = LiveElements(values, (400_000,), whole((400_000,)))
        assert on_device([live]) == digests([live])
    device_products.has_byte_products.cache_clear()


def test_a_device_is_made_ready_before_its_first_digest() -> None:
    live_digest.digest_every_way(torch.device("cpu"))
    assert torch.cuda.is_initialized() or live_digest.prepared() is None
