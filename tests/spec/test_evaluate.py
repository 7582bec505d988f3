"""The meaning of expressions: laws on random ones, and the hard cases by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given

from tests.property import cut, generators, ids, law
from tests.spec import naive
from tests.spec.naive import expression
from ucp.errors import SpecError
from ucp.geometry import concat, intersect, runs
from ucp.spec.evaluate import Cutting, Shard, coordinates, shape_of, shard
from ucp.spec.grammar import cuts


def shards_of(case: naive.Case) -> list[tuple[dict[str, int], Shard]]:
    cutting = Cutting(case.mesh, case.rule, case.widths)
    return [(at, shard(expression(case.text), case.sizes, cutting, at)) for at in naive.everywhere(case)]


@given(generators)
@law(150)
def test_a_shard_is_what_numpy_takes(rng: np.random.Generator) -> None:
    case = naive.Maker(rng).case()
    tensor = ids(naive.shape(case))
    for at, found in shards_of(case):
        expected = naive.taken(case, at, tensor)
        assert found.shape == expected.shape
        assert found.logical == tensor.shape
        (buffer,) = cut(found.blocks, [expected.size], tensor)
        np.testing.assert_array_equal(buffer, expected.ravel())


@given(generators)
@law(100)
def test_coordinates_cover_and_copies_are_where_the_expression_says(rng: np.random.Generator) -> None:
    """Every element is held; by as many ranks as the mesh dimensions that don't cut it have, if nothing repeats."""
    case = naive.Maker(rng).case()
    counted: Counter[int] = Counter()
    tensor = ids(naive.shape(case))
    for at, found in shards_of(case):
        counted.update(naive.taken(case, at, tensor).ravel().tolist())
        assert int(found.blocks.counts.sum()) == int(np.prod(found.shape))
    assert set(counted) == set(tensor.ravel().tolist())
    tree = expression(case.text)
    copying = [c for c in cuts(tree) if sum(case.widths.get(naive.spell(c), (-1,))) != naive.length(c, case.sizes)]
    if "|" not in case.text and not [c for c in copying if naive.spell(c) in case.widths]:
        over = {m for c in cuts(tree) for m in c.over}
        times = int(np.prod([n for m, n in case.mesh.items() if m not in over], dtype=int))
        assert set(counted.values()) == {times}


@given(generators)
@law(80)
def test_recut_is_cutting_the_whole(rng: np.random.Generator) -> None:
    """From any cut of a tensor to any other cut of the same one, without making the whole in between."""
    a = naive.Maker(rng).case()
    tensor = ids(naive.shape(a))
    text, sizes = a.text, dict(a.sizes)
    if rng.random() < 0.5:  # straight through one dimension, whatever it is made of
        sizes |= {f"d{k}": n for k, n in enumerate(tensor.shape)}
        chosen = int(rng.integers(tensor.ndim))
        text = " ".join(f"d{k}/tp" if k == chosen else f"d{k}" for k in range(tensor.ndim))
    other = naive.Case(text, sizes, {m: int(rng.integers(1, 4)) for m in a.mesh}, "balanced", {})
    parts, lengths = [], []
    for k, (_, found) in enumerate(shards_of(a)):
        parts.append(found.blocks.in_buffer(k))
        lengths.append(int(np.prod(found.shape)))
    source = concat(parts, tensor.ndim)
    buffers = cut(source, lengths, tensor)
    for at, target in shards_of(other):
        out = np.full(int(np.prod(target.shape)), -1)
        copies = intersect(source, target.blocks)
        for which, read, write, length in zip(*runs(copies), strict=True):
            owner = int(source.buffers[copies.source[which]])
            out[write : write + length] = buffers[owner][read : read + length]
        np.testing.assert_array_equal(out, naive.taken(other, at, tensor).ravel())


def held(text: str, sizes: dict[str, int], mesh: dict[str, int], **more: object) -> list[list[int]]:
    """For every rank the elements that it holds of a one-dimensional tensor."""
    tree = expression(text)
    cutting = Cutting(mesh, **more)  # type: ignore[arg-type]
    tensor = ids(shape_of(tree, sizes, cutting.padded))
    out = []
    for at in coordinates(tree, mesh):
        found = shard(tree, sizes, cutting, at)
        (buffer,) = cut(found.blocks, [int(np.prod(found.shape))], tensor)
        out.append(buffer.tolist())
    return out


def test_contiguous_and_interleaved_heads() -> None:
    sizes = {"heads": 2, "d": 2}
    assert held("(heads/tp 3 d)", sizes, {"tp": 2}) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert held("(3 heads/tp d)", sizes, {"tp": 2}) == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


