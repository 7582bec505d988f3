"""How the tensors of several sources become one: operations, each of which works on a part at a time, in float64.

An operation is an immutable description, the same for every tensor that it is used for. It may have to know something
about a whole tensor before any part can be combined (an angle, a threshold). `survey` finds this by streaming the
tensor. A part is then combined from the same part of each source alone, so the result does not depend on layouts or
chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ucp.errors import BadArgument
from ucp.merging import selection
from ucp.merging.selection import Threshold
from ucp.storage.numbers import Numbers

_PARALLEL = 0.9995
"""Cosine beyond which slerp is lerp: the angle is too small to divide by its sine."""
_NO_DIRECTION = 1e-8
"""Norm below which a tensor has no direction and is not normalised."""

Parts = Callable[[Sequence[int]], Iterable[tuple[int, list[Numbers]]]]
"""Streams the same parts of these sources: (index of the first element, their numbers), in order."""


@dataclass(frozen=True)
class Whole:
    """What an operation may know about its tensor: the name, the number of elements, and the sources' names."""

    name: str
    numel: int
    names: tuple[str, ...]


class Combination(Protocol):
    """One way to combine sources, which are given by their numbers."""

    @property
    def sources(self) -> tuple[int, ...]:
        """The sources that are read, in the order in which `combine` gets them."""
        ...

    @property
    def spreads(self) -> bool:
        """Whether NaN or infinity in any of these sources makes the same element of the result NaN or infinite. If so,
        it is enough to look at the result."""
        ...

    def survey(self, whole: Whole, parts: Parts) -> Any:
        """What `combine` has to know about the whole tensor; None for most operations."""
        ...

    def combine(self, whole: Whole, found: Any, first: int, parts: Sequence[Numbers]) -> Numbers:
        """A part of the result. found: what `survey` returned. first: the index of the part's first element. parts: the
        sources' numbers, which may be overwritten: the result may be one of them."""
        ...


@dataclass(frozen=True)
class Copied:
    """One source as it is, bit for bit."""

    source: int

    @property
    def sources(self) -> tuple[int, ...]:
        return (self.source,)

    @property
    def spreads(self) -> bool:
        return True

    def survey(self, whole: Whole, parts: Parts) -> None:
        return None

    def combine(self, whole: Whole, found: None, first: int, parts: Sequence[Numbers]) -> Numbers:
        return parts[0]


@dataclass(frozen=True)
class Linear:
    """``y = sum w_i x_i``, in the order of the terms. normalised: divided by ``sum w_i``. A source with weight 0 is not
    read."""

    terms: tuple[tuple[int, float], ...]
    normalised: bool = False

    @property
    def sources(self) -> tuple[int, ...]:
        return tuple(k for k, weight in self.terms if weight)

    @property
    def spreads(self) -> bool:
        return True

    def survey(self, whole: Whole, parts: Parts) -> None:
        return None

    def combine(self, whole: Whole, found: None, first: int, parts: Sequence[Numbers]) -> Numbers:
        weights, total = self._factors
        out = parts[0]
        for weight, part in zip(weights, parts, strict=True):
            if weight != 1.0:
                np.multiply(part, weight, out=part)
            if part is not out:
                np.add(out, part, out=out)
        if total == 1.0:
            return out
        if math.frexp(total)[0] == 0.5:  # a power of 2: its reciprocal is exact, and multiplying is faster
            return np.multiply(out, 1.0 / total, out=out)
        return np.divide(out, total, out=out)

    @cached_property
    def _factors(self) -> tuple[tuple[float, ...], float]:
        """The weights of the sources that are read, and what their sum is divided by."""
        weights = tuple(weight for _, weight in self.terms if weight)
        return weights, math.fsum(weight for _, weight in self.terms) if self.normalised else 1.0


@dataclass(frozen=True)
class Lerp:
    """``y = base + t (other - base)``."""

    base: int
    other: int
    t: float

    @property
    def sources(self) -> tuple[int, ...]:
        return self.base, self.other

    @property
    def spreads(self) -> bool:
        return True

    def survey(self, whole: Whole, parts: Parts) -> None:
        return None

    def combine(self, whole: Whole, found: None, first: int, parts: Sequence[Numbers]) -> Numbers:
        base, other = parts
        return base + self.t * (other - base)


@dataclass(frozen=True)
class Slerp:
    """``y = sin((1-t) theta)/sin theta a + sin(t theta)/sin theta b``: theta is the angle between the whole tensors.

    If they are almost parallel (a cosine beyond 0.9995), it is ``(1-t) a + t b``.
    """

    a: int
    b: int
    t: float

    @property
    def sources(self) -> tuple[int, ...]:
        return self.a, self.b

    @property
    def spreads(self) -> bool:
        return True

    def survey(self, whole: Whole, parts: Parts) -> tuple[float, float]:
        """The two factors."""
        sums: tuple[list[float], ...] = ([], [], [])
        for _, (a, b) in parts(self.sources):
            for out, (x, y) in zip(sums, ((a, a), (b, b), (a, b)), strict=True):
                out.append(float(np.sum(x * y)))
        norm_a, norm_b, product = math.sqrt(math.fsum(sums[0])), math.sqrt(math.fsum(sums[1])), math.fsum(sums[2])
        scale = (norm_a if norm_a > _NO_DIRECTION else 1.0) * (norm_b if norm_b > _NO_DIRECTION else 1.0)
        cosine = product / scale
        if abs(cosine) > _PARALLEL:
            return 1.0 - self.t, self.t
        theta = math.acos(cosine)
        return math.sin((1.0 - self.t) * theta) / math.sin(theta), math.sin(self.t * theta) / math.sin(theta)

    def combine(self, whole: Whole, found: tuple[float, float], first: int, parts: Sequence[Numbers]) -> Numbers:
        return found[0] * parts[0] + found[1] * parts[1]


