"""Copy tensors from host memory to where they live, many small ones at a time to a device.

A copy to a device takes about 14 µs, however little it copies. So small tensors are put together in host memory a few
MiB at a time. Each such room is sent with one copy and spread out on the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from ucp import limits


@torch.no_grad()
def copy_all(lives: Sequence[torch.Tensor], values: Sequence[torch.Tensor], on_host: Sequence[bool]) -> None:
    """Give live memory, of any shape, these flat values. on_host: which of it lies on the host."""
    if all(on_host):
        _copy(lives, values)
        return
    one_by_one: list[int] = []
    together: defaultdict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for k, (live, value, is_here) in enumerate(zip(lives, values, on_host, strict=True)):
        if is_here or not _is_small(live, value):
            one_by_one.append(k)
        else:
            together[live.device, live.dtype].append(k)
    if one_by_one:
        _copy([lives[k] for k in one_by_one], [values[k] for k in one_by_one])
    for (device, _), members in together.items():
        _send([lives[k] for k in members], [values[k] for k in members], device)


def _is_small(live: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the value is to be sent with others. What is converted or lies apart is left to torch, one by one."""
    return (
        value.is_cpu
        and value.dtype == live.dtype
        and value.nbytes <= limits.SENT_TOGETHER_BYTES
        and live.is_contiguous()
    )


def _send(lives: list[torch.Tensor], values: list[torch.Tensor], device: torch.device) -> None:
    """Small values of one element type to one device, in as many rooms as they need."""
    width = values[0].element_size()
    room = torch.empty(limits.SENDING_ROOM_BYTES // width, dtype=values[0].dtype)
    counts = [value.numel() for value in values]
    first = used = 0
    for k, count in enumerate([*counts, len(room) + 1]):
        if used + count > len(room):
            torch.cat(values[first:k], out=room[:used])
            # Other memory there than before, so that the room can be filled again: from memory that is not pinned
            # torch copies before it returns.
            there = room[:used].to(device, copy=True)
            _copy(lives[first:k], there.split_with_sizes(counts[first:k]))
            first, used = k, 0
        used += count


def _copy(lives: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    shaped = [value if live.dim() == 1 else value.view(live.shape) for live, value in zip(lives, values, strict=True)]
    torch._foreach_copy_(list(lives), shaped)
