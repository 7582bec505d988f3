"""Erasure coding of equally long pieces: with one parity by XOR, with more by Reed-Solomon over GF(2⁸).

There are k pieces of data and m of parity. Any k of these k + m give all of them. Reed-Solomon is ISA-L's (Cauchy
matrix), from the system's library or from pyeclib's wheel: 17 to 32 GB/s a core, where zfec has 1.6 to 1.9 for one
parity.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ucp.errors import Unsupported

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

MEMBERS_MAX_COUNT = 255  # a Cauchy matrix over GF(2⁸) has no more rows and columns


def parity(k: int, m: int, row: int, pieces: Sequence[Bytes], out: Bytes) -> None:
    """Compute parity number ``row`` of k pieces. Raises Unsupported if m > 1 and ISA-L is missing."""
    if m == 1:
        out[:] = pieces[0]
        for piece in pieces[1:]:
            np.bitwise_xor(out, piece, out=out)
        return
    _combine(_matrix(k, m)[k + row : k + row + 1], pieces, [out])


def restored(k: int, m: int, have: Mapping[int, Bytes], wanted: int) -> Bytes:
    """The wanted piece of data, from any k others. have: number -> piece; parity has the numbers from k on."""
    if len(have) < k:
        raise ValueError(f"{k} pieces are needed, and {len(have)} are there")
    rows = sorted(have)[:k]
    out = np.empty_like(have[rows[0]])
    if m == 1:
        parity(k, 1, 0, [have[row] for row in rows], out)
        return out
    whole = np.ascontiguousarray(_matrix(k, m)[rows])
    inverse = np.zeros_like(whole)
    if _isal().gf_invert_matrix(_address(whole), _address(inverse), k):
        raise ValueError("these pieces do not determine the others")
    _combine(inverse[wanted : wanted + 1], [have[row] for row in rows], [out])
    return out


def check(m: int) -> None:
    """Raise Unsupported if this machine cannot code for this many losses."""
    if m > 1:
        _isal()


@functools.lru_cache(64)
def _matrix(k: int, m: int) -> Bytes:
    """The identity, and below it the coefficients of the parities. It has k columns."""
    if k + m > MEMBERS_MAX_COUNT:
        raise Unsupported(
            f"a group of {k + m} nodes is more than Reed-Solomon over GF(2⁸) codes for; set a smaller one"
        )
    out = np.zeros((k + m, k), np.uint8)
    _isal().gf_gen_cauchy1_matrix(_address(out), k + m, k)
    return out


def _combine(coefficients: Bytes, pieces: Sequence[Bytes], out: Sequence[Bytes]) -> None:
    rows, k = coefficients.shape
    tables = np.zeros(32 * k * rows, np.uint8)
    coefficients = np.ascontiguousarray(coefficients)
    _isal().ec_init_tables(k, rows, _address(coefficients), _address(tables))
    sources = (ctypes.c_void_p * k)(*(piece.ctypes.data for piece in pieces))
    targets = (ctypes.c_void_p * rows)(*(piece.ctypes.data for piece in out))
    _isal().ec_encode_data(len(out[0]), k, rows, _address(tables), sources, targets)


def _address(array: Bytes) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@functools.lru_cache(1)
def _isal() -> ctypes.CDLL:
    found = ctypes.util.find_library("isal")
    names = [found] if found else []
    brings = importlib.util.find_spec("pyeclib")
    if brings is not None and brings.origin is not None:
        place = Path(brings.origin).parents[1] / "pyeclib.libs"
        names += [str(path) for path in sorted(place.glob("libisal*"))]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise Unsupported(
        '"redundancy" above 1 needs the library ISA-L, which is not here: pip install '
        "'universal-checkpoint[memory]', or the system's package libisal"
    )
