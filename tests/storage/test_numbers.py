"""Elements as float64 and back."""

from __future__ import annotations

import numpy as np
import pytest

from ucp.errors import Unsupported
from ucp.storage.numbers import as_bytes, as_numbers


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
