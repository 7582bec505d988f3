"""Which elements of a difference count: the largest by magnitude, or random ones. This does not depend on chunks.

*Draws* are counter-based: element ``k`` of a tensor is kept if a hash of (seed, source, tensor's name, k) lies below
the density. The hash is SplitMix64's finaliser of a stream key plus k times the golden ratio's odd constant. So the
draws of a tensor are a sequence of which any part can be computed by itself.

*Magnitudes* are found by a radix selection on the bits of ``|d|`` as float64, which sort like the numbers. It is exact,
takes one pass over the tensor for each 16-bit digit, and does not hold the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from ucp.storage.numbers import Numbers

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_DIGIT = 16
_DIGITS = 1 << _DIGIT


def stream_key(seed: int, source: str, name: str) -> int:
    """The key of one tensor's draws. source: the checkpoint's name in the merge."""
    return xxhash.xxh3_64_intdigest(repr((seed, source, name)).encode())


def drawn(key: int, first: int, count: int, density: float) -> NDArray[np.bool_]:
    """Which of the elements ``[first, first + count)`` are kept, each with probability ``density``."""
    return uniform(key, first, count) < density


def normal(key: int, first: int, count: int) -> Numbers:
    """Draws from the normal distribution for the elements ``[first, first + count)``, by Box and Muller's method."""
    radius = np.sqrt(-2.0 * np.log1p(-uniform(key, 2 * first, 2 * count)[0::2]))
    return radius * np.cos(2.0 * np.pi * uniform(key, 2 * first, 2 * count)[1::2])


def uniform(key: int, first: int, count: int) -> Numbers:
    """Draws from [0, 1) for the elements ``[first, first + count)``."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (np.arange(first, first + count, dtype=np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Threshold:
    """Keeps the elements with magnitude above ``above``, and those equal to it up to index ``last_equal``."""

    above: float
    last_equal: int

    def kept(self, difference: Numbers, first: int) -> NDArray[np.bool_]:
        """Which elements of a part are kept. first: the index of its first element in the tensor."""
        size = np.abs(difference)
        indices = np.arange(first, first + len(difference))
        return (size > self.above) | ((size == self.above) & (indices <= self.last_equal))


NOTHING = Threshold(np.inf, -1)

Parts = Callable[[], Iterable[tuple[int, Numbers]]]
"""Gives the tensor once more: (index of the first element, differences) part by part, in order."""


def largest(parts: Parts, count: int) -> Threshold:
    """The threshold that keeps the ``count`` largest elements by magnitude. Among equal ones the first count."""
    if count < 1:
        return NOTHING
    prefix, left = 0, count
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        histogram = np.zeros(_DIGITS, np.int64)
        for _, difference in parts():
            bits = np.abs(difference).view(np.uint64)
            if shift + _DIGIT < 64:
                bits = bits[(bits >> np.uint64(shift + _DIGIT)) == np.uint64(prefix)]
            digits = (bits >> np.uint64(shift)) & np.uint64(_DIGITS - 1)
            histogram += np.bincount(digits.astype(np.int64), minlength=_DIGITS)
        at_least = np.cumsum(histogram[::-1])[::-1]  # elements with this digit or a larger one
        fitting = np.flatnonzero(at_least >= left)
        if not len(fitting):  # fewer elements than were asked for: all are kept
            return Threshold(-1.0, -1)
        digit = int(fitting[-1])
        left -= int(at_least[digit]) - int(histogram[digit])
        prefix = (prefix << _DIGIT) | digit
    above = float(np.array([prefix], np.uint64).view(np.float64)[0])
    for first, difference in parts():
        equal = np.flatnonzero(np.abs(difference) == above)
        if len(equal) >= left:
            return Threshold(above, first + int(equal[left - 1]))
        left -= len(equal)
    return Threshold(above, -1)
