"""Logical digests of live tensors on any device: one pass, nothing gathered, at most 64 MiB of memory.

In host memory `ucp.logical.digest` reads them where they are, with several threads. On a device the same sums are made
by plain torch operations (`ucp.job.device_digest`). Both are equal bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ucp.columns import firsts, tuples_of
from ucp.geometry import Blocks, Ints, Shape, numel, whole
from ucp.job.device_digest import LONG, DeviceSums
from ucp.job.device_kernel import KernelSums, launch_of
from ucp.job.float_types import converted
from ucp.logical.batch import Batch, lanes_of
from ucp.logical.digest import ROW, Digest, digest_bytes
from ucp.logical.runs import FEW, Run, Runs, Sample, few_runs, runs_of, within_buffer
from ucp.printable import logger
from ucp.storage.dtypes import itemsize, to_torch

# How many bytes of a tensor one thread takes at once.
PIECE = 16 << 20
# In host memory: tensors of fewer bytes are digested together.
_TOGETHER = 2 << 20
# So many bytes of what is digested together are worth one thread more: threads wait for each other meanwhile.
_WORTH_A_THREAD = 128 << 20

_logger = logger(__name__)


class LiveElements(NamedTuple):
    """Elements of a logical tensor in memory, on any device.

    tensor: the memory, read as one flat row-major buffer. blocks: which elements of the logical tensor of this shape
    these are, and where they lie in it, in elements. dtype: convert the elements into this type first
    (`ucp.storage.dtypes`); None: digest them as they are. back: then convert them back into their own type, to see
    whether the other type holds them exactly. rounded: convert as a copy does, with rounding. one_nan: give all NaNs
    the same bits, since the bits of a rounded NaN depend on how torch rounded it.
    """

    tensor: torch.Tensor
    shape: Shape
    blocks: Blocks
    dtype: str | None = None
    back: bool = False
    rounded: bool = False
    one_nan: bool = False

    @property
    def width(self) -> int:
        """Bytes of an element that is digested."""
        return self.tensor.element_size() if self.dtype is None or self.back else itemsize(self.dtype)

    @property
    def elements(self) -> int:
        return self.blocks.elements

    @property
    def nbytes(self) -> int:
        return self.elements * self.width


def digests(lives: Sequence[LiveElements], *, sample: Sample | None = None, threads: int = 1) -> list[Digest]:
    """The digest of each. sample: of the blocks that it picks alone. threads: for those in host memory.

    A tensor that is not contiguous is copied.
    """
    return tuples_of(Digest, *digest_lanes(lives, sample=sample, threads=threads).T.tolist())


@torch.no_grad()
def digest_lanes(
    lives: Sequence[LiveElements], *, sample: Sample | None = None, threads: int = 1
) -> NDArray[np.uint64]:
    """As `digests`: (n, 2) both lanes of each digest."""
    out = np.zeros((len(lives), 2), np.uint64)
    by_device: dict[torch.device, list[int]] = {}
    host = [k for k, live in enumerate(lives) if live.tensor.is_cpu]
    if host:
        by_device[torch.device("cpu")] = host
    for k, live in enumerate(lives) if len(host) < len(lives) else ():
        if not live.tensor.is_cpu and len(live.blocks):
            by_device.setdefault(live.tensor.device, []).append(k)
    for device, members in by_device.items():
        own = lives if len(members) == len(lives) else [lives[k] for k in members]
        if device.type in ("cpu", "mps"):
            out[members] = _on_host(own, sample, threads)
        else:
            out[members] = _on_device(own, sample)
    return out


def _windows(
    live: LiveElements, listed: list[Run] | None, sample: Sample | None, most: int
) -> Iterator[tuple[torch.Tensor, Runs]]:
    """The tensor's memory in pieces of bytes, and the runs in each. A piece has at most about ``most`` bytes, since it
    may be converted, or copied from a device. listed: its runs, as `_Kind` has them."""
    if listed is not None:
        for source, place, size in listed:
            for at in range(0, size, most):
                step = min(most, size - at)
                yield _piece(live, source + at, step), Runs(*(np.array([n], np.int64) for n in (0, place + at, step)))
        return
    flat = live.tensor.detach().reshape(-1)
    nbytes = numel(live.shape) * live.width
    for every in runs_of(live.shape, live.blocks, live.width):
        found = every if sample is None else sample.of(every, nbytes)
        if not len(found):
            continue
        first, last = int(found.sources.min()), int((found.sources + found.sizes).max())
        step = most // ROW * ROW
        for low in range(first // live.width * live.width, last, step):
            part = within_buffer(found, low, min(low + step, last))
            if len(part):
                # Only the part with the runs, since most of a sampled tensor need not be read.
                begin = int(part.sources.min()) // live.width * live.width
                end = int((part.sources + part.sizes).max())
                piece = flat[(low + begin) // live.width : -(-(low + end) // live.width)]
                yield _bits(piece, live), Runs(part.sources - begin, part.places, part.sizes)


def _piece(live: LiveElements, source: int, size: int) -> torch.Tensor:
    """So many bytes of the tensor from this one on, as they are digested: of whole elements."""
    flat = live.tensor.detach().reshape(-1)
    return _bits(flat[source // live.width : (source + size) // live.width], live)


def _bits(piece: torch.Tensor, live: LiveElements) -> torch.Tensor:
    """The elements' bytes, converted first where a type is given. Elements that lie apart are put together."""
    piece = piece.contiguous()
    if live.dtype is not None:
        kind = to_torch(live.dtype)
        there = piece.to(kind) if live.rounded else converted(piece, kind)
        piece = converted(there, piece.dtype) if live.back else there
    if live.one_nan:
        piece = torch.where(piece.isnan(), torch.full_like(piece, torch.nan), piece)
    return piece.view(torch.uint8)


