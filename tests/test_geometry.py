"""The laws of the geometry, against plain numpy indexing."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import property as p
from ucp.geometry import (
    Blocks,
    Copies,
    box,
    collapse,
    concat,
    coverage_fault,
    coverage_holds,
    dense_strides,
    empty,
    extents,
    flat_ranges,
    intersect,
    intersect_grouped,
    numel,
    packed,
    region,
    row_major,
    runs,
    span,
    take_elements,
    whole,
)
from ucp.geometry.copies import candidates, pair_count
from ucp.parallel.zero import ceil_partition, flat_partition


def same(a: Blocks, b: Blocks) -> bool:
    return all(
        getattr(a, f).shape == getattr(b, f).shape and bool(np.all(getattr(a, f) == getattr(b, f)))
        for f in ("offsets", "sizes", "starts", "strides", "buffers")
    )


@given(p.with_empty)
@p.law()
def test_numel_and_row_major_are_numpys(shape: tuple[int, ...]) -> None:
    tensor = np.zeros(shape, np.int8)
    assert numel(shape) == tensor.size
    if tensor.size:
        at = p.positions(np.array(shape), 0, np.array(row_major(shape)))
        assert np.array_equal(at, p.ids(shape))


# ---- one set of blocks


def positions_of(blocks: Blocks, k: int) -> np.ndarray:
    """Where every element of one block lies in its buffer, in the box's row-major order."""
    return p.positions(blocks.sizes[k], int(blocks.starts[k]), blocks.strides[k]).reshape(-1)


def elements_of(blocks: Blocks) -> list[tuple[int, int, tuple[int, ...]]]:
    """(buffer, position in it, index in the tensor) of every element, block after block, in row-major order."""
    out = []
    for k in range(len(blocks)):
        index = [tuple((blocks.offsets[k] + inside).tolist()) for inside in np.ndindex(*blocks.sizes[k].tolist())]
        out += [(int(blocks.buffers[k]), a, i) for a, i in zip(positions_of(blocks, k).tolist(), index, strict=True)]
    return out


@given(p.shapes, p.generators)
@p.law()
def test_taking_elements_is_cutting_the_list_of_them(shape, rng) -> None:
    blocks, _ = p.partitions(rng, shape)
    every = elements_of(blocks)
    bounds = np.sort(rng.integers(-2, len(every) + 3, int(rng.integers(2, 6)))).tolist()
    for first, last in itertools.pairwise(bounds):
        assert sorted(elements_of(take_elements(blocks, first, last))) == sorted(every[max(first, 0) : max(last, 0)])


@given(p.shapes, p.generators)
@p.law()
def test_extents_and_spans_are_the_first_and_last_positions(shape, rng) -> None:
    blocks, _ = p.partitions(rng, shape)
    flipped = Blocks(blocks.offsets, blocks.sizes, blocks.starts + 100_000, -blocks.strides, blocks.buffers)
    for some in (blocks, flipped):
        first, ends = extents(some)
        for k in range(len(some)):
            at = positions_of(some, k)
            assert (first[k], ends[k]) == (at.min(), at.max() + 1)
    for k in range(len(blocks)):
        at = positions_of(blocks, k)
        assert span(blocks.sizes[k].tolist(), blocks.strides[k].tolist()) == at.max() - at.min() + 1
    assert span((2, 0), (1, 1)) == 0


@given(p.shapes, p.generators)
@p.law()
def test_packed_blocks_lie_one_after_the_other(shape, rng) -> None:
    blocks, _ = p.partitions(rng, shape)
    tight = packed(blocks)
    assert [at for _, at, _ in elements_of(tight)] == list(range(numel(shape)))
    assert [index for *_, index in elements_of(tight)] == [index for *_, index in elements_of(blocks)]
    assert [row_major(sizes) for sizes in blocks.sizes.tolist()] == list(
        map(tuple, dense_strides(blocks.sizes).tolist())
    )


# ---- flat ranges


