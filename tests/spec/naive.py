"""The meaning of expressions, spelled out index by index, and random expressions to compare it on.

Nothing here uses `ucp.spec.evaluate`: an axis is a Python list of indices, and numpy takes them out of the tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ucp.errors import Position
from ucp.spec.grammar import Axis, AxisName, Cut, Expression, Number, Product, Sum, parse, spell
from ucp.spec.positions import SpecText


def expression(text: str) -> Expression:
    return parse(SpecText(text, Position("test", 1, 1)))


@dataclass(frozen=True)
class Case:
    """An expression with sizes for its names, a mesh, a rule, and widths that go before the rule."""

    text: str
    sizes: Mapping[str, int]
    mesh: Mapping[str, int]
    rule: str
    widths: Mapping[str, tuple[int, ...]]


def even(n: int, m: int, r: int, rule: str) -> list[int]:
    """The indices of part r of m, dealt out one by one."""
    if rule == "ceil":
        width = 0
        while width * m < n:
            width += 1
        return [i for i in range(n) if i // max(width, 1) == r]
    counts = [0] * m
    for i in range(n):
        counts[i % m] += 1
    return list(range(sum(counts[:r]), sum(counts[: r + 1])))


def length(axis: Axis, sizes: Mapping[str, int]) -> int:
    if isinstance(axis, Number):
        return axis.value
    if isinstance(axis, Product):
        return int(np.prod([length(f, sizes) for f in axis.factors]))
    if isinstance(axis, Sum):
        return sum(length(s, sizes) for s in axis.segments)
    if isinstance(axis, Cut):
        return length(axis.axis, sizes)
    return sizes[axis.name]


def indices(axis: Axis, case: Case, at: Mapping[str, int]) -> list[int]:
    """The indices of the whole axis that the rank at this coordinate holds, in its order."""
    if isinstance(axis, (Number, AxisName)):
        return list(range(length(axis, case.sizes)))
    if isinstance(axis, Product):
        held = [0]
        for factor in axis.factors:
            inner = indices(factor, case, at)
            held = [i * length(factor, case.sizes) + j for i in held for j in inner]
        return held
    if isinstance(axis, Sum):
        out, begin = [], 0
        for segment in axis.segments:
            out += [begin + i for i in indices(segment, case, at)]
            begin += length(segment, case.sizes)
        return out
    assert isinstance(axis, Cut)
    whole = list(range(length(axis.axis, case.sizes)))
    widths = case.widths.get(spell(axis))
    ranks = [case.mesh.get(m, 1) for m in axis.over]
    here = [at.get(m, 0) for m in axis.over]
    if widths is not None:
        r = int(np.ravel_multi_index(here, ranks))
        if sum(widths) != len(whole):
            return whole
        return whole[sum(widths[:r]) : sum(widths[: r + 1])]
    for m, r in zip(ranks, here, strict=True):
        whole = [whole[i] for i in even(len(whole), m, r, case.rule)]
    return whole


def taken(case: Case, at: Mapping[str, int], tensor: NDArray) -> NDArray:
    """The shard at this coordinate, by numpy's own indexing."""
    dims = expression(case.text).dims
    return tensor[np.ix_(*(np.array(indices(d, case, at), np.int64) for d in dims))] if dims else tensor


def shape(case: Case) -> tuple[int, ...]:
    return tuple(length(d, case.sizes) for d in expression(case.text).dims)


def everywhere(case: Case) -> list[dict[str, int]]:
    names = sorted(case.mesh)
    return [dict(zip(names, at, strict=True)) for at in itertools.product(*(range(case.mesh[m]) for m in names))]


class Maker:
    """Random cases."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.sizes: dict[str, int] = {}

    def axis(self, free: set[str], depth: int) -> tuple[str, set[str]]:
        """A random axis that is cut over some of the free mesh dimensions, and which those are."""
        kind = self.rng.random()
        if depth == 0 or kind < 0.4:
            if self.rng.random() < 0.15:
                return str(self.rng.integers(1, 4)), set()
            name = self.name()
            return self.cut(name, free)
        if kind < 0.55:
            inner, _ = self.axis(set(), depth - 1)
            return (
                self.cut(inner if inner.startswith("(") else f"({inner})", free)
                if inner[0] not in "0123456789"
                else (inner, set())
            )
        if kind < 0.8:
            used: set[str] = set()
            parts = []
            for _ in range(int(self.rng.integers(2, 4))):
                text, more = self.axis(free - used, depth - 1)
                parts.append(text)
                used |= more
            return f"({' '.join(parts)})", used
        segments = [self.axis(free, depth - 1) for _ in range(int(self.rng.integers(2, 4)))]
        return f"({' | '.join(s for s, _ in segments)})", set().union(*(u for _, u in segments))

    def name(self) -> str:
        if self.sizes and self.rng.random() < 0.4:
            return str(self.rng.choice(sorted(self.sizes)))
        name = f"a{len(self.sizes)}"
        self.sizes[name] = int(self.rng.choice([1, 2, 3, 4, 5, 6]))
        return name

    def cut(self, axis: str, free: set[str]) -> tuple[str, set[str]]:
        over = [m for m in sorted(free) if self.rng.random() < 0.5]
        self.rng.shuffle(over)
        return "/".join([axis, *over]), set(over)

    def case(self) -> Case:
        mesh = {m: int(self.rng.integers(1, 4)) for m in ("tp", "ep")}
        while True:
            self.sizes = {}
            free, dims = set(mesh), []
            for _ in range(int(self.rng.integers(1, 4))):
                text, used = self.axis(free, 2)
                dims.append(text)
                free -= used
            made = Case(" ".join(dims), self.sizes, mesh, str(self.rng.choice(["balanced", "ceil"])), {})
            if np.prod(shape(made), dtype=float) <= 4000:
                break
        widths = {}
        for dim in expression(made.text).dims:
            for axis in _walk(dim):
                if isinstance(axis, Cut) and self.rng.random() < 0.4:
                    n, m = length(axis, made.sizes), int(np.prod([mesh[d] for d in axis.over]))
                    borders = np.sort(np.concatenate([[0, n], self.rng.integers(0, n + 1, m - 1)]))
                    widths[spell(axis)] = (n,) * m if self.rng.random() < 0.2 else tuple(np.diff(borders).tolist())
        return Case(made.text, made.sizes, mesh, made.rule, widths)


def _walk(axis: Axis) -> list[Axis]:
    out = [axis]
    for child in axis.factors if isinstance(axis, Product) else axis.segments if isinstance(axis, Sum) else ():
        out += _walk(child)
    return out
