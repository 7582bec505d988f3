"""A rank's share copied into host memory while training goes on: a bounded pool of windows, used again and again.

Weights and optimizer states change in the optimizer's step only. So a save in the background copies them while forward
and backward run, from a device on a stream of its own, and an update that comes before the copy is done waits for it
(`Copying.hold`). What may change earlier, the model's buffers, is set aside before training goes on. A share larger
than the pool is copied and written in turns; then that update waits for most of the writing, too.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ucp.storage.safetensors import FilePlan
from ucp.training.share import WINDOW, Piece, elements

if TYPE_CHECKING:
    import torch

MEMORY = 16 << 30
"""Bytes of host memory that a rank's pool may take if nothing else is asked for."""


class Pool:
    """Windows of host memory of `WINDOW` bytes each, kept from save to save; pinned where tensors come from a device.

    limit: bytes that all of them take at most; at least one window there is.
    """

    def __init__(self, limit: int = MEMORY) -> None:
        self._most = max(limit // WINDOW, 1)
        self._pinned = False
        self.windows: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        return len(self.windows) * WINDOW

    def reserve(self, nbytes: int, *, pinned: bool) -> None:
        """Have windows for so many bytes, or as many as the limit allows."""

        if pinned and not self._pinned:
            self.windows = []
            self._pinned = True
        while len(self.windows) < min(-(-nbytes // WINDOW), self._most):
            self.windows.append(_window(self._pinned))


def _window(pinned: bool) -> torch.Tensor:
    """Memory that begins at a page, so that it can be written past the page cache.

    One by one, since a large pinned allocation would be rounded up to a power of two.
    """
    import torch

    if pinned:
        return torch.empty(WINDOW, dtype=torch.uint8, pin_memory=True)
    return torch.frombuffer(mmap.mmap(-1, WINDOW), dtype=torch.uint8)


class Copying:
    """One rank's file on its way through the pool: `windows` does the work, in a thread of its own.

    plan, pieces: the file. Made by the thread that trains; from then on the tensors' memory may be freed by the
    program, but not changed before `hold` returns. One at a time for a pool.
    """

    def __init__(self, pool: Pool, plan: FilePlan, pieces: Sequence[Piece]) -> None:
        import torch

        self._plan = plan
        self._pieces = [_set_aside(piece) for piece in pieces]
        self._device = next((p.holding.tensor.device for p in pieces if p.holding.tensor.is_cuda), None)
        self._pool = pool
        pool.reserve(plan.size, pinned=self._device is not None)
        self._copied = threading.Event()
        self._finished: Any = None
        if self._device is not None:
            self._stream = torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def hold(self) -> None:
        """Return once the tensors may be changed by what the calling thread does next, on its current stream."""
        import torch

        self._copied.wait()
        if self._finished is not None:
            torch.cuda.current_stream(self._device).wait_event(self._finished)

    def close(self) -> None:
        """No more is to be copied: all has been, or it failed."""
        self._copied.set()
        self._pieces = []

    def windows(self) -> Iterator[tuple[int, memoryview]]:
        """The file's bytes, as (offset in the file, bytes), each valid until the next one is asked for.

        Fills all of the pool before the first one is given away.
        """
        import torch

        segments = self._segments()
        free, filled = deque(self._pool.windows), deque[tuple[int, torch.Tensor, Any]]()
        todo = deque(range(0, self._plan.size, WINDOW))
        try:
            while todo or filled:
                with torch.no_grad(), self._on_stream():
                    while todo and free:
                        start = todo.popleft()
                        window = free.popleft()[: self._plan.size - start]
                        _fill(window, start, segments)
                        filled.append((start, window, self._event()))
                if not todo:
                    self._finished = self._finished or self._event()
                    self._copied.set()
                start, window, event = filled.popleft()
                if event is not None:
                    event.synchronize()
                yield start, window.numpy().data.cast("B")
                free.append(window)
        finally:
            self.close()

    def _on_stream(self) -> Any:
        import torch

        return nullcontext() if self._device is None else torch.cuda.stream(self._stream)

    def _event(self) -> Any:
        """A mark in the device's stream, waited for without spinning; None without a device."""
        import torch

        return None if self._device is None else self._stream.record_event(torch.cuda.Event(blocking=True))

    def _segments(self) -> _Segments:
        import torch

        header = torch.frombuffer(bytearray(self._plan.header), dtype=torch.uint8)
        parts = [header, *(part for piece in self._pieces for part in elements(piece))]
        return _Segments(parts)


class _Segments:
    """Tensors of any type, one after the other, as the bytes of one file."""

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self._parts = parts
        self._ends = np.cumsum([part.numel() * part.element_size() for part in parts])
        self._last: tuple[int, torch.Tensor] | None = None  # what was made dense is kept while windows run through it

    def between(self, low: int, high: int) -> Iterator[torch.Tensor]:
        """The bytes ``[low, high)`` as flat tensors of bytes, where they lie."""
        import torch

        k = int(np.searchsorted(self._ends, low, side="right"))
        while low < high:
            if self._last is None or self._last[0] != k:
                self._last = (k, self._parts[k].contiguous().reshape(-1).view(torch.uint8))
            dense, end = self._last[1], int(self._ends[k])
            start = end - dense.numel()
            yield dense[low - start : min(high, end) - start]
            low = min(high, end)
            k += 1


def _fill(window: torch.Tensor, start: int, segments: _Segments) -> None:
    at = 0
    for raw in segments.between(start, start + window.numel()):
        window[at : at + raw.numel()].copy_(raw, non_blocking=True)
        at += raw.numel()


def _set_aside(piece: Piece) -> Piece:
    """The piece with a tensor of its own for the same memory; a buffer's, which forward may change, is copied."""
    tensor = piece.holding.tensor.detach()
    if piece.holding.volatile:
        tensor = tensor.clone()
    return replace(piece, holding=replace(piece.holding, tensor=tensor))
