"""Cuts solved from the shapes of shards: found again where they were made at random, refused where not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from tests.property import cut, generators, ids, law
from tests.spec import naive
from tests.spec.naive import expression
from ucp.errors import SpecError
from ucp.geometry import Shape
from ucp.spec.evaluate import shard
from ucp.spec.grammar import cuts
from ucp.spec.solve import Observed, solve_cuts


def only_partitions(case: naive.Case) -> naive.Case:
    """Without the widths of replicas, which a dimension of several cuts can't show."""
    tree = expression(case.text)
    lengths = {naive.spell(c): naive.length(c, case.sizes) for c in cuts(tree)}
    widths = {k: w for k, w in case.widths.items() if sum(w) == lengths[k]}
    return naive.Case(case.text, case.sizes, case.mesh, case.rule, widths)


@given(generators)
@law(120)
def test_cuts_are_found_from_shapes(rng: np.random.Generator) -> None:
    """A tensor of random axes, and one more for each of its cuts, as q, k, v and o show each other's."""
    case = only_partitions(naive.Maker(rng).case())
    tree = expression(case.text)
    sizes = dict(case.sizes)
    every = {"whole": case.text}
    for c in cuts(tree):
        every[naive.spell(c)] = naive.spell(c)
    observed = []
    for name, text in every.items():
        one = naive.Case(text, sizes, case.mesh, case.rule, case.widths)
        tensor = ids(naive.shape(one))
        shards = [(at, naive.taken(one, at, tensor).shape) for at in naive.everywhere(case)]
        observed.append(Observed(name, expression(text), shards))
    rng.shuffle(observed)  # type: ignore[arg-type]
    found = solve_cuts(observed, sizes, case.mesh)
    for name, text in every.items():
        one = naive.Case(text, sizes, case.mesh, case.rule, case.widths)
        tensor = ids(naive.shape(one))
        for at in naive.everywhere(case):
            held = shard(expression(text), sizes, found[name], at)
            expected = naive.taken(one, at, tensor)
            assert held.shape == expected.shape
            np.testing.assert_array_equal(cut(held.blocks, [expected.size], tensor)[0], expected.ravel())


SIZES = {"hidden": 6, "kv": 3, "q": 4, "d": 5, "ffn": 7, "vocab": 11}


def seen(name: str, text: str, *shapes: Shape, over: str = "tp") -> Observed:
    return Observed(name, expression(text), [({over: r}, shape) for r, shape in enumerate(shapes)])


def solved(*observed: Observed, ranks: int = 2, **more: object) -> dict[str, dict[str, tuple[int, ...]]]:
    found = solve_cuts(observed, SIZES, {"tp": ranks}, **more)  # type: ignore[arg-type]
    return {name: dict(c.widths) for name, c in found.items()}


def test_three_kv_heads_on_two_ranks() -> None:
    """As DeepSpeed's AutoTP deals them: 2 and 1, so the 12 query heads are cut 8 and 4."""
    found = solve_cuts(
        [
            seen("q", "(kv/tp q d) hidden", (40, 6), (20, 6)),
            seen("k", "(kv/tp d) hidden", (10, 6), (5, 6)),
            seen("o", "hidden (kv/tp q d)", (6, 40), (6, 20)),
        ],
        SIZES,
        {"tp": 2},
    )
    assert [c.widths for c in found.values()] == [{"kv/tp": (2, 1)}] * 3
    held = shard(expression("(kv/tp q d) hidden"), SIZES, found["q"], {"tp": 1})
    assert held.blocks.offsets.tolist() == [[40, 0]]


def test_replicas_are_each_parameters_own() -> None:
    found = solved(seen("a", "ffn/tp hidden", (4, 6), (3, 6)), seen("b", "ffn/tp", (7,), (7,)))
    assert found == {"a": {"ffn/tp": (4, 3)}, "b": {"ffn/tp": (7, 7)}}


def test_a_rank_may_hold_nothing() -> None:
    assert solved(seen("a", "ffn/tp hidden", (7, 6), (0, 6)))["a"] == {"ffn/tp": (7, 0)}
    alone = Observed("a", expression("ffn/tp"), [({"tp": 1}, (7,))])
    assert solved(alone)["a"] == {"ffn/tp": (0, 7)}


