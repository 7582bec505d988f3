"""Plain Python values as JSON data and back, exactly, without pickle.

None, booleans, finite floats, ordinary ints, text, lists and dicts with text keys are JSON's own. Everything else is an
object with the key "$", which names its kind. Tensors are handed to a callback, which stores them and returns a key.

JSON cannot say that one list lies in two places, so it is written twice. If that would repeat too much, it is written
once as a ``shared`` (``n``: its number, ``v``: itself), and elsewhere as a ``same`` (``v``: that number).
"""

from __future__ import annotations

import argparse
import base64
import collections
import io
import math
import pathlib
import struct
import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from ucp.errors import DamagedCheckpoint, UcpError, Unsupported
from ucp.storage import graphs
from ucp.storage.plain_decoder import FACTORIES, Decoder, Get
from ucp.storage.torch_pt.values import DeviceName, DtypeName, Size, Standin, TensorRef

# Ints beyond this are written in hexadecimal: long decimal numbers take Python quadratic time, and it refuses them.
_ORDINARY_INT = 1 << 64

_FACTORY_NAMES = {factory: name for name, factory in FACTORIES.items()}

REPEATS = 250_000
"""Values that may be written again because they are shared."""

# Values other than containers that may be so long that writing them again counts.
_LONG = (str, bytes, bytearray, np.ndarray)

Put = Callable[[Any], Any]


def encode(value: Any, put: Put | None = None, where: str = "value") -> Any:
    """JSON-able data for a plain value. `json.dumps` and `json.loads` with their defaults keep it exact.

    `put(tensor)` stores a tensor (a `TensorRef` or a torch.Tensor) and returns a JSON-able key. `where` begins the path
    that an error names. Shared containers are copied, unless that repeats more than `REPEATS` values. Raises
    `Unsupported` for a value of another class, for a structure that contains itself, and for one nested too deeply.
    """
    try:
        try:
            return _Encoder(put).encode(value, where)
        except _RepeatsError:
            return _Encoder(put, graphs.measure(value).again).encode(value, where)
    except RecursionError as error:
        raise Unsupported(f"{where}: nested too deeply to be stored") from error


def decode(data: Any, get: Get | None = None, *, torch_values: bool = False) -> Any:
    """The value that `encode` was given. `get(key)` returns a stored tensor.

    With `torch_values` (which imports torch) a torch.Size, torch.dtype or torch.device comes back as such, otherwise as
    the torch-free `Size`, `DtypeName` or `DeviceName`. Raises `DamagedCheckpoint` for data that `encode` does not make,
    `Unsupported` for a kind that only a newer release knows.
    """
    try:
        return Decoder(get, torch_values).decode(data)
    except UcpError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, struct.error, RecursionError) as error:
        raise DamagedCheckpoint(f"stored values are damaged: {type(error).__name__}: {error}") from error


def _length(value: Any) -> int:
    return value.nbytes if isinstance(value, np.ndarray) else len(value)


class _RepeatsError(Exception):
    """Copying what is shared would repeat too much."""