@dataclass(frozen=True)
class _Kind:
    """What tensors have in common that are cut alike and lie alike. listed: the runs to digest, if they are few and a
    tensor lies in one piece of memory; else None. They count the bytes that are digested: where elements are converted
    first, those after that. nbytes: of these runs. rows: how many rows of 1 KiB a tensor has, if it is digested as it
    is, and whole; else 0. is_converted: whether its elements are converted."""

    listed: list[Run] | None
    nbytes: int
    rows: int
    is_converted: bool


@dataclass(frozen=True, eq=False)
class _Kinds:
    """The kinds of some tensors, and (n,) which of them each tensor is of."""

    kinds: Sequence[_Kind]
    which: Ints

    @classmethod
    def of(cls, lives: Sequence[LiveElements], sample: Sample | None) -> _Kinds:
        """Layers have tensors alike, and finding what is to be digested of one takes longer than digesting a few KiB.
        It is found once for all that share their blocks, as tensors that are cut alike may."""
        numbers: dict[tuple[Any, ...], int] = {}
        which = [
            numbers.setdefault(
                (id(blocks), shape, dtype, back, one_nan, t.dtype, t.shape, t.is_contiguous()), len(numbers)
            )
            for t, shape, blocks, dtype, back, _, one_nan in lives
        ]
        of = np.array(which, np.int64)
        lists = _Lists(sample)
        return cls([_kind_of(lives[k], lists.of(lives[k])) for k in firsts(of)], of)

    def __getitem__(self, index: int) -> _Kind:
        """The kind of a tensor."""
        return self.kinds[self.which[index]]

    def groups(self, own: Ints) -> Iterator[tuple[_Kind, Ints]]:
        """Of these tensors those of each kind, by their places in ``own``."""
        order = np.argsort(self.which[own], kind="stable")
        of = self.which[own][order]
        for members in np.split(order, np.flatnonzero(of[1:] != of[:-1]) + 1) if len(own) else ():
            yield self[own[members[0]]], members


def _kind_of(live: LiveElements, listed: list[Run] | None) -> _Kind:
    is_converted = live.dtype is not None or live.one_nan
    rows = 0
    if listed is not None and len(listed) == 1 and not is_converted:
        ((source, place, size),) = listed
        is_whole = not (source or place) and size == live.tensor.nbytes
        rows = size // ROW if is_whole and size % ROW == 0 and size <= _TOGETHER and live.tensor.dim() else 0
    return _Kind(listed, sum(size for _, _, size in listed or ()), rows, is_converted)


