"""Elements as float64 and back. Tensors are combined in float64 and rounded once at the end."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucp.errors import Unsupported
from ucp.storage.dtypes import itemsize, numpy_dtype

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.float64]

FLOATS = ("float64", "float32", "float16", "bfloat16")
"""Element types that can be combined; the others are copied where all sources are equal."""


def as_numbers(raw: Bytes, dtype: str, out: Numbers | None = None) -> Numbers:
    """Elements of a floating type (or a mask's, of bool or a byte) as float64, exactly; in ``out`` if given."""
    if dtype == "bfloat16":
        given = np.left_shift(raw.view("<u2"), np.uint32(16), dtype=np.uint32).view(np.float32)
    else:
        given = raw.view(numpy_dtype(dtype))
    if out is None:
        return given.astype(np.float64)
    np.copyto(out, given)
    return out


def as_bytes(values: Numbers, dtype: str, out: Bytes | None = None) -> Bytes:
    """float64 elements rounded once to a floating type, to the nearest, ties to even, as bytes; ``out`` if given.

    Raises Unsupported for a type that is not one of `FLOATS`.
    """
    if dtype in FLOATS:
        out = np.empty(len(values) * itemsize(dtype), np.uint8) if out is None else out
        with rounding():
            round_into(values, dtype, out)
        return out
    raise Unsupported(f"{dtype} is no floating type that numbers are rounded to; use one of {', '.join(FLOATS)}")


def rounding() -> np.errstate:
    """Within it, numbers become infinite or zero without a warning."""
    return np.errstate(over="ignore", under="ignore")


def round_into(values: Numbers, dtype: str, out: Bytes) -> None:
    """As `as_bytes`, for a type of `FLOATS`, by a caller that is `rounding` for many short calls."""
    rounded = _bfloat16(values) if dtype == "bfloat16" else values
    np.copyto(out.view(numpy_dtype(dtype)), rounded, casting="same_kind")


def are_finite(raw: Bytes, dtype: str) -> bool:
    """Whether no element of a floating type is NaN or infinite."""
    if not len(raw):
        return True
    if itemsize(dtype) == 2:  # numpy has no quick arithmetic for these: their exponents are looked at
        return int(np.bitwise_and(raw.view("<u2"), 0x7FFF).max()) < (0x7F80 if dtype == "bfloat16" else 0x7C00)
    return bool(np.isfinite(raw.view(numpy_dtype(dtype))).all())


def _bfloat16(values: Numbers) -> NDArray[np.uint16]:
    """Round by way of float32, to odd there. Rounding to nearest twice would round some ties the wrong way."""
    single = values.astype(np.float32)
    bits: NDArray[Any] = single.view(np.uint32).copy()
    back = single.astype(np.float64)
    inexact = (back != values) & np.isfinite(values)
    beyond = inexact & (np.abs(back) > np.abs(values))
    bits[beyond] -= 1  # the neighbour towards zero
    bits[inexact] |= 1
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    out = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    out[np.isnan(values)] = 0x7FC0
    return out


def common_dtype(dtypes: list[str]) -> str:
    """The floating type that holds the values of all of these: the widest, float32 for two different half types."""
    found = set(dtypes)
    if len(found) == 1:
        return dtypes[0]
    return "float64" if "float64" in found else "float32"
