"""Logical digests on a GPU by one kernel of ours, compiled in the process by CUDA's own runtime compiler.

Torch's operations read the bytes three times and take thousands of launches for a few hundred tensors. This kernel
reads them once, where they lie, as fast as the memory gives them, and one launch takes all runs of all tensors: they
are listed in a table. It also takes runs that begin at any byte and runs of a few bytes, so nothing is put together
before. It is compiled by the ways of ``torch.cuda._compile_kernel`` (torch 2.9 and newer), which need neither a C
compiler nor Triton. Where there is none, or where it gives another result in the test that is made once,
`ucp.job.device_digest` does the same with torch's operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ucp.geometry import Ints
from ucp.job import runtime_compiler
from ucp.job.device_products import column_keys
from ucp.logical.batch import lanes_of
from ucp.logical.digest import COLUMNS, KEY_SEED, LANES, ROW, digest_bytes
from ucp.logical.runs import LIMIT, Run, Runs, mixed
from ucp.printable import logger

ROWS = 64
"""Rows of a run that one block of threads adds up."""

WAITING = 24 << 20
"""Bytes of memory that was made for the digest, and waits in the table for the kernel."""

_logger = logger(__name__)

SOURCE = r"""
typedef long long i64;
typedef unsigned long long u64;

__device__ u64 mixed(u64 z)
{
    z = (z + 1ull) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// table: five rows of count numbers: each run's address, its first byte in the tensor's row of bytes, how many bytes,
// whose it is, and its first block of threads. Then of each block of threads its run. keys: the columns', 2 x 256.
extern "C" __global__ void ucp_add_runs(const i64 *table, const i64 *keys, u64 *sums, int count)
{
    __shared__ u64 factors[2][ROWS];
    __shared__ u64 parts[2][256];
    const i64 total = count, column = threadIdx.x, run = table[5 * total + blockIdx.x];
    const i64 address = table[run], place = table[total + run], stop = place + table[2 * total + run];
    const i64 first = place / 1024 + ((i64)blockIdx.x - table[4 * total + run]) * ROWS;
    const i64 left = (stop - 1) / 1024 - first + 1;
    const int rows = left < ROWS ? (int)left : ROWS;
    for (int k = (int)column; k < 2 * rows; k += 256)
        factors[k & 1][k >> 1] = mixed((u64)(2 * first + k) + SEED) | 1ull;
    __syncthreads();
    const i64 shift = address - place;
    const i64 at = first * 1024 + 4 * column;
    u64 one = 0, two = 0;
    if ((shift & 3) == 0 && first * 1024 >= place && (first + rows) * 1024 <= stop) {
        const int *words = (const int *)(shift + at);
#pragma unroll 8
        for (int row = 0; row < rows; ++row) {
            const u64 word = (u64)(i64)words[256 * row];
            one += factors[0][row] * word;
            two += factors[1][row] * word;
        }
    } else {
        for (int row = 0; row < rows; ++row) {
            const i64 low = at + 1024 * row;
            unsigned int bits = 0;
            for (int k = 0; k < 4; ++k)
                if (low + k >= place && low + k < stop)
                    bits |= (unsigned int)*(const unsigned char *)(shift + low + k) << (8 * k);
            const u64 word = (u64)(i64)(int)bits;
            one += factors[0][row] * word;
            two += factors[1][row] * word;
        }
    }
    parts[0][column] = one * (u64)keys[column];
    parts[1][column] = two * (u64)keys[256 + column];
    for (int half = 128; half; half >>= 1) {
        __syncthreads();
        if (column < half) {
            parts[0][column] += parts[0][column + half];
            parts[1][column] += parts[1][column + half];
        }
    }
    __syncthreads();
    if (column < 2)
        atomicAdd(sums + 2 * table[3 * total + run] + column, parts[column][0]);
}
""".replace("ROWS", str(ROWS)).replace("SEED", f"{KEY_SEED}ull")

Launch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int], None]
"""Runs the kernel: the table, the columns' keys, the sums, how many runs the table has, and how many blocks of threads
there are."""


class KernelSums:
    """The sums of several tensors of a device, with the methods of `ucp.job.device_digest.DeviceSums`."""

    def __init__(self, device: torch.device, count: int, launch: Launch) -> None:
        self._device = device
        self._launch = launch
        self._sums = torch.zeros((count, LANES), dtype=torch.int64, device=device)
        self._columns: list[Ints] = []
        self._held: list[torch.Tensor] = []
        self._runs = self._waiting = 0

    def add(self, index: int, raw: torch.Tensor, runs: Runs) -> None:
        """Bytes of one of them, and where they belong. They may have been made for this."""
        there = runs if runs.sizes.all() else runs.take(np.flatnonzero(runs.sizes))
        if not len(there):
            return
        columns = (there.sources + raw.data_ptr(), there.places, there.sizes, np.full(len(there), index))
        self._columns.append(np.stack(columns))
        self._held.append(raw)
        self._runs += len(there)
        self._waiting += raw.nbytes
        if self._waiting >= WAITING or self._runs >= LIMIT:
            self._flush()

    def add_alike(self, owners: Ints, tensors: Sequence[torch.Tensor], runs: Sequence[Run]) -> None:
        """Contiguous tensors that are cut alike, in memory that is there anyway. owners: (n,) which of them each is.
        runs: of each, which have bytes."""
        begins = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        columns = np.empty((4, len(runs), len(begins)), np.int64)
        for k, (source, place, size) in enumerate(runs):
            columns[0, k] = begins + source
            columns[1, k], columns[2, k], columns[3, k] = place, size, owners
        self._columns.append(columns.reshape(4, -1))
        self._held.extend(tensors)
        self._runs += columns[0].size

    def finish(self) -> NDArray[np.uint64]:
        """(count, 2) both lanes of the tensors' digests."""
        self._flush()
        return self._sums.cpu().numpy().view(np.uint64)

    def _flush(self) -> None:
        """Have all runs that are noted added up."""
        if self._runs:
            address, place, size, owner = np.concatenate(self._columns, axis=1)
            rows = (place + size - 1) // ROW - place // ROW + 1
            blocks = -(-rows // ROWS)
            count, total = len(blocks), int(blocks.sum())
            which = np.repeat(np.arange(count), blocks)
            table = np.concatenate([address, place, size, owner, np.cumsum(blocks) - blocks, which])
            sent = torch.from_numpy(table).to(self._device)
            self._launch(sent, column_keys(self._device), self._sums, count, total)
        self._columns.clear()
        self._held.clear()
        self._runs = self._waiting = 0


@lru_cache(16)
def launch_of(device: torch.device) -> Launch | None:
    """What runs the kernel on this device; None where it cannot, or gives another result than the host's digest."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    try:
        with torch.cuda.device(device):
            launch = _compiled(device)
            if is_right(launch, device):
                return launch
        _logger.info("digests on %s are made by torch's operations: the kernel's are wrong", device)
    except (RuntimeError, AttributeError, OSError, ImportError, TypeError, ValueError) as error:
        _logger.info("digests on %s are made by torch's operations: %s", device, error)
    return None


def _compiled(device: torch.device) -> Launch:
    kernel: Any
    try:
        kernel = runtime_compiler.kernel(SOURCE, "ucp_add_runs")
    except (RuntimeError, AttributeError, OSError, ImportError, TypeError, ValueError) as error:
        _logger.info("torch compiles for %s: %s", device, error)
        kernel = torch.cuda._compile_kernel(SOURCE, "ucp_add_runs")

    def launch(table: torch.Tensor, keys: torch.Tensor, sums: torch.Tensor, count: int, blocks: int) -> None:
        with torch.cuda.device(device):
            kernel(grid=(blocks, 1, 1), block=(COLUMNS, 1, 1), args=[table, keys, sums, count])

    return launch


def is_right(launch: Launch, device: torch.device) -> bool:
    """Whether the kernel gives what the host does: for whole rows, for ends within rows and words, at any byte."""
    words = mixed(np.arange(3 * ROWS * COLUMNS // 2, dtype=np.uint64)).view(np.uint8)
    raw = torch.from_numpy(words).to(device)
    several = [(0, 0, len(words)), (1024, 5 * ROW, 2 * ROW), (8, 4, 9000), (5, 3, 1), (7, 2046, 70_001), (3, 6, 4097)]
    sums = KernelSums(device, len(several) + 1, launch)
    wanted = []
    for index, run in enumerate(several):
        sums.add_alike(np.array([index]), [raw], [run])
        wanted.append(digest_bytes(words, Runs(*(np.array([n], np.int64) for n in run))))
    short = Runs(np.arange(100) * 37, np.arange(100) * 531 + 2, np.full(100, 30))
    sums.add(len(several), raw, short)
    return bool((sums.finish() == lanes_of([*wanted, digest_bytes(words, short)])).all())