class _Lists:
    """The runs of tensors that have few: they are found once for all that are cut alike, counted from each one's first
    block."""

    def __init__(self, sample: Sample | None) -> None:
        self._sample = sample
        self._known: dict[tuple[Any, ...], list[Run] | None] = {}

    def of(self, live: LiveElements) -> list[Run] | None:
        """As `_Kind.listed`."""
        if not live.tensor.is_contiguous() or len(live.blocks) > FEW:
            return None
        return self._find(live, live.blocks, live.width)

    def _find(self, live: LiveElements, blocks: Blocks, width: int) -> list[Run] | None:
        if not len(blocks):
            return []
        first = int(blocks.starts[0])
        steps = blocks.starts if len(blocks) == 1 and first == 0 else blocks.starts - first
        columns = (
            (blocks.offsets, blocks.sizes, blocks.strides)
            if len(blocks) == 1
            else (blocks.offsets, blocks.sizes, blocks.strides, steps)
        )
        key = (live.shape, width, *(column.tobytes() for column in columns))
        if key in self._known:
            found = self._known[key]
        else:
            found = few_runs(live.shape, replace(blocks, starts=steps), width)
            if found is not None and self._sample is not None:
                found = self._sample.cut(found, numel(live.shape) * width)
            self._known[key] = found
        if found is None or first == 0:
            return found
        return [(source + first * width, place, size) for source, place, size in found]


def _on_host(lives: Sequence[LiveElements], sample: Sample | None, threads: int) -> NDArray[np.uint64]:
    """Digest tensors with little to read together, and the others in pieces."""
    kinds = _Kinds.of(lives, sample)
    is_few = [one.listed is not None and (sample is not None or one.nbytes < _TOGETHER) for one in kinds.kinds]
    together = np.array(is_few, bool)[kinds.which]
    few, large = np.flatnonzero(together), np.flatnonzero(~together)
    out = np.zeros((len(lives), 2), np.uint64)
    shares = _shares(few, np.array([one.nbytes for one in kinds.kinds], np.int64)[kinds.which[few]], threads)
    with ThreadPoolExecutor(len(shares), "ucp-digest") if len(shares) > 1 else nullcontext() as pool:
        work = partial(_together, lives, kinds)
        for own, found in zip(shares, pool.map(work, shares) if pool is not None else map(work, shares), strict=True):
            out[own] = found
    if len(large):
        out[large] = lanes_of(_piecewise(lives, kinds, large.tolist(), sample, threads))
    return out


