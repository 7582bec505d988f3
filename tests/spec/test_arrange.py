"""Fragments of a tensor carried into another arrangement of its axes: numpy, which knows nothing of blocks, decides."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.property import box_splits, flat_splits, generators, law
from tests.spec.test_foreign_names import moved
from ucp.errors import Position
from ucp.geometry import Blocks, box, concat, flat_ranges
from ucp.spec import grammar
from ucp.spec.arrange import View, carry, piece, segments
from ucp.spec.grammar import Expression
from ucp.spec.positions import SpecText

SIZES = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 1}


def parse(text: str) -> Expression:
    return grammar.parse(SpecText(text, Position("test", 1, 1)))


def arrangement(rng: np.random.Generator, names: list[str]) -> tuple[str, list[str]]:
    """These axes in some order, in some products: the expression and the order."""
    order = [str(n) for n in rng.permutation(names)]
    borders = sorted({0, len(order), *rng.integers(0, len(order), 2).tolist()})
    return " ".join(f"({' '.join(order[x:y])})" for x, y in itertools.pairwise(borders)), order


def fragments(rng: np.random.Generator, shape: tuple[int, ...]) -> Blocks:
    """The tensor in pieces of some kind, all in the row-major order of one buffer."""
    n = int(np.prod(shape))
    if rng.integers(2):
        ends = flat_splits(rng, n, int(rng.integers(1, 6)))
        return flat_ranges(shape, ends[:-1], ends[1:], ends[:-1])
    strides = np.cumprod([1, *shape[:0:-1]])[::-1]
    boxes = box_splits(rng, shape, int(rng.integers(0, 6)))
    return concat([box(o, s, int(np.dot(o, strides)), strides.tolist()) for o, s in boxes], len(shape))


@given(generators)
@law(80)
def test_fragments_of_any_kind_keep_their_elements_in_another_arrangement(rng: np.random.Generator) -> None:
    names = [str(n) for n in rng.permutation(list(SIZES))[: rng.integers(1, 6)]]
    (source, source_order), (target, target_order) = arrangement(rng, names), arrangement(rng, names)
    here, there = (View(parse(text), SIZES, 0, {}) for text in (source, target))
    tensor = np.arange(int(np.prod(here.shape))).reshape(here.shape)
    blocks, which = carry(fragments(rng, here.shape), here, there)
    apart = tensor.reshape([SIZES[n] for n in source_order])
    expected = apart.transpose([source_order.index(n) for n in target_order]).reshape(there.shape)
    np.testing.assert_array_equal(moved(blocks, tensor.reshape(-1), there.shape), expected)
    assert len(which) == len(blocks)
    again, _ = carry(blocks, there, here)
    np.testing.assert_array_equal(moved(again, tensor.reshape(-1), here.shape), tensor)


# An expression, the axes of which one index is taken, and each segment of the tensor as numpy takes it out.
SEGMENTS: list[tuple[str, dict[str, int], list[Callable[[NDArray], NDArray]]]] = [
    ("a (b | c b) d", {}, [lambda t: t[:, :3], lambda t: t[:, 3:]]),
    ("a (b | c | b) d", {"a": 1}, [lambda t: t[1, :3], lambda t: t[1, 3:7], lambda t: t[1, 7:]]),
    (
        "(b (c | 1 | a)) d",
        {},
        [
            lambda t: t.reshape(3, 7, 5)[:, :4].reshape(12, 5),
            lambda t: t.reshape(3, 7, 5)[:, 4],
            lambda t: t.reshape(3, 7, 5)[:, 5:].reshape(6, 5),
        ],
    ),
    (
        "d ((a | b) c)",
        {},
        [lambda t: t[:, :8], lambda t: t[:, 8:]],
    ),
    ("(c d) (b | a)", {"d": 3}, [lambda t: t[3::5, :3], lambda t: t[3::5, 3:]]),
    ("(d c) b", {"d": 3}, [lambda t: t[12:16]]),
]


@given(generators, st.sampled_from(SEGMENTS))
@law(60)
def test_segments_and_stacks_are_taken_out_of_fragments_and_put_back(rng: np.random.Generator, case: Any) -> None:
    text, fixed, takes = case
    expression = parse(text)
    shape = View(expression, SIZES, 0, {}).shape
    tensor = np.arange(int(np.prod(shape))).reshape(shape)
    pieces = fragments(rng, shape)
    assert segments(expression) == len(takes)
    for k, take in enumerate(takes):
        there, here = View(expression, SIZES, k, fixed), View(piece(expression, k, fixed), SIZES, 0, {})
        out, _ = carry(pieces, there, here)
        np.testing.assert_array_equal(moved(out, tensor.reshape(-1), here.shape), take(tensor))
        back, _ = carry(out, here, there)
        kept = np.isin(tensor, take(tensor))
        np.testing.assert_array_equal(moved(back, tensor.reshape(-1), shape), np.where(kept, tensor, -1))


def test_what_is_left_of_a_tensor() -> None:
    for text, segment, fixed, left in (
        ("experts/ep (ffn/tp | ffn/tp) hidden", 1, {"experts": 3}, "ffn/tp hidden"),
        ("(experts ffn) hidden", 0, {"experts": 1}, "(ffn) hidden"),
        ("experts (kv | q)", None, {"experts": 0}, "(kv | q)"),
        ("(kv/tp (q | 1 | 1) d) h", 1, {}, "(kv/tp 1 d) h"),
        ("experts hidden", 0, {"experts": 0, "hidden": 0}, "scalar"),
    ):
        assert str(piece(parse(text), segment, fixed)) == left
