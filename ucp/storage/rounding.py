"""Round floating-point elements to a narrower type as torch does on the CPU: to the nearest, ties to even.

It is used if a training run itself keeps rounded copies: the low-precision weights of a mixed-precision engine are its
rounded masters. Values beyond the type's range become infinite, and tiny ones become subnormal or zero. A NaN stays a
NaN. Its bits are those of torch's vectorised conversion (ATen/cpu/vec); other builds of torch may give others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDED = {
    ("float32", "bfloat16"),
    ("float32", "float16"),
    ("bfloat16", "float16"),
    ("float16", "bfloat16"),
}
"""(from, to): the conversions that `round_to` does."""


def round_to(values: NDArray[np.float32], target: str) -> NDArray[Any]:
    """float32 elements as elements of ``target``, 'bfloat16' (as uint16 bits) or 'float16'."""
    if target == "bfloat16":
        return _to_bfloat16(values)
    if target == "float16":
        return _to_float16(values)
    raise ValueError(f"cannot round to {target!r}; known are bfloat16 and float16")


def rounds_to(high: NDArray[Any], source: str, low: NDArray[Any], target: str) -> bool | None:
    """Whether masters (bits of ``source`` elements) round to these weights, bit for bit; None if that says nothing.

    All NaNs count as equal: their bits depend on the torch that rounded them.
    """
    if source == target:
        return bool(np.array_equal(high, low))
    if source != "float32" or target not in ("bfloat16", "float16"):
        return None
    found = round_to(high.view(np.float32), target).view(np.uint16)
    return bool(np.all((found == low) | np.isnan(high.view(np.float32))))


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    out = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    out[np.isnan(values)] = 0xFFFF
    return out


def _to_float16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        out = values.astype(np.float16)
    lost = np.isnan(values)
    if lost.any():
        bits = values[lost].view(np.uint32)
        sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
        payload = (bits >> np.uint32(13)) & np.uint32(0x3FF)
        out[lost] = (sign | np.uint32(0x7E00) | payload).astype(np.uint16).view(np.float16)
    return out