def test_one_parameter_shows_what_another_leaves_open() -> None:
    mixed = seen("mixed", "(kv/tp d | ffn/tp)", (14,), (8,))
    assert solved(mixed, seen("k", "kv/tp", (2,), (1,)))["mixed"] == {"kv/tp": (2, 1), "ffn/tp": (4, 3)}
    assert solved(mixed, known={"kv/tp": (2, 1)})["mixed"]["ffn/tp"] == (4, 3)
    with pytest.raises(SpecError, match="'mixed' leave open how kv/tp and ffn/tp are cut; no other parameter shows it"):
        solved(mixed)


def test_padding_is_the_width_found() -> None:
    found = solve_cuts([seen("e", "(vocab+pad)/tp hidden", (8, 6), (8, 6))], SIZES, {"tp": 2})
    assert found["e"].padded == {"vocab": 16}
    assert solve_cuts([seen("e", "(vocab+pad)/tp hidden", (11, 6), (11, 6))], SIZES, {"tp": 2})["e"].padded == {}
    assert solve_cuts([seen("e", "(vocab+pad) hidden", (12, 6), (12, 6))], SIZES, {"tp": 2})["e"].padded == {
        "vocab": 12
    }
    unclear = seen("e", "(vocab+pad)/tp hidden", (16, 6), (16, 6))
    with pytest.raises(
        SpecError, match="every rank holds 16 of 'e' where 'vocab' is 11: that may be copies with padding"
    ):
        solve_cuts([unclear], SIZES, {"tp": 2})
    assert solve_cuts([unclear], SIZES, {"tp": 2}, padded={"vocab": 32})["e"].widths == {"(vocab+pad)/tp": (16, 16)}


def test_copies_by_repeat() -> None:
    assert solved(seen("k", "(repeat(kv)/tp d)", *[(5,)] * 6), ranks=6)["k"] == {"repeat(kv)/tp": (1,) * 6}
    with pytest.raises(
        SpecError, match=r"'kv' is 3, but the shards of 'k' over tp hold 1 \+ 1 \+ 1 \+ 1 \+ 1 \+ 1 = 6"
    ):
        solved(seen("k", "(kv/tp d)", *[(5,)] * 6), ranks=6)


@pytest.mark.parametrize(
    ("observed", "message"),
    [
        (
            [seen("q", "(kv/tp q d)", (40,), (20,)), seen("k", "(kv/tp d)", (5,), (10,))],
            "test:1:2: 'kv/tp' is 2 wide on rank 0 in 'q', but 1 in 'k'; one axis has one cut",
        ),
        (
            [seen("q", "(kv/tp q d)", (30,), (30,))],
            "'q' has 30 in dimension 0 on tp rank 0, which is no multiple of 20",
        ),
        ([seen("q", "(kv/tp d)", (10,), (10,))], r"'kv' is 3, but the shards of 'q' over tp hold 2 \+ 2 = 4 of it"),
        ([seen("n", "hidden", (3,), (3,))], r"'hidden' is 6 \(hidden 6\), but 'n' has 3 in dimension 0 on tp rank 0"),
        ([seen("n", "hidden", (6, 1), (6, 1))], r"'hidden' has 1 dimensions, but 'n' has \[6, 1\] on tp rank 0"),
        ([seen("e", "(vocab+pad)/tp", (5,), (5,))], "'vocab' is 11, but 'e' has only 10 of it"),
        (
            [seen("e", "(vocab+pad)/tp", (8,), (8,)), seen("h", "(vocab+pad) hidden", (20, 6), (20, 6))],
            "'vocab' is 16 wide with its padding in 'e', but 20 in 'h' on tp rank 0",
        ),
        (
            [
                seen("k", "kv/tp", (2,), (1,)),
                seen("f", "ffn/tp", (4,), (3,)),
                seen("m", "(kv/tp | ffn/tp)", (5,), (5,)),
            ],
            r"'\(kv/tp \| ffn/tp\)' is 6 wide by the cuts that other parameters show, but 'm' has 5",
        ),
    ],
)
def test_shapes_that_contradict(observed: list[Observed], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        solve_cuts(observed, SIZES, {"tp": 2})


def test_a_whole_tensor_of_another_size() -> None:
    fused = Observed("qkv", expression("(kv/tp q d | kv/tp d | kv/tp d) hidden"), [({}, (80, 6))])
    with pytest.raises(SpecError, match=r"sums to 90 \(kv 3, q 4, d 5\), but 'qkv' has 80 in dimension 0"):
        solve_cuts([fused], SIZES, {})
