"""Rows of words times the keys of a logical digest, on a device, and the tables for that.

There are two ways to multiply rows by the table, both exact. The faster one takes the bytes as they are: a row of
1,024 signed bytes times the digits of 8 bits of each byte's key, a product of matrices of bytes with sums of 32 bits.
Three of the four bytes of a word have no sign, so 128 is taken from each of them on the way, and the same for every row
is added again. The other one converts words into doubles, as `ucp.logical.digest` does. A device that lacks the first,
or that gives another result in the test that is made once, has the second.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from ucp.geometry import Ints
from ucp.logical import digest
from ucp.logical.digest import COLUMNS, DIGIT_BITS, DIGITS, LANES, ROW
from ucp.logical.runs import mixed
from ucp.printable import logger

# How many rows are multiplied at once (24 MiB), and of how many the products are kept (6 MiB).
ROWS_AT_ONCE, ROWS_KEPT = 24 << 10, 96 << 10
# At least so many rows are multiplied: products of fewer are refused for bytes.
_LEAST_ROWS = 32
# How many row keys are kept on a device (16 MiB).
_KEPT = 1 << 20
# Of each word, the bytes without a sign less 128.
_SIGNED = 0x00808080
_BYTE_DIGITS = 8

_logger = logger(__name__)


class ByteProducts:
    """Rows times the digits of each byte's key."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bytes = torch.empty((ROWS_AT_ONCE, COLUMNS), dtype=torch.int32, device=device)
        self._found = torch.empty((ROWS_KEPT + _LEAST_ROWS, LANES * _BYTE_DIGITS), dtype=torch.int32, device=device)
        self._waiting = 0  # rows that are not yet multiplied
        self._done = 0

    @property
    def room(self) -> int:
        """How many rows can still be taken."""
        return ROWS_KEPT - self._done - self._waiting

    def take(self, words: torch.Tensor) -> int:
        """Take the first of these rows. Returns how many."""
        count = min(len(words), self.room, ROWS_AT_ONCE - self._waiting)
        torch.bitwise_xor(words[:count], _SIGNED, out=self._bytes[self._waiting : self._waiting + count])
        self._waiting += count
        if self._waiting == ROWS_AT_ONCE:
            self._multiply()
        return count

    def values(self) -> torch.Tensor:
        """(n, 2) the sums of the rows that were taken. Then there are none any more."""
        self._multiply()
        weights, constant = _byte_weights(self._device)
        each = torch.mul(self._found[: self._done], weights).view(-1, LANES, _BYTE_DIGITS)
        self._done = 0
        return each.sum(2).add_(constant)

    def _multiply(self) -> None:
        if self._waiting:
            rows = max(self._waiting, _LEAST_ROWS)
            out = self._found[self._done : self._done + rows]
            torch._int_mm(self._bytes[:rows].view(torch.int8), _byte_table(self._device), out=out)
            self._done += self._waiting
            self._waiting = 0


