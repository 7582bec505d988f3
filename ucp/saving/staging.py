"""A rank's share copied into host memory while training goes on: a bounded pool, used as a ring, again and again.

Weights and optimizer states change only in the optimizer's step. So a save in the background copies them while forward
and backward run. An update that comes before the copy is done waits for it (`Copying.hold`). Copies from a device use
their own stream, and are all requested in a few calls before the save returns. Copies from host memory are made by a
thread. The model's buffers may change earlier, so they are copied before training goes on. A share larger than the pool
is copied and written in turns; then an update also waits for most of the writing.

The pool's memory has a file descriptor, so that the process that writes (`writer`) can map it. For copies from a device
it is pinned.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ucp import limits
from ucp.errors import BadArgument
from ucp.geometry import numel
from ucp.job.stopwatch import Stopwatch
from ucp.saving.share import WrittenElements, elements
from ucp.storage.dtypes import itemsize
from ucp.storage.kept.files import Lease
from ucp.storage.safetensors import FilePlan

if TYPE_CHECKING:
    import torch


_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


class Pool:
    """Host memory in windows of ``window`` bytes, kept from save to save. It is pinned if tensors come from a device.

    limit: how many bytes it takes at most, but at least one window. file: the descriptor of its memory. bytes: the
    memory, as a flat tensor of bytes. It begins at a page, so that it can be written past the page cache. lease: set if
    the memory is a keeper's, which then holds all of the file. digesters: how many processes are to digest it there.
    """

    lease: Lease | None = None
    digesters = 1

    def __init__(self, limit: int = limits.STAGING_BYTES) -> None:
        self.window = limits.SAVE_WINDOW_BYTES
        self.limit(limit)
        self._pinned: weakref.finalize[Any, Any] | None = None
        self.file = _memory_file()
        weakref.finalize(self, os.close, self.file).atexit = False
        self.bytes: torch.Tensor | None = None

    def limit(self, nbytes: int) -> None:
        """Take at most this many bytes, or one window, from the next `reserve` on."""
        self._most = max(nbytes // self.window, 1) * self.window

    @property
    def nbytes(self) -> int:
        return 0 if self.bytes is None else self.bytes.numel()

    def reserve(self, nbytes: int, *, pinned: bool) -> None:
        """Get memory for this many bytes, or as many as the limit allows. Not while any of it is in use.

        Raises BadArgument if it cannot be pinned.
        """
        import torch

        wanted = min(max(-(-nbytes // self.window) * self.window, self.nbytes), self._most)
        if wanted == self.nbytes and (self._pinned is not None or not pinned or not wanted):
            return
        pinned = pinned or self._pinned is not None
        if self._pinned is not None:
            self._pinned()
            self._pinned = None
        os.ftruncate(self.file, wanted)
        self.bytes = torch.frombuffer(mmap.mmap(self.file, wanted), dtype=torch.uint8)
        if pinned:
            self._pinned = pin(self, self.bytes)


def _memory_file() -> int:
    """A file in memory without a name. Other processes get it by its descriptor."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("ucp")
    with tempfile.TemporaryFile() as stream:  # where there is no Linux
        return os.dup(stream.fileno())


def pin(owner: Pool, memory: torch.Tensor) -> weakref.finalize[Any, Any]:
    """Pin memory for a device until the owner is deleted."""
    import torch

    runtime = torch.cuda.cudart()
    address = memory.data_ptr()
    code = int(runtime.cudaHostRegister(address, memory.numel(), _PORTABLE))
    if code:
        raise BadArgument(
            f"{memory.numel()} bytes of host memory for saves in the background cannot be pinned (CUDA error {code}); "
            "allow them less memory"
        )
    end = weakref.finalize(owner, runtime.cudaHostUnregister, address)
    end.atexit = False
    return end


@dataclass(frozen=True, eq=False)
class _Run:
    """Bytes that lie in the file as they lie in memory. start: their place in the file. flat: gives a flat tensor of
    bytes, in which they are ``[low, low + size)``. owner: the tensor whose memory that is; None if it is made anew."""

    start: int
    size: int
    low: int
    flat: Callable[[], torch.Tensor]
    owner: torch.Tensor | None

    @property
    def end(self) -> int:
        return self.start + self.size