@given(p.with_empty, p.generators, st.integers(1, 9))
@p.law(100)
def test_flat_ranges_hold_exactly_the_range_once(shape, rng, count) -> None:
    n = numel(shape)
    ends = np.sort(rng.integers(0, n + 1, (count, 2)), axis=1)
    first, last = ends[:, 0], ends[:, 1]
    starts, buffers = rng.integers(0, 1000, count), rng.permutation(count) + 10
    blocks = flat_ranges(shape, first, last, starts, buffers)
    assert blocks.ndim == len(shape)
    assert np.all(blocks.counts > 0)
    parts = p.held(blocks, shape)
    for i in range(count):
        mine = [k for k in range(len(blocks)) if blocks.buffers[k] == buffers[i]]
        assert len(mine) <= max(2 * len(shape) - 1, 1)
        elements = np.concatenate([parts[k][0] for k in mine]) if mine else np.zeros(0, np.int64)
        where = np.concatenate([parts[k][1] for k in mine]) if mine else np.zeros(0, np.int64)
        assert np.array_equal(np.sort(elements), np.arange(first[i], last[i]))
        assert np.array_equal(where - starts[i], elements - first[i])


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 1), (5, 1), (1, 5), (3, 4), (2, 3, 5), (2, 1, 3), (2, 2, 2, 3)])
def test_every_flat_range_of_small_tensors(shape) -> None:
    n = numel(shape)
    pairs = [(a, b) for a in range(n + 1) for b in range(a, n + 1)]
    first, last = np.array(pairs).T
    blocks = flat_ranges(shape, first, last, np.zeros(len(pairs), np.int64), np.arange(len(pairs)))
    per_range = np.bincount(blocks.buffers, minlength=len(pairs))
    assert per_range.max() <= max(2 * len(shape) - 1, 1)
    seen = [np.zeros(n, int) for _ in pairs]
    for k, (elements, where) in enumerate(p.held(blocks, shape)):
        i = int(blocks.buffers[k])
        seen[i][elements] += 1
        assert np.array_equal(where, elements - first[i])
    for (a, b), times in zip(pairs, seen, strict=True):
        assert np.array_equal(times, (np.arange(n) >= a) & (np.arange(n) < b))


def test_a_flat_range_may_need_2d_minus_1_boxes() -> None:
    assert len(flat_ranges((4, 4, 4), [1], [63], [0])) == 5


def test_flat_ranges_of_a_tensor_without_elements_are_none() -> None:
    for shape in [(0,), (3, 0), (0, 3), (2, 0, 4)]:
        blocks = flat_ranges(shape, [0, 0], [0, 0], [0, 5])
        assert len(blocks) == 0
        assert blocks.ndim == len(shape)


# ---- blocks by hand


@given(p.shapes, st.integers(0, 50), st.integers(0, 5))
@p.law()
def test_whole_is_the_tensor_in_row_major_order(shape, start, buffer) -> None:
    blocks = whole(shape, start, buffer)
    ((elements, where),) = p.held(blocks, shape)
    assert np.array_equal(where, elements + start)
    assert np.array_equal(elements, np.arange(numel(shape)))
    assert blocks.buffers.tolist() == [buffer]


def test_whole_of_no_elements_is_empty() -> None:
    assert len(whole((3, 0))) == 0
    assert whole((3, 0)).ndim == 2


def test_box_lies_densely_unless_strides_say_otherwise() -> None:
    dense = box((1, 2), (2, 3), start=10, buffer=4)
    ((elements, where),) = p.held(dense, (4, 6))
    assert elements.tolist() == [8, 9, 10, 14, 15, 16]
    assert where.tolist() == [10, 11, 12, 13, 14, 15]
    transposed = box((1, 2), (2, 3), strides=(1, 2))
    assert p.held(transposed, (4, 6))[0][1].tolist() == [0, 2, 4, 1, 3, 5]


@given(p.shapes, p.generators)
@p.law(40)
def test_take_in_buffer_and_concat(shape, rng) -> None:
    blocks, _ = p.partitions(rng, shape)
    index = rng.permutation(len(blocks))
    taken, parts = p.held(blocks.take(index), shape), p.held(blocks, shape)
    assert all(np.array_equal(taken[k], parts[i]) for k, i in enumerate(index))
    mask = rng.random(len(blocks)) < 0.5
    both = concat([blocks.take(mask), empty(len(shape)), blocks.take(~mask)], len(shape))
    assert same(both, blocks.take(np.concatenate([np.flatnonzero(mask), np.flatnonzero(~mask)])))
    shifted = blocks.in_buffer(7, 100)
    assert set(shifted.buffers.tolist()) == {7}
    for (e, w), (e2, w2) in zip(parts, p.held(shifted, shape), strict=True):
        assert np.array_equal(e, e2)
        assert np.array_equal(w + 100, w2)


