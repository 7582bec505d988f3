"""Pickling what torch would unpickle, without torch and without the classes that the pickle names.

A tensor is a `Placeholder`, whose data may come later. An object of a class that is not here is a `Standin`: it is
pickled by its class's name.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

from ucp.errors import Unsupported
from ucp.geometry import row_major, span
from ucp.storage.dtypes import canonical, itemsize
from ucp.storage.torch_pt.values import DeviceName, DtypeName, Size, Standin, TensorRef

# torch/storage.py: the classes that name an element type in a pickle; types without one are stored untyped.
_STORAGE_CLASSES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}


@dataclass(frozen=True, eq=False)
class SharedStorage:
    """A storage that several placeholders share. size: bytes. data: its bytes, if they are already known."""

    size: int
    data: bytes | None = None


@dataclass(frozen=True, eq=False)
class Placeholder:
    """A tensor whose data comes later. Every instance is its own tensor, equal to no other.

    shape, strides: in elements; strides are row-major by default.
    storage: what it lies in from element ``offset`` on; by default one of its own, just large enough.
    is_parameter: load as an ``nn.Parameter``.
    data: the storage's bytes, if they are already known.

    The same instance in two places of an object is one tensor in both when loaded.
    """

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None = None
    storage: SharedStorage | None = None
    offset: int = 0
    is_parameter: bool = False
    data: bytes | None = None

    @property
    def extent(self) -> int:
        """Bytes from the storage's beginning to the end of the tensor's last element."""
        if 0 in self.shape:
            return 0
        strides = row_major(self.shape) if self.strides is None else self.strides
        return (self.offset + span(self.shape, strides)) * itemsize(self.dtype)


@dataclass(frozen=True)
class _GlobalName:
    """A class or function, by name alone."""

    module: str
    name: str


def pickled(obj: Any) -> bytes:
    """A pickle of an object without tensors. Raises what pickling raises, and `Unsupported` for a `TensorRef`."""
    stream = io.BytesIO()
    Pickler(stream).dump(obj)
    return stream.getvalue()


# Python's own pickler in Python, since its methods are needed. Type stubs know the class without them.
_PythonPickler: Any = pickle._Pickler


class Pickler(_PythonPickler):
    """Protocol 2, as torch writes it. Classes that are not here are named, not looked up."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=2)
        self.storages: list[SharedStorage] = []
        self.placed: dict[Placeholder, int] = {}
        self._keys: dict[SharedStorage, int] = {}
        self._names: dict[_GlobalName, _GlobalName] = {}
        self._embedded: dict[int, tuple[Placeholder, Any]] = {}

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        kind = type(obj)
        if kind is _GlobalName:
            return self._save_name(obj)
        known = self.memo.get(id(obj))
        if known is not None:
            self.write(self.get(known[0]))
            return None
        if kind is Placeholder:
            self._save_tensor(obj)
        elif kind is Standin:
            self._save_standin(obj)
        elif kind is DtypeName:
            self.save(_GlobalName("torch", obj.name))
        elif kind is DeviceName:
            name, _, index = obj.name.partition(":")
            self._call(_GlobalName("torch", "device"), (name, int(index)) if index else (name,), obj)
        elif kind is Size:
            self._call(_GlobalName("torch", "Size"), (tuple(obj),), obj)
        elif kind is TensorRef:
            raise Unsupported(
                f"{obj.file}: a tensor of shape {list(obj.shape)} lies there, and its data are needed here"
            )
        elif kind.__module__.startswith("torch") and hasattr(obj, "detach"):
            # The tensor is kept with its placeholder, so that no other object gets its identity meanwhile.
            self.save(self._embedded.setdefault(id(obj), (_embedded(obj), obj))[0])
        else:
            super().save(obj, save_persistent_id)
        return None

    def _save_name(self, name: _GlobalName) -> None:
        # One object stands for all equal ones, so that the memo, which looks up by identity, finds it again.
        name = self._names.setdefault(name, name)
        known = self.memo.get(id(name))
        if known is not None:
            self.write(self.get(known[0]))
            return
        self.write(pickle.GLOBAL + f"{name.module}\n{name.name}\n".encode())
        self.memoize(name)

    def _call(self, function: _GlobalName, args: tuple[Any, ...], obj: Any) -> None:
        self.save(function)
        self.save(args)
        self.write(pickle.REDUCE)
        self.memoize(obj)

    def _save_standin(self, obj: Standin) -> None:
        cls = _GlobalName(obj.class_module, obj.class_name)
        self.save(cls)
        self.save(obj.class_args)
        # An enum member is its class called with its value; any other object is made without its __init__.
        self.write(pickle.REDUCE if obj.class_args else pickle.NEWOBJ)
        self.memoize(obj)
        if obj.state:
            # Not attributes but one value, where the class says what its state is (`allowlist.build`).
            plain = obj.state.get("state")
            self.save(plain if len(obj.state) == 1 and isinstance(plain, tuple) else obj.state)
            self.write(pickle.BUILD)

    def _save_tensor(self, tensor: Placeholder) -> None:
        if not tensor.is_parameter:
            self._save_plain_tensor(tensor)
            self.memoize(tensor)
            return
        self.save(_GlobalName("torch._utils", "_rebuild_parameter"))
        self._save_plain_tensor(tensor)
        self.save(True)
        self._save_no_hooks()
        self.write(pickle.TUPLE3 + pickle.REDUCE)
        self.memoize(tensor)

    def _save_plain_tensor(self, tensor: Placeholder) -> None:
        dtype = canonical(tensor.dtype)
        storage = tensor.storage or SharedStorage(tensor.extent, tensor.data)
        if storage.size < tensor.extent or (storage.data is not None and len(storage.data) != storage.size):
            raise ValueError(
                f"a storage of {storage.size} bytes does not hold a tensor that reaches to {tensor.extent}"
            )
        key = self._keys.setdefault(storage, len(self.storages))
        if key == len(self.storages):
            self.storages.append(storage)
        self.placed[tensor] = key
        typed = _STORAGE_CLASSES.get(dtype)
        self.save(_GlobalName("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"))
        self.write(pickle.MARK)
        self.write(pickle.MARK)
        self.save("storage")
        self.save(_GlobalName("torch", typed) if typed else _GlobalName("torch.storage", "UntypedStorage"))
        self.save(str(key))
        self.save("cpu")
        self.save(storage.size // (itemsize(dtype) if typed else 1))
        self.write(pickle.TUPLE + pickle.BINPERSID)
        self.save(tensor.offset)
        self.save(tuple(tensor.shape))
        self.save(row_major(tensor.shape) if tensor.strides is None else tuple(tensor.strides))
        self.save(False)
        self._save_no_hooks()
        if not typed:
            self.save(_GlobalName("torch", dtype))
        self.write(pickle.TUPLE + pickle.REDUCE)

    def _save_no_hooks(self) -> None:
        self.save(_GlobalName("collections", "OrderedDict"))
        self.write(pickle.EMPTY_TUPLE + pickle.REDUCE)


def _embedded(tensor: Any) -> Placeholder:
    import torch

    plain = tensor.detach().cpu().contiguous()
    raw = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return Placeholder(tuple(plain.shape), canonical(str(plain.dtype)), data=raw)
