"""Elements as numbers: which are not finite, and how much two sets of them differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ucp.geometry import Ints
from ucp.storage.dtypes import itemsize, numpy_dtype

# The bits of the exponent. If all of them are set, it is an infinity or not a number (IEEE 754, bfloat16, float8_e5m2).
_EXPONENT = {
    "float64": (np.uint64, 0x7FF0 << 48),
    "float32": (np.uint32, 0x7F80 << 16),
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
    "float8_e5m2": (np.uint8, 0x7C),
}
# These have no infinities and few patterns that are no numbers (OCP 8-bit floating point; the "fnuz" types).
_NAN = {
    "float8_e4m3fn": (0x7F, 0xFF),
    "float8_e4m3fnuz": (0x80,),
    "float8_e5m2fnuz": (0x80,),
    "float8_e8m0fnu": (0xFF,),
}


def not_finite(raw: NDArray[np.uint8], dtype: str) -> Ints:
    """Positions of the elements that are infinite or not a number. dtype: a floating-point type."""
    if dtype in _NAN:
        return np.flatnonzero(np.isin(raw, _NAN[dtype]))
    unsigned, exponent = _EXPONENT[dtype]
    mask = np.dtype(unsigned).type(exponent)
    return np.flatnonzero((raw.view(unsigned) & mask) == mask)


def as_numbers(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float64] | None:
    """The elements in double precision; None for types whose values are compared by their bits only."""
    if dtype.startswith(("float8", "complex")):
        return None
    with np.errstate(invalid="ignore"):  # a signalling not-a-number becomes a quiet one
        if dtype == "bfloat16":
            return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        return raw.view(numpy_dtype(dtype)).astype(np.float64)


@dataclass
class Distance:
    """How much two tensors differ, piece by piece.

    different: how many elements differ (in their bits, if the types are the same). first: position of the first of
    these. absolute, relative: the largest differences; relative ones to the larger of the two. unlike: for how many
    elements exactly one is a finite number. beyond: how many differ by more than the tolerance of `add`.
    """

    different: int = 0
    first: int | None = None
    absolute: float = 0.0
    relative: float = 0.0
    unlike: int = 0
    beyond: int = 0

    def add(
        self,
        at: int,
        a: NDArray[np.uint8],
        b: NDArray[np.uint8],
        types: tuple[str, str],
        tolerance: tuple[float, float],
    ) -> None:
        """Take the same elements of both, from position ``at`` on. tolerance: (absolute, relative), which allows a
        difference of ``absolute + relative * max(|a|, |b|)``."""
        same = types[0] == types[1]
        if same and np.array_equal(a, b):
            return
        x, y = as_numbers(a, types[0]), as_numbers(b, types[1])
        if same:
            width = itemsize(types[0])
            apart = np.any(a.reshape(-1, width) != b.reshape(-1, width), axis=1)
        elif x is None or y is None:
            apart = np.ones(len(a) // itemsize(types[0]), bool)
        else:
            apart = ~((x == y) | (np.isnan(x) & np.isnan(y)))
        count = int(apart.sum())
        if not count:
            return
        if self.first is None:
            self.first = at + int(np.argmax(apart))
        self.different += count
        if x is None or y is None:
            self.beyond += count
            return
        x, y = x[apart], y[apart]
        finite = np.isfinite(x) & np.isfinite(y)
        unlike = int((~finite & ~((x == y) | (np.isnan(x) & np.isnan(y)))).sum())
        self.unlike += unlike
        x, y = x[finite], y[finite]
        distance, scale = np.abs(x - y), np.maximum(np.abs(x), np.abs(y))
        self.beyond += unlike + int((distance > tolerance[0] + tolerance[1] * scale).sum())
        if not any(tolerance):
            self.beyond += count - unlike - int((distance > 0).sum())  # other bits of the same value
        if len(distance):
            self.absolute = max(self.absolute, float(distance.max()))
            with np.errstate(invalid="ignore", divide="ignore"):
                self.relative = max(self.relative, float(np.nan_to_num(distance / scale).max()))