def test_concat_of_nothing_keeps_the_dimensions() -> None:
    assert concat([], 3).ndim == 3
    assert concat([empty(2), empty(2)], 2).ndim == 2


# ---- regions


@given(p.with_empty, st.data())
@p.law(80)
def test_region_is_numpys_slicing(shape, data) -> None:
    ends = st.one_of(st.none(), st.integers(-15, 15))
    slices = [slice(data.draw(ends), data.draw(ends)) for _ in shape[: data.draw(st.integers(0, len(shape)))]]
    offsets, size = region(shape, slices)
    expected = p.ids(shape)[tuple(slices)]
    assert size == expected.shape
    if expected.size:
        assert np.array_equal(p.ids(shape)[p.inside(np.array(offsets), np.array(size))], expected)


def test_region_of_nothing_said_is_everything() -> None:
    assert region((3, 4), None) == ((0, 0), (3, 4))
    assert region((), ()) == ((), ())


def test_region_refuses_steps_and_too_many_slices() -> None:
    with pytest.raises(ValueError, match="slice 1 has step 2"):
        region((3, 4), [slice(None), slice(0, 4, 2)])
    with pytest.raises(ValueError, match="step -1"):
        region((3,), [slice(None, None, -1)])
    with pytest.raises(ValueError, match="2 slices, but the tensor has 1"):
        region((3,), [slice(None), slice(None)])


# ---- coverage


@given(p.shapes, p.generators)
@p.law(80)
def test_exact_covers_are_accepted_and_planted_faults_found(shape, rng) -> None:
    blocks, _ = p.partitions(rng, shape)
    n, k = numel(shape), int(rng.integers(len(blocks)))
    assert coverage_fault(shape, blocks) is None
    assert coverage_fault(shape, blocks.take(rng.permutation(len(blocks)))) is None

    others = np.arange(len(blocks)) != k
    lost = int(np.prod(blocks.sizes[k]))
    assert str(coverage_fault(shape, blocks.take(others))) == f"{lost} of {n} elements are missing"

    twice = blocks.take(np.append(np.arange(len(blocks)), k))
    assert str(coverage_fault(shape, twice)) == f"{lost} elements are held more than once"

    if not shape:
        return
    axis = int(rng.integers(len(shape)))
    for fault in (-1, 1):
        # One block, moved by one: it overlaps a neighbour or leaves the tensor, even though the count is right.
        offsets = blocks.offsets.copy()
        offsets[k, axis] += fault
        gap = coverage_fault(shape, Blocks(offsets, blocks.sizes, blocks.starts, blocks.strides, blocks.buffers))
        low, high = offsets[k, axis], offsets[k, axis] + blocks.sizes[k, axis]
        outside = low < 0 or high > shape[axis]
        assert str(gap) == "a fragment lies outside the tensor" if outside else "held more than once" in str(gap)
        assert gap is not None
        assert gap.kind == ("outside" if outside else "overlap")


def test_no_blocks_cover_only_a_tensor_without_elements() -> None:
    assert coverage_fault((0, 4), empty(2)) is None
    assert str(coverage_fault((2, 2), empty(2))) == "4 of 4 elements are missing"
    assert str(coverage_fault((), empty(0))) == "1 of 1 elements are missing"
    assert coverage_fault((), whole(())) is None


def test_boxes_that_lie_about_themselves_are_outside() -> None:
    """A damaged file can claim anything: negative sizes whose product is positive, sums that overflow."""
    top = np.iinfo(np.int64).max
    for offsets, size in [((2, 2), (-1, -4)), ((top, 0), (2, 2)), ((top - 1, 0), (top, 1)), ((0, 0), (top, top))]:
        assert str(coverage_fault((2, 2), box(offsets, size, strides=(1, 1)))) == "a fragment lies outside the tensor"


# ---- intersection


