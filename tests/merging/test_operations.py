"""Every operation against its formula, written apart in float64 over whole tensors; parts of any size give the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch

from ucp.errors import BadArgument
from ucp.merging import selection, weights
from ucp.merging.methods import MethodOptions, Sources, interpolated, operations
from ucp.merging.operations import Combination, Whole
from ucp.storage import numbers
from ucp.storage.numbers import Numbers

SIZE = 5003


def drawn(seed: int, count: int = 4, size: int = SIZE) -> list[Numbers]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=size).astype(np.float32).astype(np.float64) for _ in range(count)]


def applied(operation: Combination, tensors: Sequence[Numbers], cut: int) -> Numbers:
    """The operation's result, part by part of ``cut`` elements. It may overwrite its parts, so it gets copies."""
    size = len(tensors[0])
    whole = Whole("w:param", size, tuple("abcdefgh"[: len(tensors)]))

    def parts(sources: Sequence[int]) -> Iterator[tuple[int, list[Numbers]]]:
        for first in range(0, size, 1000):
            yield first, [tensors[k][first : first + 1000] for k in sources]

    found = operation.survey(whole, parts)
    out = [
        operation.combine(whole, found, at, [tensors[k][at : at + cut].copy() for k in operation.sources])
        for at in range(0, size, cut)
    ]
    return np.concatenate(out)


def linear(x: list[Numbers]) -> Numbers:
    return (1.0 * x[0] + 2.0 * x[1] + 3.0 * x[2] + 0.5 * x[3]) / 6.5


def slerp(x: list[Numbers]) -> Numbers:
    a, b = x[0], x[1]
    theta = math.acos(float(a @ b) / math.sqrt(float(a @ a)) / math.sqrt(float(b @ b)))
    return math.sin(0.7 * theta) / math.sin(theta) * a + math.sin(0.3 * theta) / math.sin(theta) * b


def ties(x: list[Numbers]) -> Numbers:
    base, rest, w = x[0], x[1:], (0.5, 0.3, 0.2)
    kept = []
    for each in rest:
        d = each - base
        order = np.argsort(-np.abs(d), kind="stable")[: math.floor(0.4 * SIZE)]
        trimmed = np.zeros(SIZE)
        trimmed[order] = d[order]
        kept.append(trimmed)
    weighted = [wi * d for wi, d in zip(w, kept, strict=True)]
    sign = np.where(weighted[0] + weighted[1] + weighted[2] >= 0, 1.0, -1.0)
    total, divisor = np.zeros(SIZE), np.zeros(SIZE)
    for wi, term in zip(w, weighted, strict=True):
        total += np.where(np.sign(term) == sign, term, 0)
        divisor += np.where(np.sign(term) == sign, wi, 0)
    return base + 1.0 * (total / np.where(divisor == 0, 1.0, divisor))


FORMULAS: dict[str, tuple[str, Sources, MethodOptions, Callable[[list[Numbers]], Numbers]]] = {
    "linear": ("linear", Sources((0, 1, 2, 3)), MethodOptions(weights=(1.0, 2.0, 3.0, 0.5)), linear),
    "linear, as given": (
        "linear",
        Sources((0, 1)),
        MethodOptions(weights=(0.7, -0.2), normalize=False),
        lambda x: 0.7 * x[0] + -0.2 * x[1],
    ),
    "lerp": ("lerp", Sources((0, 1)), MethodOptions(t=(0.3,)), lambda x: x[0] + 0.3 * (x[1] - x[0])),
    "slerp": ("slerp", Sources((0, 1)), MethodOptions(t=(0.3,)), slerp),
    "task": (
        "task",
        Sources((1, 2), 0),
        MethodOptions(weights=(0.5, 0.5)),
        lambda x: x[0] + (0.5 * (x[1] - x[0]) + 0.5 * (x[2] - x[0])),
    ),
    "ties": ("ties", Sources((1, 2, 3), 0), MethodOptions(weights=(0.5, 0.3, 0.2), density=0.4), ties),
    "ema": (
        "ema",
        Sources((0, 1, 2, 3)),
        MethodOptions(beta=0.5),
        lambda x: x[0] / 8 + x[1] / 8 + x[2] / 4 + x[3] / 2,
    ),
    "lawa": (
        "lawa",
        Sources((0, 1, 2, 3)),
        MethodOptions(window=2, stride=2),
        lambda x: (x[1] + x[3]) / 2,
    ),
    "mwa": (
        "mwa",
        Sources((0, 1, 2)),
        MethodOptions(metrics=(2.0, 1.0, 0.5), penalty=1.0),
        lambda x: (x[0] + 2 * x[1] + 4 * x[2]) / 7,
    ),
}