def _shares(few: Ints, nbytes: Ints, threads: int) -> list[Ints]:
    """The tensors in as many shares as threads are worth it, with about as many bytes in each. nbytes: of each."""
    if not len(few):
        return []
    ends = np.cumsum(nbytes)
    count = min(threads, int(ends[-1]) // _WORTH_A_THREAD + 1)
    return np.split(few, np.searchsorted(ends, [int(ends[-1]) * k // count for k in range(1, count)]))


@torch.no_grad()  # for this thread
def _together(lives: Sequence[LiveElements], kinds: _Kinds, own: Ints) -> NDArray[np.uint64]:
    batch = Batch(len(own))
    for kind, members in kinds.groups(own):
        some = [lives[k] for k in own[members].tolist()]
        if kind.rows:
            _add_whole(batch, members, kind.rows, [live.tensor for live in some])
            continue
        for n, live in zip(members.tolist(), some, strict=True):
            if kind.is_converted:
                for source, place, size in kind.listed or ():
                    batch.add(n, _piece(live, source, size).numpy(), [(0, place, size)])
            else:
                batch.add(n, _flat_bytes(live.tensor), kind.listed or ())
    return batch.finish()


_MOST = 1 << 20  # bytes of whole tensors that are put together


def _add_whole(batch: Batch, owners: Ints, rows: int, tensors: Sequence[torch.Tensor]) -> None:
    """Add contiguous tensors of one shape, of so many rows each, many in one call."""
    step = max(_MOST // (rows * ROW), 1)
    for at in range(0, len(tensors), step):
        some = tensors[at : at + step]
        flat = torch.cat(list(some)) if len(some) > 1 else some[0]
        batch.add_rows(owners[at : at + step], rows, flat.view(torch.uint8).numpy())


def _flat_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    flat = tensor if tensor.dim() == 1 else tensor.reshape(-1)
    out: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return out


def _piecewise(
    lives: Sequence[LiveElements], kinds: _Kinds, members: Sequence[int], sample: Sample | None, threads: int
) -> list[Digest]:
    def work(job: tuple[int, torch.Tensor, Runs]) -> tuple[int, Digest]:
        k, raw, runs = job
        return k, digest_bytes(raw.cpu().numpy(), runs)

    jobs = (
        (n, raw, runs)
        for n, k in enumerate(members)
        for raw, runs in _windows(lives[k], kinds[k].listed, sample, PIECE)
    )
    out = [Digest()] * len(members)
    if threads <= 1 or sum(lives[k].nbytes for k in members) < PIECE:
        for k, found in map(work, jobs):
            out[k] += found
        return out
    with ThreadPoolExecutor(threads, "ucp-digest") as pool:
        # A bounded number at a time: what is converted takes memory.
        for batch in _batched(jobs, 2 * threads):
            for k, found in pool.map(work, batch):
                out[k] += found
    return out


def _batched(
    jobs: Iterator[tuple[int, torch.Tensor, Runs]], count: int
) -> Iterator[list[tuple[int, torch.Tensor, Runs]]]:
    batch = []
    for job in jobs:
        batch.append(job)
        if len(batch) == count:
            yield batch
            batch = []
    yield batch


# --- on a device -----------------------------------------------------------------------------------------------------


def on_device(
    lives: Sequence[LiveElements], sample: Sample | None = None, *, by_bytes: bool | None = None
) -> list[Digest]:
    """As `digests`, of tensors of one device: by the kernel of `ucp.job.device_kernel`, or by torch's operations, which
    work in host memory, too. by_bytes: by torch's, and in this way, as `ucp.job.device_products` tells; None for the
    device's fastest."""
    return tuples_of(Digest, *_on_device(lives, sample, by_bytes).T.tolist())


def _on_device(
    lives: Sequence[LiveElements], sample: Sample | None, by_bytes: bool | None = None
) -> NDArray[np.uint64]:
    device = lives[0].tensor.device
    launch = launch_of(device) if by_bytes is None else None
    sums = (
        DeviceSums(device, len(lives), by_bytes=by_bytes) if launch is None else KernelSums(device, len(lives), launch)
    )
    for kind, members in _Kinds.of(lives, sample).groups(np.arange(len(lives))):
        if kind.listed is None or kind.is_converted:
            for k in members.tolist():
                for raw, runs in _windows(lives[k], kind.listed, sample, PIECE):
                    sums.add(k, raw, runs)
        elif kind.listed:
            sums.add_alike(members, [lives[k].tensor for k in members.tolist()], kind.listed)
    return sums.finish()


# --- what only the first digest takes --------------------------------------------------------------------------------


def prepared() -> threading.Thread | None:
    """Have this process's device made ready in a thread: libraries are loaded, tables made, ways to multiply tried.
    Otherwise the first digest would wait for that. None if there is nothing to do. Whoever digests joins the thread.
    """
    if not torch.cuda.is_initialized():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    if device in _ready:
        return None
    _ready.add(device)
    thread = threading.Thread(target=_make_ready, args=(device,), name="ucp-digest-ready")
    thread.start()
    return thread


_ready: set[torch.device] = set()


def _make_ready(device: torch.device) -> None:
    try:
        with torch.cuda.device(device):
            digest_every_way(device)
    except RuntimeError as error:  # the digest itself will say so, if it is still true then
        _logger.info("%s is not ready for digests: %s", device, error)


@torch.no_grad()
def digest_every_way(device: torch.device) -> None:
    """Digest a little of a device's memory, so that everything that the first digest needs is there."""
    sizes = (1, 300, *[LONG // 2] * 5)
    tensors = [torch.zeros(n, dtype=torch.float32, device=device) for n in sizes]
    lives = [LiveElements(t, tuple(t.shape), whole(t.shape)) for t in tensors]
    on_device(lives)
    on_device([lives[-1]._replace(dtype="bfloat16", rounded=True)])