def test_grouped_query_segments() -> None:
    sizes = {"kv": 2, "q": 2}
    assert held("(kv/tp q | kv/tp | kv/tp)", sizes, {"tp": 2}) == [[0, 1, 4, 6], [2, 3, 5, 7]]
    assert held("(kv/tp (q | 1 | 1))", sizes, {"tp": 2}) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert held("(kv (q | 1 | 1))/tp", sizes, {"tp": 4}) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_uneven_cuts() -> None:
    assert held("(kv/tp 2)", {"kv": 3}, {"tp": 2}, rule="balanced") == [[0, 1, 2, 3], [4, 5]]
    assert held("kv/tp", {"kv": 5}, {"tp": 4}, rule="ceil") == [[0, 1], [2, 3], [4], []]
    assert held("kv/tp", {"kv": 5}, {"tp": 2}, widths={"kv/tp": (1, 4)}) == [[0], [1, 2, 3, 4]]
    assert held("kv/tp", {"kv": 2}, {"tp": 2}, widths={"kv/tp": (2, 2)}) == [[0, 1], [0, 1]]
    assert held("kv/tp", {"kv": 2}, {"tp": 3}, widths={"kv/tp": (0, 2, 0)}) == [[], [0, 1], []]


def test_the_first_mesh_dimension_is_the_outermost() -> None:
    assert held("e/ep/tp", {"e": 4}, {"ep": 2, "tp": 2}) == [[0], [1], [2], [3]]
    assert held("e/tp/ep", {"e": 4}, {"ep": 2, "tp": 2}) == [[0], [2], [1], [3]]


def test_copies_only_where_repeat_is_written() -> None:
    assert held("(repeat(kv)/tp 2)", {"kv": 2}, {"tp": 4}) == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert held("repeat(kv)/tp", {"kv": 4}, {"tp": 2}) == [[0, 1], [2, 3]]
    with pytest.raises(SpecError, match=r"test:1:2: 'kv/tp' cuts 2 in equal parts for 4 ranks of tp, which don't"):
        held("(kv/tp 2)", {"kv": 2}, {"tp": 4})
    with pytest.raises(SpecError, match=r"'repeat\(kv\)/tp' puts 2 on 3 ranks; for copies, 3 must be a multiple"):
        held("(repeat(kv)/tp 2)", {"kv": 2}, {"tp": 3})


def test_padding_is_what_no_block_covers() -> None:
    tree = expression("(vocab+pad)/tp hidden")
    sizes, cutting = {"vocab": 5, "hidden": 2}, Cutting({"tp": 2}, padded={"vocab": 8})
    first, second = (shard(tree, sizes, cutting, {"tp": r}) for r in range(2))
    assert (first.shape, second.shape) == ((4, 2), (4, 2))
    assert first.logical == second.logical == (5, 2)
    (buffer,) = cut(second.blocks, [8], ids((5, 2)))
    assert buffer.tolist() == [8, 9, -1, -1, -1, -1, -1, -1]
    kept = shard(tree, sizes, cutting, {"tp": 1}, keep_padding=True)
    (buffer,) = cut(kept.blocks, [8], ids((8, 2)))
    assert buffer.tolist() == list(range(8, 16))
    assert len(shard(tree, sizes, Cutting({"tp": 2}, padded={"vocab": 12}), {"tp": 1}).blocks) == 0


def test_no_dimensions() -> None:
    found = shard(expression("scalar"), {}, Cutting({"tp": 2}), {"tp": 1})
    assert (found.shape, len(found.blocks)) == ((), 1)


def test_average_has_a_coordinate_for_every_copy() -> None:
    tree = expression("average(hidden, tp)")
    assert coordinates(tree, {"tp": 3, "dp": 2}) == [{"tp": 0}, {"tp": 1}, {"tp": 2}]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"widths": {"a/tp": (1, 1)}}, r"test:1:1: 'a/tp' has widths \[1, 1\]; they must add up to 4, or each be 4"),
        ({"widths": {"a/tp": (5, -1)}}, "they must add up to 4"),
        ({"widths": {"a/tp": (4,)}}, "'a/tp' has 1 widths for 2 ranks"),
    ],
)
def test_widths_that_are_none(more: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        held("a/tp", {"a": 4}, {"tp": 2}, **more)


def test_sizes_and_shapes_that_are_wrong() -> None:
    with pytest.raises(SpecError, match=r"test:1:2: no size is known for 'haeds'; did you mean 'heads'\?"):
        held("(haeds/tp 2)", {"heads": 4}, {"tp": 2})
    with pytest.raises(SpecError, match="'vocab' is 5; padding can't make it 4"):
        held("(vocab+pad)/tp", {"vocab": 5}, {"tp": 2}, padded={"vocab": 4})
    with pytest.raises(ValueError, match="coordinate tp=2 is outside of the mesh, which has 2 ranks there"):
        shard(expression("a/tp"), {"a": 4}, Cutting({"tp": 2}), {"tp": 2})
    with pytest.raises(ValueError, match="unknown rule 'evenly' of cutting; use exact, balanced, ceil"):
        shard(expression("a/tp"), {"a": 4}, Cutting({"tp": 2}, "evenly"), {"tp": 1})
