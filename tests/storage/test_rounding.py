"""Rounding to bfloat16 and float16 gives torch's bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ucp.storage.rounding import round_to

# fmt: off
EDGES = np.array([
    0, 1, 0x007FFFFF, 0x00800000, 0x33000000, 0x33000001, 0x38800000, 0x387FC000, 0x387FE000, 0x477FEFFF, 0x477FF000,
    0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FA00000, 0x7FC00000, 0x7FFFFFFF, 0x3F808000, 0x3F818000, 0x3F808001,
], np.uint32)
# fmt: on


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bits_are_those_of_torch(dtype: str) -> None:
    top = np.arange(1 << 16, dtype=np.uint32) << 16  # every sign, exponent and upper mantissa ...
    low = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)  # ... and ties
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 21, dtype=np.uint32)
    bits = np.concatenate([EDGES, EDGES | np.uint32(1 << 31), (top[:, None] | low).ravel(), random])
    values = bits.view(np.float32)
    wanted = torch.from_numpy(values.copy()).to(getattr(torch, dtype)).view(torch.uint16).numpy()
    found = round_to(values, dtype).view(np.uint16)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(found[number], wanted[number])
    assert np.isnan(torch.from_numpy(found[~number]).view(getattr(torch, dtype)).float().numpy()).all()
    # A matrix read with gaps is rounded as its elements are.
    strided = values[: len(values) // 2 * 2].reshape(-1, 2)[:, 1]
    np.testing.assert_array_equal(round_to(strided, dtype).view(np.uint16), found[: len(values) // 2 * 2][1::2])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_not_a_number_has_the_bits_of_torchs_vectorised_conversion(dtype: str) -> None:
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("this processor's conversion of a not-a-number gives other bits")
    bits = np.arange(0x7F800001, 0x7FFFFFFF, 0xFFF, dtype=np.uint32)
    values = np.concatenate([bits, bits | np.uint32(1 << 31)]).view(np.float32)
    wanted = torch.from_numpy(values.copy()).to(getattr(torch, dtype)).view(torch.uint16).numpy()
    np.testing.assert_array_equal(round_to(values, dtype).view(np.uint16), wanted)


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="float8_e5m2"):
        round_to(np.zeros(1, np.float32), "float8_e5m2")