@dataclass(frozen=True)
class Redrawn:
    """Normal draws with a source's own mean and standard deviation, as if the tensor were initialised anew."""

    source: int
    seed: int

    @property
    def sources(self) -> tuple[int, ...]:
        return (self.source,)

    @property
    def spreads(self) -> bool:
        return False

    def survey(self, whole: Whole, parts: Parts) -> tuple[float, float, int]:
        """The mean, the standard deviation, and the key of the draws."""
        sums: list[float] = []
        squares: list[float] = []
        for _, (x,) in parts(self.sources):
            sums.append(float(np.sum(x)))
            squares.append(float(np.sum(x * x)))
        count = max(whole.numel, 1)
        mean = math.fsum(sums) / count
        spread = math.sqrt(max(math.fsum(squares) / count - mean * mean, 0.0))
        return mean, spread, selection.stream_key(self.seed, whole.names[self.source], whole.name)

    def combine(self, whole: Whole, found: tuple[float, float, int], first: int, parts: Sequence[Numbers]) -> Numbers:
        mean, spread, key = found
        return mean + spread * selection.normal(key, first, len(parts[0]))


class Selector(Protocol):
    """Selects the elements of a source's difference from the base that count."""

    def survey(self, whole: Whole, source: int, parts: selection.Parts) -> Any: ...

    def select(self, whole: Whole, source: int, found: Any, first: int, difference: Numbers) -> Numbers: ...


@dataclass(frozen=True)
class Largest:
    """Keeps the ``floor(density numel)`` elements of largest magnitude, and sets the others to 0 (TIES' trimming)."""

    density: float

    def survey(self, whole: Whole, source: int, parts: selection.Parts) -> Threshold:
        return selection.largest(parts, math.floor(self.density * whole.numel))

    def select(self, whole: Whole, source: int, found: Threshold, first: int, difference: Numbers) -> Numbers:
        return np.where(found.kept(difference, first), difference, 0.0)


@dataclass(frozen=True)
class Drawn:
    """Keeps each element with probability ``density``, divided by it, and sets the others to 0 (DARE)."""

    density: float
    seed: int

    def survey(self, whole: Whole, source: int, parts: selection.Parts) -> int:
        return selection.stream_key(self.seed, whole.names[source], whole.name)

    def select(self, whole: Whole, source: int, found: int, first: int, difference: Numbers) -> Numbers:
        kept = selection.drawn(found, first, len(difference), self.density)
        return np.where(kept, difference / self.density, 0.0)


@dataclass(frozen=True)
class Differences:
    """``y = base + scale * combination of w_i d_i``, where ``d_i`` is what a selector leaves of ``x_i - base``.

    elected: only the terms with the sign of ``sum w_i d_i`` count (0 is positive), and their sum is divided by the sum
    of their weights (TIES). Otherwise the combination is the sum of all. normalised: divided by ``sum w_i``. masks: for
    each term, the source with its mask, by which the difference is multiplied.
    """

    base: int
    terms: tuple[tuple[int, float], ...]
    scale: float = 1.0
    selector: Selector | None = None
    elected: bool = False
    normalised: bool = False
    masks: tuple[int, ...] = ()

    @property
    def sources(self) -> tuple[int, ...]:
        return (self.base, *(k for k, _ in self.terms), *self.masks)

    @property
    def spreads(self) -> bool:
        return self.selector is None and not self.elected

    def survey(self, whole: Whole, parts: Parts) -> Mapping[int, Any]:
        if self.selector is None:
            return {}

        def differences(k: int) -> selection.Parts:
            return lambda: ((first, x - base) for first, (base, x) in parts((self.base, k)))

        return {k: self.selector.survey(whole, k, differences(k)) for k, _ in self.terms}

    def combine(self, whole: Whole, found: Mapping[int, Any], first: int, parts: Sequence[Numbers]) -> Numbers:
        base, count = parts[0], len(self.terms)
        weighted: list[Numbers] = []
        for number, ((k, weight), x) in enumerate(zip(self.terms, parts[1 : 1 + count], strict=True)):
            difference = x - base
            if self.selector is not None:
                difference = self.selector.select(whole, k, found[k], first, difference)
            if self.masks:
                difference *= parts[1 + count + number]
            weighted.append(weight * difference)
        total = sum(weighted[1:], weighted[0].copy())
        if self.elected:
            total = self._elected(weighted, total)
        elif self.normalised:
            total /= math.fsum(weight for _, weight in self.terms)
        return base + self.scale * total

    def _elected(self, weighted: Sequence[Numbers], total: Numbers) -> Numbers:
        """The sum of the terms with the majority's sign, divided by the sum of their weights (1 if there are none)."""
        positive: NDArray[np.bool_] = total >= 0
        out, divisor = np.zeros_like(total), np.zeros_like(total)
        for (_, weight), term in zip(self.terms, weighted, strict=True):
            agrees = np.where(positive, term > 0, term < 0)
            out += np.where(agrees, term, 0.0)
            divisor += np.where(agrees, weight, 0.0)
        divisor[divisor == 0] = 1.0
        return out / divisor


def check_density(density: float) -> float:
    """The density. Raises BadArgument if it is not above 0 and at most 1."""
    if not 0 < density <= 1:
        raise BadArgument(
            f"the density is the share of elements that are kept, above 0 and at most 1, found {density:g}"
        )
    return density