class _Encoder:
    """shared: identities of what lies in several places and is written only once; None to write it each time."""

    def __init__(self, put: Put | None, shared: frozenset[int] | None = None) -> None:
        self._put = put
        self._shared = shared
        self._numbers: dict[int, int] = {}  # of what was written as shared, by identity
        self._open: set[int] = set()  # containers that are being encoded
        self._values = 0  # encoded so far
        self._known: dict[int, int] = {}  # how many values there are in a container, by its identity
        self._repeats = 0

    def encode(self, value: Any, where: str) -> Any:
        kind = type(value)
        self._values += 1
        heavy = kind in _CONTAINERS or (kind in _LONG and _length(value) >= graphs.HEAVY)
        if not heavy:
            return self._encode(value, kind, where)
        key = id(value)
        if self._shared is not None and key in self._shared:
            if key in self._numbers:
                return {"$": "same", "v": self._numbers[key]}
            self._numbers[key] = len(self._numbers)
            return {"$": "shared", "n": self._numbers[key], "v": self._encode(value, kind, where)}
        if key in self._known and self._shared is None:
            self._repeats += self._known[key]
            if self._repeats > REPEATS:
                raise _RepeatsError
        before = self._values
        encoded = self._encode(value, kind, where)
        self._known[key] = self._values - before + (_length(value) // 64 if kind in _LONG else 1)
        return encoded

    def _encode(self, value: Any, kind: type, where: str) -> Any:
        if value is None or kind is bool:
            return value
        encoder = _ENCODERS.get(kind)
        if encoder is not None:
            return encoder(value)
        if kind in _CONTAINERS:
            if id(value) in self._open:
                raise Unsupported(f"{where}: contains itself, which cannot be stored")
            self._open.add(id(value))
            try:
                return _CONTAINERS[kind](self, value, where)
            finally:
                self._open.discard(id(value))
        if isinstance(value, np.ndarray | np.generic | np.dtype):
            return _encode_numpy(value, where)
        if isinstance(value, pathlib.PurePath):
            return _encode_path(value, where)
        return self._encode_torch(value, where)

    def items(self, values: Any, where: str) -> list[Any]:
        return [self.encode(item, f"{where}[{index}]") for index, item in enumerate(values)]

    def pairs(self, values: dict[Any, Any], where: str) -> list[list[Any]]:
        return [
            [self.encode(key, f"{where} key {key!r}"), self.encode(item, f"{where}[{key!r}]")]
            for key, item in values.items()
        ]

    def mapping(self, values: dict[Any, Any], where: str) -> Any:
        if all(type(key) is str and not key.startswith("$") and _is_unicode(key) for key in values):
            return {key: self.encode(item, f"{where}[{key!r}]") for key, item in values.items()}
        return {"$": "dict", "v": self.pairs(values, where)}

    def attributes(self, value: Any, where: str) -> list[list[Any]]:
        return [[name, self.encode(item, f"{where}.{name}")] for name, item in value.items()]

    def tensor(self, value: Any, where: str) -> Any:
        if self._put is None:
            raise Unsupported(f"{where}: a tensor, where only plain values can be stored")
        return {"$": "tensor", "v": self._put(value)}

    def _encode_torch(self, value: Any, where: str) -> Any:
        torch = sys.modules.get("torch")
        if torch is not None:
            if isinstance(value, torch.Tensor):
                return self.tensor(value, where)
            if isinstance(value, torch.Size):
                return _encode_size(value)
            if isinstance(value, torch.device):
                return {"$": "torch.device", "v": str(value)}
            if isinstance(value, torch.dtype):
                return {"$": "torch.dtype", "v": str(value).removeprefix("torch.")}
        kind = type(value)
        if (kind.__module__, kind.__qualname__) == ("torch.torch_version", "TorchVersion"):
            return str(value)
        raise Unsupported(
            f"{where}: a value of class {kind.__module__}.{kind.__qualname__} cannot be stored; plain Python "
            "data, numpy arrays, tensors and argparse.Namespace can"
        )


def _is_unicode(text: str) -> bool:
    # Lone surrogates (undecodable file names) are legal in a str, but not in a UTF-8 file.
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _encode_str(value: str) -> Any:
    if _is_unicode(value):
        return value
    return {"$": "str", "v": value.encode("utf-8", "surrogatepass").hex()}


def _encode_int(value: int) -> Any:
    return value if abs(value) < _ORDINARY_INT else {"$": "int", "v": hex(value)}


def _encode_float(value: float) -> Any:
    # JSON has neither infinities nor NaN; the bits keep a NaN's payload.
    return value if math.isfinite(value) else {"$": "float", "v": struct.pack(">d", value).hex(), "text": str(value)}


def _encode_complex(value: complex) -> Any:
    return {"$": "complex", "v": [_encode_float(value.real), _encode_float(value.imag)]}


def _encode_bytes(value: bytes | bytearray) -> Any:
    return {"$": type(value).__name__, "v": base64.b64encode(value).decode("ascii")}


def _encode_range(value: range) -> Any:
    return {"$": "range", "v": [_encode_int(part) for part in (value.start, value.stop, value.step)]}


def _encode_size(value: tuple[int, ...]) -> Any:
    return {"$": "torch.Size", "v": list(value)}


def _encode_numpy(value: Any, where: str) -> Any:
    dtype = value if isinstance(value, np.dtype) else value.dtype
    if dtype.kind not in "biufcSUMm" or (dtype.itemsize == 0 and not isinstance(value, np.ndarray | np.generic)):
        raise Unsupported(f"{where}: a numpy value of type {dtype} cannot be stored; plain numbers and text can")
    if isinstance(value, np.dtype):
        return {"$": "numpy.dtype", "v": dtype.str}
    if isinstance(value, np.generic):
        return {"$": "numpy.scalar", "dtype": dtype.str, "v": _base64(value.tobytes())}
    if type(value) is not np.ndarray:
        raise Unsupported(f"{where}: a numpy array of class {type(value).__name__} cannot be stored")
    order: Literal["C", "F"] = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
    data = _base64(value.tobytes(order))
    return {"$": "numpy.ndarray", "dtype": dtype.str, "shape": list(value.shape), "order": order, "v": data}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _encode_path(value: pathlib.PurePath, where: str) -> Any:
    text = _encode_str(str(value))
    if isinstance(value, pathlib.Path):
        return {"$": "path", "kind": "Path", "v": text}
    if type(value) in (pathlib.PurePosixPath, pathlib.PureWindowsPath):
        return {"$": "path", "kind": type(value).__name__, "v": text}
    raise Unsupported(f"{where}: a path of class {type(value).__name__} cannot be stored")


def _encode_set(self: _Encoder, value: Any, where: str) -> Any:
    # Sorted by their text, so that the same set is always stored alike. So nothing in it may have a number that depends
    # on the order.
    shared, self._shared = self._shared, None if self._shared is None else frozenset()
    items = sorted(self.items(value, where), key=repr)
    self._shared = shared
    return {"$": type(value).__name__, "v": items}


def _encode_ordered(self: _Encoder, value: collections.OrderedDict[Any, Any], where: str) -> Any:
    data = {"$": "OrderedDict", "v": self.pairs(value, where)}
    metadata = vars(value).get("_metadata")
    if metadata is not None:  # torch's state_dict keeps version numbers there
        data["metadata"] = self.encode(metadata, f"{where}._metadata")
    return data


def _encode_defaultdict(self: _Encoder, value: collections.defaultdict[Any, Any], where: str) -> Any:
    factory = value.default_factory
    name = None if factory is None else _FACTORY_NAMES.get(factory)
    if factory is not None and name is None:
        raise Unsupported(f"{where}: a defaultdict of {factory!r} cannot be stored; one of a built-in class can")
    return {"$": "defaultdict", "factory": name, "v": self.pairs(value, where)}


def _encode_standin(self: _Encoder, value: Standin, where: str) -> Any:
    return {
        "$": "standin",
        "class": [value.class_module, value.class_name],
        "args": self.items(value.class_args, f"{where}.class_args"),
        "v": self.attributes(value.state, where),
    }


_ENCODERS: dict[type, Callable[[Any], Any]] = {
    str: _encode_str,
    int: _encode_int,
    float: _encode_float,
    complex: _encode_complex,
    bytes: _encode_bytes,
    bytearray: _encode_bytes,
    io.BytesIO: lambda value: {"$": "BytesIO", "v": _base64(value.getvalue()), "at": value.tell()},
    range: _encode_range,
    Size: _encode_size,
    DtypeName: lambda value: {"$": "torch.dtype", "v": value.name},
    DeviceName: lambda value: {"$": "torch.device", "v": value.name},
}

_CONTAINERS: dict[type, Callable[[_Encoder, Any, str], Any]] = {
    list: lambda self, value, where: self.items(value, where),
    tuple: lambda self, value, where: {"$": "tuple", "v": self.items(value, where)},
    dict: _Encoder.mapping,
    set: _encode_set,
    frozenset: _encode_set,
    slice: lambda self, value, where: {"$": "slice", "v": self.items((value.start, value.stop, value.step), where)},
    collections.deque: lambda self, value, where: {
        "$": "deque",
        "maxlen": value.maxlen,
        "v": self.items(value, where),
    },
    collections.Counter: lambda self, value, where: {"$": "Counter", "v": self.pairs(value, where)},
    collections.OrderedDict: _encode_ordered,
    collections.defaultdict: _encode_defaultdict,
    argparse.Namespace: lambda self, value, where: {"$": "Namespace", "v": self.attributes(vars(value), where)},
    Standin: _encode_standin,
    TensorRef: _Encoder.tensor,
}
