"""ZeRO's cuts, against flattening, padding and chunking as DeepSpeed does it, and against DeepSpeed's own functions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import property as p
from ucp.geometry import Blocks, intersect, numel
from ucp.parallel.zero import (
    ALIGNMENT,
    alignment_paddings,
    ceil_partition,
    ceil_size,
    flat_offsets,
    flat_partition,
    own_ceil_partition,
    own_flat_partition,
    partition_size,
    round_robin,
    subgroups,
)

models = st.lists(p.shapes.filter(lambda s: numel(s) <= 600), min_size=1, max_size=7)
degrees = st.integers(1, 9)


def tensors(model: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Parameters whose elements are numbered through the whole model, from 1; 0 is padding."""
    out, at = [], 1
    for shape in model:
        out.append(torch.arange(at, at + numel(shape), dtype=torch.int64).reshape(shape))
        at += numel(shape)
    return out


# ---- the two rules as torch would do them


def stage12(params: list[torch.Tensor], dp: int, alignment_bytes: int = 0, itemsize: int = 2) -> list[torch.Tensor]:
    """runtime/zero/stage_1_and_2.py: parameters end to end, zeros up to a multiple of 2 * dp, equal chunks."""
    flat: list[torch.Tensor] = []
    for i, param in enumerate(params):
        flat.append(param.reshape(-1))
        if alignment_bytes and i < len(params) - 1:
            step = max(alignment_bytes // itemsize, 1)
            used = sum(len(t) for t in flat)
            flat.append(torch.zeros(-used % step, dtype=param.dtype))
    used = sum(len(t) for t in flat)
    flat.append(torch.zeros(-used % (2 * dp), dtype=torch.int64))
    return list(torch.cat(flat).chunk(dp)) if sum(len(t) for t in flat) else [torch.zeros(0)] * dp


def stage3(params: list[torch.Tensor], dp: int) -> list[torch.Tensor]:
    """runtime/zero/partition_parameters.py: every parameter padded to a multiple of dp and cut; pieces end to end."""
    cut = []
    for param in params:
        flat = param.reshape(-1)
        flat = torch.cat([flat, torch.zeros(-len(flat) % dp, dtype=flat.dtype)])
        cut.append(flat.reshape(dp, -1))
    return [torch.cat([pieces[rank] for pieces in cut]) for rank in range(dp)]


# ---- the same as blocks


def blocks12(model: list[tuple[int, ...]], dp: int, alignment_bytes: int = 0, itemsize: int = 2) -> list[Blocks]:
    sizes = [numel(shape) for shape in model]
    paddings = alignment_paddings(sizes, alignment_bytes, itemsize) if alignment_bytes else None
    offsets, total = flat_offsets(sizes, paddings)
    size = partition_size(total, dp)
    return [flat_partition(shape, offset, size) for shape, offset in zip(model, offsets, strict=True)]


def blocks3(model: list[tuple[int, ...]], dp: int) -> list[Blocks]:
    offsets, _ = flat_offsets([ceil_size(numel(shape), dp) for shape in model])
    return [ceil_partition(shape, offset, dp) for shape, offset in zip(model, offsets, strict=True)]


def filled(blocks: list[Blocks], params: list[torch.Tensor], lengths: list[int]) -> list[np.ndarray]:
    """The ranks' buffers as the blocks describe them, 0 where no block lies; no position is written twice."""
    out = [np.zeros(n, np.int64) for n in lengths]
    for held, param in zip(blocks, params, strict=True):
        values = param.numpy().ravel()
        for i, (elements, where) in enumerate(p.held(held, tuple(param.shape))):
            buffer = out[int(held.buffers[i])]
            assert not buffer[where].any()
            buffer[where] = values[elements]
    return out


def agree(got: list[np.ndarray], truth: list[torch.Tensor]) -> bool:
    return len(got) == len(truth) and all(np.array_equal(a, b.numpy()) for a, b in zip(got, truth, strict=True))


@given(models, degrees)
@p.law(80)
def test_stage_1_and_2_is_flatten_pad_chunk(model, dp) -> None:
    params = tensors(model)
    truth = stage12(params, dp)
    assert agree(filled(blocks12(model, dp), params, [len(t) for t in truth]), truth)
    total = sum(numel(shape) for shape in model)
    assert [len(t) for t in truth] == [partition_size(total, dp)] * dp


@given(models, degrees, st.sampled_from([2, 4, 8]))
@p.law(60)
def test_parameter_alignment_pads_between_parameters(model, dp, itemsize) -> None:
    params = tensors(model)
    truth = stage12(params, dp, 16, itemsize)
    assert agree(filled(blocks12(model, dp, 16, itemsize), params, [len(t) for t in truth]), truth)
    sizes = [numel(shape) for shape in model]
    offsets, _ = flat_offsets(sizes, alignment_paddings(sizes, 16, itemsize))
    assert all(offset * itemsize % 16 == 0 for offset in offsets)


@given(models, degrees)
@p.law(80)
def test_stage_3_is_pad_and_cut_each(model, dp) -> None:
    params = tensors(model)
    truth = stage3(params, dp)
    assert agree(filled(blocks3(model, dp), params, [len(t) for t in truth]), truth)
    assert [len(t) for t in truth] == [sum(ceil_size(numel(s), dp) for s in model)] * dp


@given(models, degrees, st.booleans())
@p.law(60)
def test_every_element_is_held_once(model, dp, flat) -> None:
    for shape, blocks in zip(model, blocks12(model, dp) if flat else blocks3(model, dp), strict=True):
        elements = np.concatenate([e for e, _ in p.held(blocks, shape)])
        assert np.array_equal(np.sort(elements), np.arange(numel(shape)))
        assert np.all((blocks.buffers >= 0) & (blocks.buffers < dp))


layouts = st.tuples(st.sampled_from([1, 2, 3]), degrees)


@given(models, layouts, layouts)
@p.law(120)
def test_any_layout_is_recut_into_any_other(model, old, new) -> None:
    """DeepSpeed's buffers of one layout, copied, are its buffers of the other."""
    params = tensors(model)

    def layout(stage: int, dp: int) -> tuple[list[Blocks], list[torch.Tensor]]:
        return (blocks3(model, dp), stage3(params, dp)) if stage == 3 else (blocks12(model, dp), stage12(params, dp))

    (sources, have), (targets, want) = layout(*old), layout(*new)
    out = [np.zeros(len(t), np.int64) for t in want]
    for source, target in zip(sources, targets, strict=True):
        copies = intersect(source, target)
        for i, j, read, write in p.moved(copies):
            out[int(target.buffers[j])][write] = have[int(source.buffers[i])].numpy()[read]
    assert agree(out, want)


def test_a_rank_may_hold_nothing() -> None:
    """Parameters smaller than the number of ranks: at stage 3 the last ranks' pieces are padding alone."""
    blocks = ceil_partition((5,), 7, 4)
    assert blocks.buffers.tolist() == [0, 1, 2]
    assert blocks.sizes.ravel().tolist() == [2, 2, 1]
    assert blocks.starts.tolist() == [7, 7, 7]
    assert ceil_partition((1,), 0, 8).buffers.tolist() == [0]
    assert ceil_partition((), 3, 8).starts.tolist() == [3]
    assert flat_partition((1,), 0, partition_size(1, 8)).buffers.tolist() == [0]
    assert partition_size(1, 8) == 2


@pytest.mark.parametrize("shape", [(), (1,), (5,), (7, 3), (2, 5, 4), (0, 3), (64,)])
@pytest.mark.parametrize("offset", [0, 7])
def test_one_ranks_part_is_what_the_cut_of_all_has_for_it(shape: tuple[int, ...], offset: int) -> None:
    for dp in (1, 2, 3, 8):
        size = partition_size(offset + numel(shape), dp)
        for rank in range(dp):
            for every, own in (
                (ceil_partition(shape, offset, dp), own_ceil_partition(shape, offset, dp, rank)),
                (flat_partition(shape, offset, size or 1), own_flat_partition(shape, offset, size or 1, rank)),
            ):
                here = every.take(every.buffers == rank).in_buffer(0)
                for name in ("offsets", "sizes", "starts", "strides", "buffers"):
                    assert np.array_equal(getattr(here, name), getattr(own, name)), (name, dp, rank)


def test_tensors_without_elements_lie_nowhere() -> None:
    assert len(flat_partition((0, 3), 4, 2)) == 0
    assert len(ceil_partition((3, 0), 4, 2)) == 0
    assert flat_partition((0, 3), 4, 2).ndim == ceil_partition((3, 0), 4, 2).ndim == 2


def test_partition_sizes_are_aligned() -> None:
    assert ALIGNMENT == 2
    assert [partition_size(n, 3) for n in (0, 1, 6, 7, 12, 13)] == [0, 2, 2, 4, 4, 6]


@given(st.integers(0, 30), degrees)
@p.law(60)
def test_round_robin_is_a_dealing_of_cards(count, dp) -> None:
    hands: list[list[int]] = [[] for _ in range(dp)]
    for i in range(count):
        hands[i % dp].append(i)
    assert round_robin(count, dp) == [i for hand in hands for i in hand]


def test_subgroups_close_with_the_parameter_that_fills_them() -> None:
    assert subgroups([4, 4, 4], None) == [[0, 1, 2]]
    assert subgroups([4, 4, 4], 12) == [[0, 1, 2]]
    assert subgroups([4, 4, 4], 11) == [[0, 1, 2]]
    assert subgroups([4, 4, 4], 8) == [[0, 1], [2]]
    assert subgroups([4, 4, 4], 5) == [[0, 1], [2]]
    assert subgroups([4, 4, 4], 4) == [[0], [1], [2]]
    assert subgroups([1, 9, 1, 1], 2) == [[0, 1], [2, 3]]
    assert subgroups([4, 0], 4) == [[0, 1]]
    assert subgroups([4, 0, 4], 4) == [[0], [1, 2]]


# ---- DeepSpeed's own functions


@pytest.fixture(scope="module")
def deepspeed_zero() -> SimpleNamespace:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.utils import align_dense_tensors
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return SimpleNamespace(
        align=align_dense_tensors,
        reorder=lambda params, dp: DeepSpeedZeroOptimizer._round_robin_reorder(None, params, dp)[0],
        subgroups=lambda params, limit: DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups(
            SimpleNamespace(sub_group_size=limit), params
        ),
    )


def test_against_deepspeeds_functions(deepspeed_zero: SimpleNamespace) -> None:
    """The order of round_robin_gradients, the aligned total, and the subgroups, as DeepSpeed itself computes them."""

    @given(models, degrees, st.one_of(st.none(), st.integers(1, 900)))
    @p.law(60)
    def check(model: list[tuple[int, ...]], dp: int, limit: int | None) -> None:
        params = tensors(model)
        order = round_robin(len(params), dp)
        assert [id(t) for t in deepspeed_zero.reorder(params, dp)] == [id(params[i]) for i in order]

        flat = torch.cat([t.reshape(-1) for t in deepspeed_zero.align([params[i] for i in order], ALIGNMENT * dp)])
        truth = list(flat.reshape(dp, -1))
        shapes = [model[i] for i in order]
        assert agree(filled(blocks12(shapes, dp), [params[i] for i in order], [len(t) for t in truth]), truth)

        pieces = [ceil_size(numel(shape), dp) for shape in model]
        parameters = [SimpleNamespace(partition_numel=lambda n=n: n) for n in pieces]
        index = {id(q): i for i, q in enumerate(parameters)}
        groups = [[index[id(q)] for q in group] for group in deepspeed_zero.subgroups(parameters, limit)]
        assert subgroups(pieces, limit) == groups

    check()
