"""Many small tensors on their way to a device. The host stands for the device here; `test_phases.py` has a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ucp
from ucp import limits
from ucp.loading import bring
from ucp.loading.spread import copy_all

TYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex128]


class Sent(TorchDispatchMode):
    """The bytes of each copy to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default:
            self.nbytes.append(args[0].nbytes)
        return function(*args, **kwargs or {})


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_every_value_arrives_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SENT_TOGETHER_BYTES", 4000)
    monkeypatch.setattr(limits, "SENDING_ROOM_BYTES", 10_000)
    generator = torch.Generator().manual_seed(0)
    values, lives = [], []
    for k in range(600):
        dtype = TYPES[k % len(TYPES)]
        shape = [(k,), (3, k), (), (0, 5), (7, 2, 9)][k % 5]
        raw = torch.randint(256, (torch.Size(shape).numel() * dtype.itemsize,), generator=generator)
        value = raw.to(torch.uint8).view(dtype) if dtype != torch.bool else raw > 100
        values.append(value)
        lives.append(torch.zeros(shape, dtype=dtype))
    wanted = [bits(value) for value in values]
    with Sent() as sent:
        copy_all(lives, values, [False] * len(lives))
    assert [bits(live) for live in lives] == wanted
    assert max(sent.nbytes) <= 10_000
    assert len(sent.nbytes) < 60


def test_what_cannot_go_with_others_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SENT_TOGETHER_BYTES", 400)
    values = [torch.arange(60.0), torch.arange(101.0), torch.tensor([1.00390625, torch.nan]), torch.arange(9.0)]
    lives = [torch.zeros(6, 10).t(), torch.zeros(101), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(9)]
    with Sent() as sent:
        copy_all(lives, values, [False, False, False, True])
    assert not sent.nbytes
    assert torch.equal(lives[0].flatten(), values[0])
    assert torch.equal(lives[1], values[1])
    assert lives[2][0] == 1
    assert lives[2][1].isnan()
    assert torch.equal(lives[3], values[3])


def test_a_share_that_is_held_is_sent_in_few_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = {f"layers.{k}": torch.randn(10 + k % 3, 20) for k in range(1000)}
    ucp.save(dict(truth), tmp_path / "ck")
    monkeypatch.setattr(bring, "is_on_host", lambda flat: False)
    state = {name: torch.zeros_like(value) for name, value in truth.items()}
    with Sent() as sent:
        ucp.load(state, tmp_path / "ck")
    assert [nbytes for nbytes in sent.nbytes if nbytes > 1000] == [sum(value.nbytes for value in truth.values())]
    assert all(torch.equal(state[name], value) for name, value in truth.items())
