"""Element types under torch's short names ("float32", "bfloat16", ...), without importing torch.

One table says how wide an element is, what safetensors calls the type, and which numpy type has the same bits. Types
that numpy lacks (bfloat16, the float8 family) are viewed as unsigned integers of the same width: copying and comparing
bits needs no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ucp.errors import Unsupported

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Dtype:
    itemsize: int  # bytes
    safetensors: str | None  # the code in a safetensors header, if the format has one
    numpy: str  # the numpy type to view the bits with


_TABLE: dict[str, _Dtype] = {
    "float64": _Dtype(8, "F64", "float64"),
    "float32": _Dtype(4, "F32", "float32"),
    "float16": _Dtype(2, "F16", "float16"),
    "bfloat16": _Dtype(2, "BF16", "uint16"),
    "float8_e4m3fn": _Dtype(1, "F8_E4M3", "uint8"),
    "float8_e5m2": _Dtype(1, "F8_E5M2", "uint8"),
    "float8_e4m3fnuz": _Dtype(1, "F8_E4M3FNUZ", "uint8"),
    "float8_e5m2fnuz": _Dtype(1, "F8_E5M2FNUZ", "uint8"),
    "float8_e8m0fnu": _Dtype(1, "F8_E8M0", "uint8"),
    "int64": _Dtype(8, "I64", "int64"),
    "int32": _Dtype(4, "I32", "int32"),
    "int16": _Dtype(2, "I16", "int16"),
    "int8": _Dtype(1, "I8", "int8"),
    "uint64": _Dtype(8, "U64", "uint64"),
    "uint32": _Dtype(4, "U32", "uint32"),
    "uint16": _Dtype(2, "U16", "uint16"),
    "uint8": _Dtype(1, "U8", "uint8"),
    "bool": _Dtype(1, "BOOL", "bool"),
    "complex32": _Dtype(4, None, "uint32"),
    "complex64": _Dtype(8, "C64", "complex64"),
    "complex128": _Dtype(16, None, "complex128"),
}

_BY_SAFETENSORS = {row.safetensors: name for name, row in _TABLE.items() if row.safetensors}

FLOAT_SPELLINGS: Mapping[str, str] = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    **{name: name for name in ("bfloat16", "float16", "float32", "float64")},
}
"""What people may call the element types that weights are written in."""

# torch/__init__.py has one storage class per type that existed before torch 2.3. Newer types are stored untyped.
_BY_STORAGE_CLASS = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}

# torch's other spellings of the same types.
_ALIASES = {
    "float": "float32",
    "double": "float64",
    "half": "float16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
    "cfloat": "complex64",
    "cdouble": "complex128",
    "chalf": "complex32",
}


def names() -> tuple[str, ...]:
    """All supported canonical names."""
    return tuple(_TABLE)


def canonical(name: str) -> str:
    """The canonical form of a torch spelling: "torch.half" and "half" are "float16".

    Raises `Unsupported` for a type that the table lacks (quantised types, sub-byte integers).
    """
    short = name.removeprefix("torch.")
    short = _ALIASES.get(short, short)
    if short not in _TABLE:
        raise Unsupported(f"dtype {name!r} is not supported; supported are {', '.join(_TABLE)}")
    return short


@cache
def itemsize(name: str) -> int:
    """Width of one element in bytes. Raises `Unsupported` for an unknown type."""
    return _row(name).itemsize


def to_safetensors(name: str) -> str:
    """The safetensors code ("F32", "BF16", ...). Raises `Unsupported` if the format has none."""
    code = _row(name).safetensors
    if code is None:
        raise Unsupported(f"dtype {name!r} cannot be stored in a safetensors file")
    return code


def from_safetensors(code: str) -> str:
    """The name for a safetensors code. Raises `Unsupported` for an unknown code."""
    if code not in _BY_SAFETENSORS:
        known = ", ".join(sorted(_BY_SAFETENSORS))
        raise Unsupported(f"unknown safetensors dtype {code!r}; known are {known}")
    return _BY_SAFETENSORS[code]


@cache
def numpy_dtype(name: str) -> np.dtype:
    """The little-endian numpy type to view such elements with: same width, and the same meaning if numpy has it."""
    return np.dtype(_row(name).numpy).newbyteorder("<")


def is_numpy_native(name: str) -> bool:
    """Whether `numpy_dtype` also has the meaning of the type, not only its width."""
    return _row(name).numpy == name


def from_storage_class(class_name: str) -> str:
    """The element type of a torch storage class ("FloatStorage" is "float32"). Raises `Unsupported` if unknown."""
    if class_name not in _BY_STORAGE_CLASS:
        raise Unsupported(f"torch storage class {class_name!r} is not supported (quantised tensors are not)")
    return _BY_STORAGE_CLASS[class_name]


def to_torch(name: str) -> torch.dtype:
    """The torch dtype. Imports torch. Raises `Unsupported` if this torch lacks the type."""
    import torch

    _row(name)
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise Unsupported(f"dtype {name!r} needs a newer torch than {torch.__version__}")
    return dtype


@lru_cache(64)
def from_torch(dtype: torch.dtype) -> str:
    """The canonical name of a torch dtype. Raises `Unsupported` for quantised and sub-byte types."""
    return canonical(str(dtype))


def _row(name: str) -> _Dtype:
    row = _TABLE.get(name)
    if row is None:
        canonical(name)  # explains an unknown type; a known alias falls through
        raise Unsupported(f"dtype {name!r} is an alias; use {canonical(name)!r}")
    return row