@given(p.shapes, p.generators)
@p.law(120)
def test_any_source_to_any_target_equals_the_direct_cut(shape, rng) -> None:
    source, source_lengths = p.partitions(rng, shape)
    target, target_lengths = p.partitions(rng, shape)
    tensor = p.ids(shape)
    buffers = p.cut(source, source_lengths, tensor)
    copies = intersect(source, target)
    assert int(copies.counts.sum()) == numel(shape)
    written = [np.stack([np.full(write.shape, target.buffers[j]), write]) for _, j, _, write in p.moved(copies)]
    assert np.unique(np.concatenate(written, axis=1), axis=1).shape[1] == numel(shape)
    expected = p.cut(target, target_lengths, tensor)
    for got, want in zip(p.copied(copies, source, target, buffers, target_lengths), expected, strict=True):
        assert np.array_equal(got, want)


@given(p.shapes, p.generators)
@p.law(60)
def test_cut_then_merge_is_the_identity(shape, rng) -> None:
    pieces, lengths = p.partitions(rng, shape)
    tensor = rng.integers(0, 1 << 40, shape)
    buffers = p.cut(pieces, lengths, tensor)
    merged = whole(shape)
    copies = intersect(pieces, merged)
    (out,) = p.copied(copies, pieces, merged, buffers, [numel(shape)])
    assert np.array_equal(out.reshape(shape), tensor)


@given(p.shapes.filter(len), p.generators)
@p.law(60)
def test_a_part_receives_what_both_hold_and_nothing_else(shape, rng) -> None:
    source, source_lengths = p.partitions(rng, shape)
    target, target_lengths = p.partitions(rng, shape)
    source = source.take(rng.random(len(source)) < 0.7)
    target = target.take(rng.random(len(target)) < 0.7)
    have = np.zeros(numel(shape), bool)
    for elements, _ in p.held(source, shape):
        have[elements] = True
    buffers = p.cut(source, source_lengths, p.ids(shape))
    copies = intersect(source, target)
    expected = p.cut(target, target_lengths, np.where(have.reshape(shape), p.ids(shape), p.HOLE))
    for got, want in zip(p.copied(copies, source, target, buffers, target_lengths), expected, strict=True):
        assert np.array_equal(got, want)


def test_blocks_without_elements_are_never_copied() -> None:
    hollow = box((1, 1), (0, 2))
    full = whole((3, 4))
    for a, b in [(hollow, full), (full, hollow), (hollow, hollow)]:
        assert len(intersect(a, b)) == 0
    mixed = concat([hollow, full], 2)
    copies = intersect(mixed, mixed)
    assert copies.source.tolist() == copies.target.tolist() == [1]


def test_scalars() -> None:
    copies = intersect(concat([whole((), 3), whole((), 4)], 0), whole((), 5))
    assert copies.source.tolist() == [0, 1]
    assert copies.source_starts.tolist() == [3, 4]
    assert copies.target_starts.tolist() == [5, 5]
    assert copies.counts.tolist() == [1, 1]


@given(p.generators, st.integers(0, 40), st.integers(0, 40), st.sampled_from([4, 20, 200]))
@p.law(100)
def test_candidates_are_all_overlapping_pairs_once(rng, many, more, span) -> None:
    a_lo, b_lo = rng.integers(0, span, many), rng.integers(0, span, more)
    # Some very long ones among short ones: what a running maximum would stumble over.
    a_hi = a_lo + np.where(rng.random(many) < 0.1, span, rng.integers(1, 6, many))
    b_hi = b_lo + np.where(rng.random(more) < 0.1, span, rng.integers(1, 6, more))
    i, j = candidates(a_lo, a_hi, b_lo, b_hi)
    brute = {(k, m) for k in range(many) for m in range(more) if a_lo[k] < b_hi[m] and b_lo[m] < a_hi[k]}
    assert len(i) == len(brute) == pair_count(a_lo, a_hi, b_lo, b_hi)
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == brute


@given(p.generators, st.sampled_from([(64, 64), (8, 16, 32), (2, 3000), (3000, 2), (4999,)]))
@p.law(12)
def test_many_blocks_agree_with_trying_all_pairs(rng, shape) -> None:
    """Enough blocks on both sides that the axis to prune on is chosen by counting."""
    source, _ = p.laid_out(rng, p.box_splits(rng, shape, 120))
    target, _ = p.laid_out(rng, p.box_splits(rng, shape, 90))
    lo = np.maximum(source.offsets[:, None], target.offsets[None])
    hi = np.minimum((source.offsets + source.sizes)[:, None], (target.offsets + target.sizes)[None])
    brute = np.argwhere(np.all(hi > lo, axis=2))
    copies = intersect(source, target)
    order = np.lexsort((copies.target, copies.source))
    assert np.array_equal(np.stack([copies.source, copies.target], axis=1)[order], brute)
    assert np.array_equal(copies.sizes[order], (hi - lo)[tuple(brute.T)])


