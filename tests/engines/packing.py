"""Pickles in which a tensor is its bytes: torch's own are an archive for each tensor, which takes ten times as long.

`pickle.loads` reads them. Each tensor comes back by itself: what shared memory no longer does.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor


class _Packer(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
            return NotImplemented
        if value.requires_grad or value.is_quantized or value.is_conj() or value.is_neg():
            return NotImplemented
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return _unpacked, (raw, value.dtype, tuple(value.shape))


def _unpacked(raw: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)


def packed(value: Any) -> bytes:
    out = io.BytesIO()
    _Packer(out, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return out.getvalue()


def gather_object(value: Any, to: int = 0, group: Any = None) -> list[Any] | None:
    """Every rank's ``value`` on rank ``to``; None on the others. Collective."""
    import torch.distributed as dist

    everyone: list[Any] | None = [b""] * dist.get_world_size(group) if dist.get_rank() == to else None
    dist.gather_object(packed(value), everyone, to, group)
    return None if everyone is None else [pickle.loads(each) for each in everyone]
