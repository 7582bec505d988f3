"""Element types that hold all values of another, and the step from one to the other."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucp.catalog import LogicalTensor
from ucp.errors import Mismatch
from ucp.storage.dtypes import numpy_dtype

# (from, to): every value of the first type is also a value of the second.
EXACT = {
    ("bfloat16", "float32"),
    ("bfloat16", "float64"),
    ("float16", "float32"),
    ("float16", "float64"),
    ("float32", "float64"),
}


def check_exact(tensor: LogicalTensor, dtype: str) -> None:
    """Raise Mismatch unless elements of this dtype hold all of the tensor's values exactly."""
    if tensor.dtype != dtype and (tensor.dtype, dtype) not in EXACT:
        raise Mismatch(
            f"'{tensor.name}' ({tensor.state}) is {tensor.dtype} in the checkpoint and {dtype} in the target; that "
            "would lose bits, so it is not done: use the checkpoint's element type in the target"
        )


def widen(values: NDArray[np.generic], source: str, target: str) -> NDArray[np.generic]:
    """The same values in a wider element type. If the types are equal, the bits do not change."""
    if source == target:
        return values
    if source == "bfloat16":
        bits = values.astype(np.uint32)
        bits <<= np.uint32(16)
        values = bits.view(np.float32)
        if target == "float32":
            return values
    with np.errstate(invalid="ignore"):
        out = values.astype(numpy_dtype(target))
    odd = np.isnan(values)
    if odd.any():
        out[odd] = _nans(values[odd], out.dtype)
    return out


_FRACTION_BITS = {2: 10, 4: 23, 8: 52}  # by the bytes of numpy's own floating-point types


def _nans(values: NDArray[np.generic], dtype: np.dtype[Any]) -> NDArray[np.generic]:
    """These NaNs in the wider type. Sign and payload stay, so that they can be turned back into the same bits.

    A processor's own conversion may make a signalling NaN quiet.
    """
    narrow, wide = values.dtype.itemsize, dtype.itemsize
    bits = values.view(f"u{narrow}").astype(np.uint64)
    sign = bits >> np.uint64(8 * narrow - 1) << np.uint64(8 * wide - 1)
    fraction = bits & np.uint64((1 << _FRACTION_BITS[narrow]) - 1)
    exponent = np.uint64((1 << 8 * wide - 1) - (1 << _FRACTION_BITS[wide]))
    moved = fraction << np.uint64(_FRACTION_BITS[wide] - _FRACTION_BITS[narrow])
    return (sign | exponent | moved).astype(f"u{wide}").view(dtype)