class Copying:
    """One rank's file on its way through the pool.

    plan, pieces: the file. The thread that trains makes this object. From then on the program may free the tensors'
    memory, but may not change it before `hold` returns. There is one at a time for a pool. With `windows` the same
    thread writes; with `arriving` another process does.
    """

    def __init__(self, pool: Pool, plan: FilePlan, pieces: Sequence[WrittenElements]) -> None:
        import torch

        self._pool = pool
        self._runs = deque(_runs(plan, pieces))
        self.size = plan.size
        tensors = {id(piece.holding.tensor): piece.holding.tensor for piece in pieces}.values()
        self._device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        in_host = sum(tensor.numel() * tensor.element_size() for tensor in tensors if not tensor.is_cuda)
        self._asks = self._device is not None and in_host <= pool.window
        pool.reserve(plan.size, pinned=self._device is not None)
        self.lease = pool.lease
        self._step = min(limits.COPY_STEP_WINDOWS, max(pool.nbytes // pool.window // 4, 1)) * pool.window
        self._dense: tuple[_Run, torch.Tensor] | None = None  # dense bytes of the run that is being copied in steps
        self._launched = 0
        self._under_way: deque[tuple[int, Any]] = deque()
        self._copied = threading.Event()
        self._finished: Any = None
        self._broken: Exception | None = None
        if self._device is not None:
            self._gap = torch.zeros(1, device=self._device)
            # The kernels between the copies are small, and should not wait for those of training.
            self._stream = torch.cuda.Stream(self._device, priority=-1)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def hold(self) -> None:
        """Return once the tensors may be changed by what the calling thread does next, on its current stream."""
        import torch

        self._copied.wait()
        if self._finished is not None:
            torch.cuda.current_stream(self._device).wait_event(self._finished)

    def is_under_way(self) -> bool:
        """Whether there is more to be copied."""
        return not self._copied.is_set() or (self._finished is not None and not self._finished.query())

    def close(self) -> None:
        """End the copying, since everything has been copied or it failed."""
        try:
            while self._under_way:  # wait for all of it, so that the pool is free for the next save
                self._arrived()
        finally:
            self._copied.set()
            self._runs.clear()
            self._dense = None

    def ask(self) -> None:
        """If everything lies on a device, request the first copies now, in the thread that trains. That takes a
        millisecond, while another thread would have to take turns with training. It has no effect otherwise. What goes
        wrong is raised by `arriving`."""
        try:
            if self._asks:
                self.launch()
        except Exception as error:  # noqa: BLE001 - raised by the thread that follows the writer
            self._broken = error

    def launch(self, written: int = 0) -> None:
        """Copy as much as the pool has room for, when ``written`` bytes of the file are written. Copies from a device
        are only requested."""
        while self._step_launched(written):
            pass

    def arriving(self, written: int = 0) -> Iterator[int]:
        """Copy as much as the pool has room for. Yields how many bytes of the file have arrived, whenever there are
        more.

        written: as for `launch`.
        """
        if self._broken is not None:
            raise self._broken
        if self._device is not None:
            self.launch(written)
        while self._under_way or self._step_launched(written):
            yield self._arrived()

    def windows(self, watch: Stopwatch) -> Iterator[tuple[int, memoryview]]:
        """The file's bytes, as (offset in the file, bytes). Each is valid until the next one is asked for.

        watch: gets the seconds of 'copy'.
        """
        arrived = 0
        try:
            for at in range(0, self.size, self._pool.window):
                count = min(self._pool.window, self.size - at)
                with watch.of("copy"):
                    self.launch(at)
                    while arrived < at + count:
                        arrived = self._arrived()
                place = at % self._pool.nbytes
                yield at, self._memory[place : place + count].numpy().data
        finally:
            self.close()

    @property
    def _memory(self) -> torch.Tensor:
        if self._pool.bytes is None:
            raise BadArgument("the pool has no memory; it is reserved when a copying is made")
        return self._pool.bytes

    def _arrived(self) -> int:
        """Wait for the oldest step that is under way. Returns how many bytes of the file have arrived."""
        end, event = self._under_way.popleft()
        if event is not None:
            event.synchronize()
        return end

    def _step_launched(self, written: int) -> bool:
        """Copy one step, if there is more of the file and room for it."""
        import torch

        low, high = self._launched, min(self.size, written + self._pool.nbytes, self._launched + self._step)
        if low >= high:
            return False
        with torch.no_grad(), nullcontext() if self._device is None else torch.cuda.stream(self._stream):
            self._copy(low, high)
            # A mark in the device's stream, for which one can wait without spinning.
            event = None if self._device is None else self._stream.record_event(torch.cuda.Event(blocking=True))
        self._under_way.append((high, event))
        self._launched = high
        if high == self.size:
            self._finished = event
            self._copied.set()
        return True

    def _copy(self, low: int, high: int) -> None:
        """Copy the file's bytes ``[low, high)`` into the ring.

        A device sends to the host one thing after the other, on whatever stream. So a loss that training asks for would
        wait for all copies that were requested before it. A kernel between two copies holds back the second one, and
        what training asks for goes first. Measured on an H100 that computes, during a copy of 5 GiB: a word waits for
        1 ms and not for 97 ms, and the copies take 0.100 s and not 0.098 s. With a kernel after each window they take
        0.117 s.
        """
        capacity, unbroken = self._pool.nbytes, limits.COPY_UNBROKEN_WINDOWS * self._pool.window
        while low < high:
            run = self._runs[0]
            if run.end <= low:
                self._runs.popleft()
                continue
            stop = min(high, run.end, (low // capacity + 1) * capacity, (low // unbroken + 1) * unbroken)
            if self._dense is None or self._dense[0] is not run:
                self._dense = (run, run.flat())
            start = run.low + low - run.start
            place = low % capacity
            self._memory[place : place + stop - low].copy_(
                self._dense[1][start : start + stop - low], non_blocking=True
            )
            low = stop
            if low % unbroken == 0 and self._device is not None:
                self._gap.add_(1)


def _runs(plan: FilePlan, pieces: Sequence[WrittenElements]) -> Iterator[_Run]:
    """The file as runs, as few as possible: what follows one another both in the file and in memory is one run.

    Tensors of buffers, which forward may change, are copied first.
    """
    import torch

    header = torch.frombuffer(bytearray(plan.header), dtype=torch.uint8)
    last = _Run(0, header.numel(), 0, lambda: header, header)
    own: dict[int, torch.Tensor] = {}
    flats: dict[int, torch.Tensor] = {}
    for piece in pieces:
        given = piece.holding.tensor
        if id(given) not in own:
            own[id(given)] = given.detach().clone() if piece.holding.volatile else given.detach()
        tensor = own[id(given)]
        width = itemsize(piece.holding.dtype)
        if piece.dense is not None and tensor.is_contiguous():
            flat = flats.get(id(given))
            if flat is None:
                flat = flats[id(given)] = tensor.reshape(-1).view(torch.uint8)
            low, size = piece.dense[0] * width, piece.dense[1] * width
            if last.owner is tensor and last.low + last.size == low:
                last = _Run(last.start, last.size + size, last.low, last.flat, tensor)
                continue
            yield last
            last = _Run(last.end, size, low, lambda flat=flat: flat, tensor)  # type: ignore[misc]
            continue
        sizes = [piece.dense[1]] if piece.dense is not None else list(map(numel, piece.holding.blocks.sizes.tolist()))
        for k, count in enumerate(sizes):
            yield last
            last = _Run(last.end, count * width, 0, lambda p=piece, t=tensor, k=k: _made_dense(p, t, k), None)  # type: ignore[misc]
    yield last


def _made_dense(piece: WrittenElements, tensor: torch.Tensor, k: int) -> torch.Tensor:
    """The piece's k-th part as dense bytes."""
    import torch

    return elements(piece, tensor, k).contiguous().reshape(-1).view(torch.uint8)