@given(st.lists(p.shapes.filter(lambda s: len(s) == 2), min_size=1, max_size=6), p.generators, st.sampled_from([2, 60]))
@p.law(30)
def test_many_tensors_at_once_are_as_one_by_one(shapes, rng, cuts) -> None:
    """Tensors of few blocks and of many, of none, and of blocks that do not cover them."""
    sides = []
    for _ in range(2):
        split = [p.laid_out(rng, p.box_splits(rng, shape, cuts))[0] for shape in shapes]
        sides.append([b.take(rng.random(len(b)) < 0.9) for b in split])
    sources, targets = sides
    groups = [np.repeat(np.arange(len(shapes)), [len(b) for b in blocks]) for blocks in sides]
    source, target = (concat(blocks, 2) for blocks in sides)
    found = intersect_grouped(source, groups[0], target, groups[1])
    expected = []
    for k, (a, b) in enumerate(zip(sources, targets, strict=True)):
        copies = intersect(a, b)
        first = [int(np.searchsorted(group, k)) for group in groups]
        columns = (copies.source + first[0], copies.target + first[1], copies.source_starts, copies.target_starts)
        expected += zip(*(column.tolist() for column in columns), copies.sizes.tolist(), strict=True)
    columns = (found.source, found.target, found.source_starts, found.target_starts)
    assert sorted(zip(*(c.tolist() for c in columns), found.sizes.tolist(), strict=True)) == sorted(expected)
    whole_ones = [coverage_fault(shape, blocks) is None for shape, blocks in zip(shapes, sources, strict=True)]
    assert coverage_holds(shapes, source, groups[0]) == all(whole_ones)
    twice = concat([source, source.take(np.array([0]))], 2) if len(source) else source
    again = np.append(groups[0], groups[0][:1])
    order = np.argsort(again, kind="stable")
    assert not len(source) or not coverage_holds(shapes, twice.take(order), again[order])


