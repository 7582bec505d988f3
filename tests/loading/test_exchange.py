"""Dividing what ranks want alike: every element in one part, parts of equal bytes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ucp.geometry import Blocks, concat, flat_ranges, whole
from ucp.loading.exchange import _filled, part


def elements(blocks: Blocks) -> list[tuple[int, ...]]:
    """Every element's index, with its place in the buffer, one by one."""
    out = []
    for k in range(len(blocks)):
        for index in np.ndindex(*blocks.sizes[k].tolist()):
            place = int(blocks.starts[k] + (np.array(index, np.int64) * blocks.strides[k]).sum())
            out.append((*(blocks.offsets[k] + np.array(index, np.int64)).tolist(), place))
    return out


@given(
    shape=st.lists(st.integers(1, 7), min_size=0, max_size=3),
    data=st.data(),
    parts=st.integers(1, 9),
    size=st.sampled_from([1, 2, 4, 8]),
)
def test_parts_hold_every_element_once(shape: list[int], data: st.DataObject, parts: int, size: int) -> None:
    n = int(np.prod(shape, dtype=np.int64))
    first, last = sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))
    blocks = flat_ranges(shape, [first], [last], [5]) if shape else whole(())
    total = len(elements(blocks)) * size
    bounds = [total * k // parts for k in range(parts + 1)]
    found = [part(blocks, size, low, high) for low, high in pairwise(bounds)]
    assert sorted(elements(concat(found, len(shape)))) == sorted(elements(blocks))
    assert all(int(one.counts.sum()) * size <= total // parts + 1 + size for one in found)


@pytest.mark.parametrize("limit", [1, 3, 10, 100])
def test_the_exchange_is_bounded(limit: int) -> None:
    buffers = [torch.arange(n, dtype=torch.uint8) for n in (5, 0, 1, 12, 3)]
    lists = list(_filled(buffers, limit))
    assert [sum(map(len, pieces)) for pieces in lists[:-1]] == [limit] * (len(lists) - 1)
    assert torch.cat([piece for pieces in lists for piece in pieces]).equal(torch.cat(buffers))
