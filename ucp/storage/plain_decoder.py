"""Values from the JSON data that `ucp.storage.plain` writes: what each kind stands for, and what is refused."""

from __future__ import annotations

import argparse
import base64
import collections
import io
import math
import pathlib
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from ucp import limits
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.storage import dtypes
from ucp.storage.torch_pt.values import DeviceName, DtypeName, Size, Standin

# The form of `numpy.dtype.str` for the types that are stored.
_NUMPY_TYPE = re.compile(r"[<>|](?:[biufc]\d{1,2}|[SU]\d{1,9}|[Mm]8(?:\[\w{1,12}\])?)", re.ASCII)

# The classes whose values a defaultdict may make for a missing key, by the names that are stored.
FACTORIES: dict[str, Any] = {
    "dict": dict,
    "list": list,
    "set": set,
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "tuple": tuple,
    "OrderedDict": collections.OrderedDict,
    "Counter": collections.Counter,
}

Get = Callable[[Any], Any]


class Decoder:
    """Makes values from the data of one `decode`. get: returns a stored tensor by its key."""

    def __init__(self, get: Get | None, torch_values: bool) -> None:
        self._get = get
        self._torch_values = torch_values
        self._shared: dict[Any, Any] = {}

    def decode(self, data: Any) -> Any:
        if isinstance(data, list):
            return [self.decode(item) for item in data]
        if not isinstance(data, dict):
            return data
        if "$" not in data:
            return {key: self.decode(item) for key, item in data.items()}
        kind = data["$"]
        if kind == "tensor":
            if self._get is None:
                raise DamagedCheckpoint("stored values refer to a tensor, where only plain values can be")
            return self._get(data["v"])
        if kind in _TORCH_KINDS:
            return self._torch(kind, data["v"])
        if kind == "shared":
            value = self._shared[data["n"]] = self.decode(data["v"])
            return value
        if kind == "same":
            return self._shared[data["v"]]
        decoder = _DECODERS.get(kind)
        if decoder is None:
            raise Unsupported(f"stored values hold a {kind!r}, which this release does not know")
        return decoder(self, data)

    def items(self, data: dict[str, Any]) -> list[Any]:
        if not isinstance(data["v"], list):
            raise TypeError(f"a {data['$']} without its items")
        return [self.decode(item) for item in data["v"]]

    def pairs(self, data: dict[str, Any]) -> list[tuple[Any, Any]]:
        return [(self.decode(key), self.decode(item)) for key, item in data["v"]]

    def _torch(self, kind: str, value: Any) -> Any:
        if kind == "torch.Size" and not (isinstance(value, list) and all(type(n) is int for n in value)):
            raise TypeError("a torch.Size is a list of whole numbers")
        if kind != "torch.Size" and not isinstance(value, str):
            raise TypeError(f"a {kind} is a name")
        if not self._torch_values:
            return {"torch.Size": Size, "torch.dtype": DtypeName, "torch.device": DeviceName}[kind](value)
        import torch

        if kind == "torch.dtype":
            return dtypes.to_torch(value)
        return torch.Size(value) if kind == "torch.Size" else torch.device(value)


_TORCH_KINDS = ("torch.Size", "torch.dtype", "torch.device")


def _bytes(data: dict[str, Any]) -> bytes:
    return base64.b64decode(data["v"], validate=True)


def _decode_ordered(self: Decoder, data: dict[str, Any]) -> Any:
    ordered = collections.OrderedDict(self.pairs(data))
    if "metadata" in data:
        vars(ordered)["_metadata"] = self.decode(data["metadata"])
    return ordered


def _decode_defaultdict(self: Decoder, data: dict[str, Any]) -> Any:
    factory = None if data["factory"] is None else FACTORIES[data["factory"]]
    return collections.defaultdict(factory, self.pairs(data))


def _decode_counter(self: Decoder, data: dict[str, Any]) -> Any:
    return collections.Counter(dict(self.pairs(data)))


def _decode_dtype(text: Any) -> np.dtype[Any]:
    if not _NUMPY_TYPE.fullmatch(text):
        raise ValueError(f"a numpy type {text!r}")
    return np.dtype(text)


def _decode_array(self: Decoder, data: dict[str, Any]) -> Any:
    dtype, shape = _decode_dtype(data["dtype"]), tuple(data["shape"])
    content = bytearray(_bytes(data))
    if dtype.itemsize == 0:
        if math.prod(shape) > limits.EMPTY_ITEMS:
            raise ValueError(f"an array of {math.prod(shape)} elements that have no bytes")
        return np.zeros(shape, dtype)
    return np.frombuffer(content, dtype).reshape(shape, order=data["order"])


def _decode_scalar(self: Decoder, data: dict[str, Any]) -> Any:
    dtype = _decode_dtype(data["dtype"])
    return np.frombuffer(_bytes(data), dtype, count=1)[0] if dtype.itemsize else dtype.type()


def _decode_namespace(self: Decoder, data: dict[str, Any]) -> Any:
    namespace = argparse.Namespace()
    vars(namespace).update(self.pairs(data))
    return namespace


def _decode_bytes_io(self: Decoder, data: dict[str, Any]) -> Any:
    stream = io.BytesIO(_bytes(data))
    stream.seek(data["at"])
    return stream


def _decode_path(self: Decoder, data: dict[str, Any]) -> Any:
    kinds = {"Path": pathlib.Path, "PurePosixPath": pathlib.PurePosixPath, "PureWindowsPath": pathlib.PureWindowsPath}
    return kinds[data["kind"]](self.decode(data["v"]))


def _decode_standin(self: Decoder, data: dict[str, Any]) -> Any:
    module, name = data["class"]
    return Standin(module, name, tuple(self.decode(data["args"])), dict(self.pairs(data)))


_DECODERS: dict[str, Callable[[Decoder, dict[str, Any]], Any]] = {
    "dict": lambda self, data: dict(self.pairs(data)),
    "str": lambda self, data: bytes.fromhex(data["v"]).decode("utf-8", "surrogatepass"),
    "int": lambda self, data: int(data["v"], 16),
    "float": lambda self, data: struct.unpack(">d", bytes.fromhex(data["v"]))[0],
    "complex": lambda self, data: complex(*self.items(data)),
    "bytes": lambda self, data: _bytes(data),
    "bytearray": lambda self, data: bytearray(_bytes(data)),
    "BytesIO": _decode_bytes_io,
    "range": lambda self, data: range(*self.items(data)),
    "tuple": lambda self, data: tuple(self.items(data)),
    "set": lambda self, data: set(self.items(data)),
    "frozenset": lambda self, data: frozenset(self.items(data)),
    "slice": lambda self, data: slice(*self.items(data)),
    "deque": lambda self, data: collections.deque(self.items(data), data["maxlen"]),
    "Counter": _decode_counter,
    "OrderedDict": _decode_ordered,
    "defaultdict": _decode_defaultdict,
    "Namespace": _decode_namespace,
    "numpy.dtype": lambda self, data: _decode_dtype(data["v"]),
    "numpy.scalar": _decode_scalar,
    "numpy.ndarray": _decode_array,
    "path": _decode_path,
    "standin": _decode_standin,
}

KINDS = (*_DECODERS, *_TORCH_KINDS)
"""What "$" may be, beside tensors and what is shared."""
