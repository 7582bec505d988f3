"""What a pickle's calls of numpy make: dtypes, scalars and arrays of plain numbers and text, and nothing else."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from ucp import limits
from ucp.errors import Unsupported
from ucp.printable import short
from ucp.storage.torch_pt.named import Global

_SIMPLE_NUMPY = re.compile(r"[<>|=]?(?:[?bBhHiIlLqQefdgFD]|[biufc]\d{1,2}|[SU]\d{1,9})\Z")


def dtype_of(spec: Any, align: Any = False, copy: Any = False) -> np.dtype[Any]:
    if not isinstance(spec, str) or not _SIMPLE_NUMPY.match(spec):
        raise Unsupported(f"it holds a numpy array of type {short(spec)}; only plain numbers and text are supported")
    return np.dtype(spec)


def check_dtype_state(dtype: np.dtype[Any], state: Any) -> None:
    # numpy pickles the byte order as state, and a field layout that simple types lack. Nothing else is taken from it.
    if not isinstance(state, tuple) or len(state) < 5 or state[2:5] != (None, None, None):
        raise Unsupported("it holds a numpy array of a structured type, which is not supported")
    if state[1] == ">":
        raise Unsupported("it holds a big-endian numpy array, which is not supported")


def scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise TypeError("a numpy scalar is a dtype and its bytes")
    return np.frombuffer(data, dtype, count=1)[0] if data else dtype.type()


def reconstruct(array_class: Any, shape: Any, kind: Any) -> np.ndarray[Any, Any]:
    if array_class != Global("numpy", "ndarray"):
        raise TypeError(f"a numpy array of class {short(array_class)}")
    return np.empty(0, np.uint8)


def set_array(array: np.ndarray[Any, Any], state: Any) -> None:
    _, shape, dtype, fortran, data = state
    _check_array(dtype, shape, data)
    fields: Any = (1, shape, dtype, bool(fortran), bytes(data))
    array.__setstate__(fields)


def frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    _check_array(dtype, shape, data)
    if order not in ("C", "F"):
        raise TypeError(f"a numpy array of order {short(order)}")
    return np.frombuffer(bytearray(data), dtype).reshape(shape, order=order)


def _check_array(dtype: Any, shape: Any, data: Any) -> None:
    if isinstance(data, list):
        raise Unsupported("it holds a numpy array of Python objects, which is not supported")
    if not isinstance(dtype, np.dtype) or not isinstance(shape, tuple) or not isinstance(data, bytes | bytearray):
        raise TypeError("a numpy array is a shape, a dtype and bytes")
    if dtype.itemsize == 0 and math.prod(shape) > limits.EMPTY_ITEMS:
        raise ValueError(f"a numpy array of {math.prod(shape)} elements that have no bytes")
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"a numpy array of shape {shape} and type {dtype} does not have {len(data)} bytes")
