"""Elements as float64 and back."""

from __future__ import annotations

import numpy as np
import pytest

from ucp.errors import Unsupported
from ucp.storage.numbers import FLOATS, are_finite, as_bytes, as_numbers


def test_bfloat16_is_rounded_once() -> None:
    # Just above the middle between 1 and the next bfloat16: by way of float32 it would be the middle, and go to even.
    above = 1.0 + 2.0**-8 + 2.0**-40
    assert as_numbers(as_bytes(np.array([above, -above, 1.0 + 2.0**-8]), "bfloat16"), "bfloat16").tolist() == [
        1.0 + 2.0**-7,
        -1.0 - 2.0**-7,
        1.0,
    ]


def test_whole_numbers_are_none_of_the_types() -> None:
    with pytest.raises(Unsupported, match="int32 is no floating type"):
        as_bytes(np.zeros(1), "int32")


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_is_found(dtype: str) -> None:
    largest = {"float64": np.finfo(np.float64).max, "float32": np.finfo(np.float32).max, "float16": 65504.0}
    edge = [largest.get(dtype, 2.0**127 * (2 - 2.0**-7)), 0.0, 2.0**-24]
    assert are_finite(as_bytes(np.array([*edge, *(-x for x in edge)]), dtype), dtype)
    assert are_finite(np.empty(0, np.uint8), dtype)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        for at in range(3):
            given = np.array([1.0, -1.0, -0.0])
            given[at] = value
            assert not are_finite(as_bytes(given, dtype), dtype)