class DoubleProducts:
    """Rows, as doubles, times the digits of each word's key. With the same methods as `ByteProducts`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._doubles = torch.empty((ROWS_AT_ONCE // 2, COLUMNS), dtype=torch.float64, device=device)
        self._exact = torch.empty((ROWS_KEPT, LANES * DIGITS), dtype=torch.float64, device=device)
        self._done = 0

    @property
    def room(self) -> int:
        return ROWS_KEPT - self._done

    def take(self, words: torch.Tensor) -> int:
        count = min(len(words), self.room, len(self._doubles))
        self._doubles[:count].copy_(words[:count])
        torch.mm(self._doubles[:count], _digits(self._device), out=self._exact[self._done : self._done + count])
        self._done += count
        return count

    def values(self) -> torch.Tensor:
        exact = self._exact[: self._done].to(torch.int64).view(-1, LANES, DIGITS)
        self._done = 0
        return (exact * _weights(self._device)).sum(2)


@lru_cache(16)
def has_byte_products(device: torch.device) -> bool:
    """Whether the device multiplies matrices of bytes, and rightly."""
    words = mixed(np.arange(_LEAST_ROWS * COLUMNS // 2, dtype=np.uint64)).view(np.int32).reshape(-1, COLUMNS)
    wanted = np.dot(digest.products(words).reshape(-1, LANES, DIGITS), digest.weights())
    try:
        products = ByteProducts(device)
        products.take(torch.from_numpy(words).to(device))
        return bool((products.values().cpu().numpy() == wanted).all())
    except (RuntimeError, AttributeError) as error:
        _logger.info("digests on %s are made with doubles: %s", device, error)
        return False


# --- keys ------------------------------------------------------------------------------------------------------------


@lru_cache(16)
def _byte_table(device: torch.device) -> torch.Tensor:
    """(1024, 16) the digits of each byte's key: those of the first lane, least significant first, then the second's.

    It lies in memory column by column, as products of bytes want it.
    """
    keys = digest.table().view(np.uint64)[:, :, None] << (8 * np.arange(4, dtype=np.uint64))
    rest = keys.reshape(LANES, ROW)
    found = np.empty((LANES, _BYTE_DIGITS, ROW), np.int8)
    for place in range(_BYTE_DIGITS):
        low = (rest & np.uint64(0xFF)).astype(np.uint8).view(np.int8)
        found[:, place] = low
        rest = (rest - low.astype(np.int64).view(np.uint64)) >> np.uint64(8)
    return torch.from_numpy(found.reshape(-1, ROW)).to(device).t()


@lru_cache(16)
def _byte_weights(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(16,) the place value of each digit, and (2,) what was taken from a row's bytes, in both lanes."""
    weights = np.tile(np.uint64(1) << (8 * np.arange(_BYTE_DIGITS, dtype=np.uint64)), LANES)
    constant = digest.table().view(np.uint64).sum(1) * np.uint64(_SIGNED)
    return torch.from_numpy(weights.view(np.int64)).to(device), torch.from_numpy(constant.view(np.int64)).to(device)


@lru_cache(16)
def _digits(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(digest.digits()).to(device)


@lru_cache(16)
def _weights(device: torch.device) -> torch.Tensor:
    return torch.tensor([1 << DIGIT_BITS * k for k in range(DIGITS)], device=device)


@lru_cache(16)
def column_keys(device: torch.device) -> torch.Tensor:
    """(2, 256) `ucp.logical.digest.table`."""
    return torch.from_numpy(digest.table()).to(device)


_kept_keys: dict[torch.device, torch.Tensor] = {}


def keys_of(device: torch.device, first: int, count: int) -> torch.Tensor:
    """(2, count) the keys of rows from ``first`` on."""
    if first + count > _KEPT:
        return _row_keys(torch.arange(first, first + count, device=device))
    return _kept(device, first + count)[:, first : first + count]


def keys_at(device: torch.device, rows: torch.Tensor | Ints) -> torch.Tensor:
    """(2, n) the keys of these rows."""
    if isinstance(rows, np.ndarray):
        highest, rows = int(rows.max()), torch.from_numpy(rows).to(device)
        if highest < _KEPT:
            return _kept(device, highest + 1)[:, rows]
    return _row_keys(rows)


def _kept(device: torch.device, count: int) -> torch.Tensor:
    found = _kept_keys.get(device)
    if found is None or found.shape[1] < count:
        step = 1 << 16
        wanted = min(_KEPT, max(step, 1 << (count - 1).bit_length()))
        found = torch.empty((LANES, wanted), dtype=torch.int64, device=device)
        for at in range(0, wanted, step):
            found[:, at : at + step] = _row_keys(torch.arange(at, at + step, device=device))
        _kept_keys[device] = found
    return found


def _row_keys(rows: torch.Tensor) -> torch.Tensor:
    """`ucp.logical.digest.row_keys` in torch, whose 64-bit words have a sign."""
    z = rows * LANES + torch.arange(LANES, device=rows.device)[:, None]
    z = z + (digest.KEY_SEED + 1)
    z = z * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ ((z >> shift) & ((1 << 64 - shift) - 1))) * _signed(factor)
    return (z ^ ((z >> 31) & ((1 << 33) - 1))) | 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
