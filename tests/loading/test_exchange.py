"""Dividing what ranks want alike: every element in one part, parts of equal bytes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ucp import limits
from ucp.errors import Unsupported
from ucp.geometry import Blocks, concat, flat_ranges, whole
from ucp.loading import exchange
from ucp.loading.exchange import Sharing, part


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


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("limit", [1, 3, 10, 100])
def test_the_exchange_is_bounded(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Every byte goes through the group's collectives once, so many at a time, and each to its own place."""
    buffers = [torch.arange(n, dtype=torch.uint8) for n in (5, 0, 1, 12, 3)]
    sent: list[torch.Tensor] = []

    def add_one(staging: torch.Tensor, **_: Any) -> None:
        sent.append(staging.clone())
        staging += 1

    monkeypatch.setattr(limits, "EXCHANGE_BUFFER_BYTES", limit)
    monkeypatch.setattr(dist, "all_reduce", add_one)
    tensors = {(key, "param", "uint8"): buffer.clone() for key, buffer in enumerate(buffers)}
    exchange.exchange(Sharing({(0,): tuple(tensors)}, ((0,),)), tensors)
    assert [len(staging) for staging in sent[:-1]] == [limit] * (len(sent) - 1)
    assert torch.cat(sent).equal(torch.cat(buffers))
    assert all(tensor.equal(buffer + 1) for tensor, buffer in zip(tensors.values(), buffers, strict=True))


@pytest.mark.usefixtures("group")
def test_backends_that_exchange_neither_the_hosts_nor_cudas_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exchange.is_possible("adaptive")
    assert exchange.is_possible(True)
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: "xpu:xccl")
    assert not exchange.is_possible("adaptive")
    with pytest.raises(Unsupported, match="this one has xpu only; use read_once=False"):
        exchange.is_possible(True)