@given(p.shapes, p.generators)
@p.law(100)
def test_ranges_that_do_not_follow_one_another_are_no_coverage(shape, rng) -> None:
    """Even where they hold as many elements as the tensor has: one range twice, in place of another as long."""
    n = numel(shape)
    cuts = np.arange(0, n + 1, max(n // 4, 1))
    cuts[-1:] = n
    ranges = [flat_ranges(shape, [low], [high], [low]) for low, high in itertools.pairwise(cuts.tolist())]
    order = rng.permutation(len(ranges)).tolist()
    shuffled = concat([ranges[k] for k in order], len(shape))
    assert n == 0 or coverage_holds([shape], shuffled, np.zeros(len(shuffled), np.int64))
    alike = [k for k in range(1, len(ranges)) if ranges[k].elements == ranges[0].elements]
    if n == 0 or not alike:
        return
    wrong = concat([ranges[0] if k == alike[-1] else ranges[k] for k in order], len(shape))
    assert not coverage_holds([shape], wrong, np.zeros(len(wrong), np.int64))
    assert coverage_fault(shape, wrong) is not None
    both = concat([whole(shape), wrong], len(shape))  # beside a tensor that is whole, it is still found
    assert not coverage_holds([shape, shape], both, np.repeat([0, 1], [1, len(wrong)]))


# ---- collapse and runs


def expanded(copies: Copies) -> np.ndarray:
    """Every element copied: (which copy, position read, position written), from the copies as they are, sorted."""
    rows = [np.stack([np.full(read.shape, i), read, write]) for i, (_, _, read, write) in enumerate(p.moved(copies))]
    return in_order(np.concatenate(rows, axis=1))


def in_order(columns: np.ndarray) -> np.ndarray:
    return columns[:, np.lexsort(columns[::-1])]


@given(p.shapes, p.generators)
@p.law(100)
def test_collapsed_copies_and_runs_move_the_same_elements(shape, rng) -> None:
    source, _ = p.partitions(rng, shape)
    target, _ = p.partitions(rng, shape)
    copies = intersect(source, target)
    collapsed = collapse(copies)
    truth = expanded(copies)
    assert np.array_equal(expanded(collapsed), truth)
    assert np.all(collapsed.source_strides[:, -1] == 1)
    assert np.all(collapsed.target_strides[:, -1] == 1)

    which, read, write, length = runs(copies)
    spelled = [
        np.stack([np.full(n, w), np.arange(r, r + n), np.arange(t, t + n)])
        for w, r, t, n in zip(which, read, write, length, strict=True)
    ]
    assert np.array_equal(in_order(np.concatenate(spelled, axis=1)), truth)


@given(p.shapes, p.generators)
@p.law(80)
def test_runs_are_as_long_as_each_copy_allows(shape, rng) -> None:
    """A run takes in every dimension whose elements, or whose runs, lie one after the other on both sides. Two runs may
    still meet where a transposed box ends and the next begins; nobody looks for that."""
    source, _ = p.partitions(rng, shape)
    target, _ = p.partitions(rng, shape)
    copies = intersect(source, target)
    which, _, _, length = runs(copies)
    for copy, sizes in enumerate(copies.sizes.tolist()):
        strides = zip(copies.source_strides[copy].tolist(), copies.target_strides[copy].tolist(), strict=True)
        longest, left = 1, {both: n for n, both in zip(sizes, strides, strict=True) if n > 1}
        while (longest, longest) in left:
            longest *= left.pop((longest, longest))
        assert set(length[which == copy].tolist()) <= {longest}, copy


@given(p.shapes, p.generators, st.booleans())
@p.law(60)
def test_dense_to_dense_is_one_run(shape, rng, transposed) -> None:
    """The same dense order of dimensions on both sides, whichever it is."""
    order = [int(k) for k in rng.permutation(len(shape))] if transposed else list(range(len(shape)))
    inner = row_major([shape[k] for k in order])
    strides = [inner[order.index(k)] for k in range(len(shape))]
    a, b = box((0,) * len(shape), shape, 3, strides), box((0,) * len(shape), shape, 11, strides)
    assert [column.tolist() for column in runs(intersect(a, b))] == [[0], [3], [11], [numel(shape)]]


def test_whole_rows_of_a_wider_buffer_are_one_run_each() -> None:
    which, read, write, length = runs(intersect(box((0, 0), (3, 4), 0, (10, 1)), whole((3, 4))))
    assert (which.tolist(), read.tolist()) == ([0, 0, 0], [0, 10, 20])
    assert (write.tolist(), length.tolist()) == ([0, 4, 8], [4, 4, 4])


def test_collapse_orders_the_outer_dimensions_by_the_source() -> None:
    """So that reading the runs in order walks forward through a file, however the tensor lies in it."""
    for strides in [(1, 10), (40, 1, 4), (4, 40, 1), (2, 40, 12)]:
        size = (3,) * len(strides)
        c = collapse(intersect(box((0,) * len(size), size, 0, strides), whole(size)))
        steps = [int(s) for s, n in zip(c.source_strides[0], c.sizes[0], strict=True) if n > 1]
        assert steps == sorted(steps, reverse=True)
        _, read, _, _ = runs(intersect(box((0,) * len(size), size, 0, strides), whole(size)))
        assert np.all(np.diff(read) > 0)


# ---- size


@pytest.mark.parametrize(
    ("shape", "source", "target"),
    [
        ((8192, 8192), 4096, 8192),
        ((8192, 8192), 4095, 8191),
        ((4, 1 << 24), 4095, 8191),
        ((1 << 24, 4), 4095, 8191),
        ((1 << 26,), 4095, 8191),
    ],
)
def test_thousands_of_pieces_on_both_sides_take_a_moment(shape, source, target) -> None:
    """Work must follow the number of overlaps, not of pairs; the bound is some 20 times what it takes."""
    old, new = flat_partition(shape, 0, -(-numel(shape) // source)), ceil_partition(shape, 0, target)
    began = time.process_time()
    copies = intersect(old, new)
    lengths = runs(copies)[3]
    took = time.process_time() - began
    assert int(lengths.sum()) == numel(shape)
    assert took < 0.5