@pytest.mark.parametrize("which", FORMULAS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_formula(which: str, seed: int) -> None:
    method, sources, options, formula = FORMULAS[which]
    x = drawn(seed)
    operation = operations(method, sources, options)(None)
    found = applied(operation, x, SIZE)
    assert np.array_equal(numbers.as_bytes(found, "float32"), numbers.as_bytes(formula(x), "float32"))
    for cut in (1, 997, 4096):
        assert np.array_equal(applied(operation, x, cut), found)


@pytest.mark.parametrize("which", FORMULAS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spreads_where_an_operation_says_so(which: str, value: float) -> None:
    """Then a merge looks at its result alone. The survey is of finite tensors: it looks at sources itself."""
    method, sources, options, _ = FORMULAS[which]
    operation = operations(method, sources, options)(None)
    x = drawn(0)
    whole = Whole("w:param", SIZE, tuple("abcd"))
    found = operation.survey(whole, lambda wanted: iter([(0, [x[k] for k in wanted])]))
    hidden = False
    for number, source in enumerate(operation.sources):
        for at in range(0, SIZE, 97):
            parts = [x[k].copy() for k in operation.sources]
            parts[number][at] = value
            with np.errstate(invalid="ignore"):
                seen = not np.isfinite(operation.combine(whole, found, 0, parts)[at])
            assert seen or not operation.spreads, source
            hidden |= not seen
    assert operation.spreads or hidden or math.isinf(value)  # or its sources need not be looked at


def test_slerp_of_parallel_tensors_is_lerp() -> None:
    a = drawn(3)[0]
    found = applied(operations("slerp", Sources((0, 1)), MethodOptions(t=(0.25,)))(None), [a, 2 * a], SIZE)
    assert np.array_equal(found, 0.75 * a + 0.25 * (2 * a))


def test_masks_choose_what_of_a_task_vector_counts() -> None:
    x = drawn(4)
    masks = [(drawn(5)[k] > 0).astype(np.float64) for k in range(2)]
    found = applied(operations("task", Sources((1, 2), 0, (3, 4)), MethodOptions())(None), [*x[:3], *masks], 701)
    assert np.array_equal(found, x[0] + (masks[0] * (x[1] - x[0]) + masks[1] * (x[2] - x[0])))


def test_dare_keeps_its_share_and_the_mean() -> None:
    base, other = np.zeros(200_000), np.ones(200_000)
    operation = operations("dare", Sources((1,), 0), MethodOptions(density=0.3, seed=7))(None)
    found = applied(operation, [base, other], 4099)
    kept = found != 0
    assert np.array_equal(found[kept], np.full(kept.sum(), 1 / 0.3))
    assert abs(kept.mean() - 0.3) < 4 * math.sqrt(0.21 / 200_000)
    again = operations("dare", Sources((1,), 0), MethodOptions(density=0.3, seed=8))(None)
    both = (kept & (applied(again, [base, other], 4099) != 0)).mean()
    assert abs(both - 0.09) < 4 * math.sqrt(0.09 * 0.91 / 200_000), "another seed's draws are independent"
    pairs = (kept[1:] & kept[:-1]).mean()
    assert abs(pairs - 0.09) < 4 * math.sqrt(0.09 * 0.91 / 200_000), "neighbours' draws are independent"


@pytest.mark.parametrize("count", [0, 1, 17, 400, 999, 1000, 1001])
def test_the_largest_by_magnitude_of_equal_ones_the_first(count: int) -> None:
    rng = np.random.default_rng(count)
    d = rng.integers(-5, 6, 1000).astype(np.float64) * 0.37
    found = selection.largest(lambda: ((k, d[k : k + 128]) for k in range(0, 1000, 128)), count)
    kept = np.concatenate([found.kept(d[k : k + 77], k) for k in range(0, 1000, 77)])
    expected = np.zeros(1000, bool)
    expected[np.argsort(-np.abs(d), kind="stable")[:count]] = True
    assert np.array_equal(kept, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_are_rounded_once(dtype: str) -> None:
    rng = np.random.default_rng(0)
    half = rng.normal(size=20_000).astype(np.float32)
    ties_ = torch.from_numpy(half).to(getattr(torch, dtype)).double().numpy()
    up = np.nextafter(ties_.astype(np.float64) * (1 + 2.0**-9), np.inf)
    values = np.concatenate([rng.normal(size=20_000) * 10.0 ** rng.integers(-45, 39, 20_000), ties_, up, [0.0, -0.0]])
    raw = numbers.as_bytes(values, dtype)
    exact = numbers.as_numbers(raw, dtype)
    below, above = (
        numbers.as_numbers(torch.nextafter(t, torch.full_like(t, way)).view(torch.uint8).numpy(), dtype)
        for t in [torch.from_numpy(raw.copy()).view(getattr(torch, dtype))]
        for way in (-math.inf, math.inf)
    )
    finite = np.isfinite(exact)
    error = np.abs(exact - values)[finite]
    assert (error <= np.abs(below - values)[finite]).all()
    assert (error <= np.abs(above - values)[finite]).all()
    assert np.array_equal(np.signbit(exact), np.signbit(values))


def test_closed_weights() -> None:
    assert weights.metric_weights((2.0, 1.0, 0.5), 2.0) == pytest.approx((1 / 21, 4 / 21, 16 / 21))
    assert weights.metric_weights((100, 200, 300), 1.0, "step") == pytest.approx((1 / 6, 2 / 6, 3 / 6))
    assert weights.metric_weights((5.0, 1.0), 0.0) == (0.5, 0.5)
    assert weights.metric_weights((5.0, 1.0), 1e6) == pytest.approx((0.0, 1.0))
    assert weights.ema(4, 0.5) == (0.125, 0.125, 0.25, 0.5)
    assert weights.lawa(5, 2, 3) == (0.0, 1.0, 0.0, 0.0, 1.0)


def test_a_share_over_the_layers() -> None:
    assert [interpolated((0.0, 1.0, 0.0), k / 4) for k in range(5)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert interpolated((0.0, 1.0), None) == 0.5


@pytest.mark.parametrize(
    ("method", "sources", "options", "message"),
    [
        ("mix", Sources((0, 1)), MethodOptions(), "no method 'mix'; known are linear"),
        ("linear", Sources((0, 1)), MethodOptions(weights=(1.0, -1.0)), "sum to 0"),
        ("linear", Sources((0, 1)), MethodOptions(weights=(1.0,)), "1 weights were given for 2"),
        ("linear", Sources((0, 1)), MethodOptions(t=(0.5,)), "takes no 't'; it takes weights, normalize"),
        ("slerp", Sources((0, 1, 2)), MethodOptions(t=(0.5,)), "between 2 checkpoints, found 3"),
        ("lerp", Sources((0, 1)), MethodOptions(), "needs 't'"),
        ("ties", Sources((0, 1)), MethodOptions(density=0.5), "needs a base"),
        ("ties", Sources((1, 2), 0), MethodOptions(density=0.0), "above 0 and at most 1, found 0"),
        ("mwa", Sources((0, 1)), MethodOptions(metrics=(1.0, -1.0), penalty=1.0), "metric 2 is -1"),
        ("lawa", Sources((0, 1)), MethodOptions(window=3), "needs 3 of them, found 2"),
    ],
)
def test_refusals(method: str, sources: Sources, options: MethodOptions, message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        operations(method, sources, options)(None)
