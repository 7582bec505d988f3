"""The allow-list: which classes and functions a pickle may name, and what stands for each.

Nothing is looked up by import. A pickle's global becomes an inert `Global` here. Calling it runs the function that this
table has for it, which checks its arguments. What the table lacks is refused.
"""

from __future__ import annotations

import argparse
import collections
import io
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ucp import limits
from ucp.errors import DamagedCheckpoint, UnsafePickle, Unsupported
from ucp.geometry import span
from ucp.printable import short
from ucp.storage import dtypes
from ucp.storage.torch_pt import numpy_calls, shared_out
from ucp.storage.torch_pt.named import Global, StorageClass, StorageRef
from ucp.storage.torch_pt.standins import STANDINS, member
from ucp.storage.torch_pt.values import DeviceName, DtypeName, Size, Standin, TensorRef

# Names that the pickles of Python 2 and of protocols below 3 use for today's modules.
_MODULE_ALIASES = {"__builtin__": "builtins", "copy_reg": "copyreg"}

_TENSOR_CLASSES = {
    ("torch", "Tensor"),
    ("torch._tensor", "Tensor"),
    ("torch", "Parameter"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.nn.parameter", "Buffer"),
}

_WRAPPER = ("torch._utils", "_rebuild_wrapper_subclass")

# Tensors whose bytes are not plain strided elements. They are refused with a reason, not as "not on the allow-list".
_REFUSED_TENSORS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor on the meta device, which has no data",
    "_rebuild_device_tensor_from_numpy": "a tensor of a device without storages",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of a device without storages",
}


def find(module: str, name: str) -> Any | None:
    """What stands for a pickle's global: a value, a `Global` that `call` knows, or None when it is not allowed.

    Raises `Unsupported` for tensor kinds and element types that are refused by name.
    """
    module = _MODULE_ALIASES.get(module, module)
    if module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage"):
        if name in ("TypedStorage", "_LegacyStorage", "_TypedStorage"):
            return None
        return StorageClass(dtypes.from_storage_class(name))
    if module == "torch" and name in _TORCH_DTYPES:
        return DtypeName(dtypes.canonical(name))
    if module in ("torch._utils", "torch._tensor") and name in _REFUSED_TENSORS:
        raise Unsupported(f"it holds {_REFUSED_TENSORS[name]} ({module}.{name}), which is not supported")
    key = (module, name)
    if key in _CALLS or key in STANDINS or key in _TENSOR_CLASSES or key in _VALUE_CLASSES or key in shared_out.CLASSES:
        return Global(module, name)
    return None


_TORCH_DTYPES = frozenset(dtypes.names()) | {"half", "float", "double", "short", "int", "long", "cfloat", "cdouble"}


def call(target: Global, args: tuple[Any, ...]) -> Any:
    """Do what calling an allowed global with these arguments does.

    Raises TypeError or ValueError for arguments that the original would not have been pickled with.
    """
    key = (target.module, target.name)
    handler = _CALLS.get(key)
    if handler is not None:
        return handler(*args)
    if key in STANDINS:
        return Standin(target.module, target.name, args)
    raise TypeError(f"{target} is not something that a checkpoint calls")


def checked_keys(keys: Iterable[Any]) -> Any:
    """The same keys, after a check of their size. Raises ValueError for one of more than a thousand parts.

    Python hashes nested tuples without any limit. So a short pickle could overflow the stack and end the process, or
    take years.
    """
    keys = list(keys)
    if _NESTING.isdisjoint(map(type, keys)):
        return keys
    for key in keys:
        if type(key) in _NESTING:
            todo, seen = [key], 0
            while todo:
                item = todo.pop()
                seen += 1
                if seen > 1000:
                    raise ValueError("a key of more than a thousand parts")
                if type(item) in _NESTING:
                    todo.extend(item if isinstance(item, tuple) else item.class_args)
    return keys


_NESTING = frozenset((tuple, Standin))


def build(obj: Any, state: Any) -> None:
    """Give an object the state that a pickle has for it. Raises TypeError for objects that take none."""
    kind = type(obj)
    if kind is Standin and isinstance(state, tuple) and len(state) != 2:
        obj.state["state"] = state  # not attributes, but what a __setstate__ of its class understands
    elif kind is Standin:
        obj.state.update(_attributes(state))
    elif kind is io.BytesIO:
        _fill_bytes(obj, state)
    elif kind is argparse.Namespace:
        vars(obj).update(_attributes(state))
    elif kind is collections.OrderedDict:
        # torch's state_dict hangs a `_metadata` on it; nothing else is expected, and a method must not be shadowed.
        attributes = _attributes(state)
        if "_metadata" in attributes:
            vars(obj)["_metadata"] = attributes["_metadata"]
    elif kind is np.ndarray:
        numpy_calls.set_array(obj, state)
    elif isinstance(obj, np.dtype):
        numpy_calls.check_dtype_state(obj, state)
    else:
        raise TypeError(f"an object of class {kind.__name__} takes no state")


_TEXTS = {str}


def _attributes(state: Any) -> dict[str, Any]:
    merged: dict[str, Any]
    if type(state) is dict:
        merged = state
    else:
        state, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, {})
        merged = dict(state or {}, **(slots or {}))
    if not _TEXTS.issuperset(map(type, merged)):
        raise TypeError("attribute names must be text")
    return merged


# --- torch -----------------------------------------------------------------------------------------------------------


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> TensorRef:
    return _tensor(storage, None, offset, shape, strides)


def _rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> TensorRef:
    _refuse_lazy_bits(metadata)
    return _tensor(storage, None, offset, shape, strides)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> TensorRef:
    _refuse_lazy_bits(metadata)
    if not isinstance(dtype, DtypeName):
        raise TypeError(f"a tensor's dtype is a {type(dtype).__name__}")
    return _tensor(storage, dtype.name, offset, shape, strides)


def _refuse_lazy_bits(metadata: Any) -> None:
    if metadata and any(dict(metadata).values()):
        raise Unsupported("it holds a tensor with its conjugate or negative bit set; resolve it before saving")


def _tensor(storage: Any, dtype: str | None, offset: Any, shape: Any, strides: Any) -> TensorRef:
    if type(storage) is not StorageRef:
        raise TypeError(f"a tensor is built on a {type(storage).__name__}, not on a storage")
    shape, strides = _numbers(shape), _numbers(strides)
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise ValueError(
            f"offset {short(offset)}, shape {short(shape)} and strides {short(strides)} do not describe a tensor"
        )
    dtype = dtype or storage.dtype
    width = dtypes.itemsize(dtype)
    if 0 not in shape:
        needed = (offset + span(shape, strides)) * width
        if needed > storage.nbytes:
            raise DamagedCheckpoint(
                f"a {dtype} tensor of shape {shape}, strides {strides} and offset {offset} needs {needed} bytes, "
                f"and its storage {storage.key!r} has {storage.nbytes}"
            )
    if math.prod(shape) * width > limits.metadata_bytes(storage.nbytes):
        raise DamagedCheckpoint(
            f"a tensor of shape {shape} repeats the {storage.nbytes} bytes of its storage {storage.key!r} more "
            "often than is read"
        )
    start = storage.start + offset * width
    where = (storage.key, storage.numel)
    ref = TensorRef(storage.file, start, dtype, shape, strides, storage.device, where, storage.record)
    storage.refs.append(ref)
    return ref


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> TensorRef:
    if type(data) is not TensorRef:
        raise TypeError(f"a parameter is built on a {type(data).__name__}, not on a tensor")
    return data


def _rebuild_from_type(function: Any, tensor_class: Any, args: Any, state: Any) -> TensorRef | Standin:
    if type(function) is Global and (function.module, function.name) == _WRAPPER:
        return shared_out.rebuilt(tensor_class, state, _attributes)
    # A plain tensor that carries Python attributes, as ZeRO-3's do; the attributes are dropped.
    if type(tensor_class) is not Global or (tensor_class.module, tensor_class.name) not in _TENSOR_CLASSES:
        raise TypeError(f"a tensor of class {short(tensor_class)}")
    if type(function) is not Global or (function.module, function.name) not in _TENSOR_BUILDERS:
        raise TypeError(f"a tensor built by {short(function)}")
    ref: TensorRef = call(function, tuple(_sequence(args)))
    return ref


def _refuse_wrapper(*args: Any) -> Any:
    raise Unsupported(shared_out.REFUSED)


_TENSOR_BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}


def _device(kind: Any, index: Any = None) -> DeviceName:
    if not isinstance(kind, str) or not isinstance(index, int | None):
        raise TypeError("a device is a name and an index")
    return DeviceName(kind if index is None else f"{kind}:{index}")


_INTS = {int}


def _size(items: Any) -> Size:
    size = Size(_numbers(items))
    if not _INTS.issuperset(map(type, size)):
        raise TypeError("a torch.Size holds whole numbers")
    return size


def _numbers(items: Any) -> tuple[Any, ...]:
    # A range is tiny in the file and huge in memory.
    if not isinstance(items, tuple | list):
        raise TypeError(f"expected a tuple of numbers, not a {type(items).__name__}")
    return tuple(items)


def _text(*args: Any) -> str:
    if len(args) != 1 or not isinstance(args[0], str):
        raise TypeError("expected one piece of text")
    return str(args[0])


# --- Python ----------------------------------------------------------------------------------------------------------


def _bytes_io(*args: Any) -> io.BytesIO:
    if args:
        raise TypeError("a BytesIO is built from its state")
    return io.BytesIO()


def _fill_bytes(stream: io.BytesIO, state: Any) -> None:
    """As its own __setstate__, for one without attributes: Transformer Engine keeps its modules' states in such."""
    content, position, attributes = state
    if type(content) is not bytes or type(position) is not int or not 0 <= position <= len(content) or attributes:
        raise TypeError("a BytesIO's state is bytes and a place in them")
    stream.write(content)
    stream.truncate()
    stream.seek(position)


def _namespace(*args: Any) -> argparse.Namespace:
    if args:
        raise TypeError("a Namespace is built from its attributes")
    return argparse.Namespace()


def _pairs(items: Any) -> list[tuple[Any, Any]]:
    pairs = list(items.items()) if isinstance(items, dict) else [(key, value) for key, value in _sequence(items)]
    checked_keys(key for key, _ in pairs)
    return pairs


def _ordered_dict(items: Any = ()) -> collections.OrderedDict[Any, Any]:
    return collections.OrderedDict(_pairs(items))


def _defaultdict(factory: Any = None, items: Any = ()) -> collections.defaultdict[Any, Any]:
    if factory is not None:
        if type(factory) is not Global or (factory.module, factory.name) not in FACTORIES:
            raise TypeError(f"a defaultdict of {factory}, whose factory is not a plain built-in class")
        factory = FACTORIES[factory.module, factory.name]
    return collections.defaultdict(factory, _pairs(items))


def _counter(items: Any = ()) -> collections.Counter[Any]:
    return collections.Counter(dict(_pairs(items)))


def _deque(items: Any = (), maxlen: Any = None) -> collections.deque[Any]:
    return collections.deque(_sequence(items), maxlen)


def _sequence(items: Any) -> Any:
    # A range is tiny in the file and huge in memory, so only containers that are already built are taken.
    if not isinstance(items, list | tuple | set | frozenset | dict):
        raise TypeError(f"expected a list, not a {type(items).__name__}")
    return items


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    # How protocol 2 writes bytes: text, one character a byte.
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise TypeError("bytes are encoded as latin-1 text")
    return text.encode("latin-1")


def _bytes(*args: Any) -> bytes:
    if args:
        raise TypeError("only empty bytes are written like this")
    return b""


def _bytearray(data: Any = b"", encoding: Any = None) -> bytearray:
    if isinstance(data, str):
        return bytearray(_encode(data, encoding))
    if not isinstance(data, bytes | bytearray):
        raise TypeError("a bytearray is built from bytes")
    return bytearray(data)


def _complex(real: Any, imag: Any = 0.0) -> complex:
    if not all(isinstance(part, int | float) for part in (real, imag)):
        raise TypeError("a complex number is built from two numbers")
    return complex(real, imag)


def _range(*args: Any) -> range:
    if not all(type(n) is int for n in args):
        raise TypeError("a range is built from whole numbers")
    return range(*args)


def _path(kind: type[pathlib.PurePath]) -> Callable[..., pathlib.PurePath]:
    def make(*parts: Any) -> pathlib.PurePath:
        if not all(isinstance(part, str) for part in parts):
            raise TypeError("a path is built from text")
        return kind(*parts)

    return make


# A WindowsPath cannot be made on other systems, and only its text matters here.
_PATHS = {
    name: _path(kind)
    for name, kind in {
        "Path": pathlib.Path,
        "PosixPath": pathlib.Path,
        "PurePath": pathlib.PurePath,
        "PurePosixPath": pathlib.PurePosixPath,
        "WindowsPath": pathlib.PureWindowsPath,
        "PureWindowsPath": pathlib.PureWindowsPath,
    }.items()
}

FACTORIES: dict[tuple[str, str], Any] = {
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
    ("builtins", "set"): set,
    ("builtins", "int"): int,
    ("builtins", "float"): float,
    ("builtins", "str"): str,
    ("builtins", "bool"): bool,
    ("builtins", "tuple"): tuple,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "Counter"): collections.Counter,
}

GETATTR = Global("builtins", "getattr")


def _member(owner: Any, name: Any) -> Standin | Global:
    key = (owner.module, owner.name, name) if type(owner) is Global and isinstance(name, str) else ("", "", "")
    found = shared_out.INNER.get(key) or member(*key)
    if found is None:
        raise UnsafePickle(
            f"its pickle asks for {short(name)} of {owner}, which is no member of a known enumeration; nothing was run"
        )
    return found


# Classes that a pickle passes as arguments and never calls.
_VALUE_CLASSES = {("numpy", "ndarray"), *FACTORIES}

_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    **_TENSOR_BUILDERS,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    _WRAPPER: _refuse_wrapper,
    ("torch", "device"): _device,
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _text,
    ("torch.torch_version", "TorchVersion"): _text,
    ("argparse", "Namespace"): _namespace,
    ("_io", "BytesIO"): _bytes_io,
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): _defaultdict,
    ("collections", "Counter"): _counter,
    ("collections", "deque"): _deque,
    ("_codecs", "encode"): _encode,
    ("builtins", "getattr"): _member,
    ("builtins", "set"): lambda items=(): set(checked_keys(_sequence(items))),
    ("builtins", "frozenset"): lambda items=(): frozenset(checked_keys(_sequence(items))),
    ("builtins", "slice"): lambda *args: slice(*args),
    ("builtins", "complex"): _complex,
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "range"): _range,
    ("builtins", "xrange"): _range,
    ("numpy", "dtype"): numpy_calls.dtype_of,
    **{("pathlib", name): make for name, make in _PATHS.items()},
    **{("pathlib._local", name): make for name, make in _PATHS.items()},
}
for _core in ("numpy.core", "numpy._core"):
    _CALLS[f"{_core}.multiarray", "_reconstruct"] = numpy_calls.reconstruct
    _CALLS[f"{_core}.multiarray", "scalar"] = numpy_calls.scalar
    _CALLS[f"{_core}.numeric", "_frombuffer"] = numpy_calls.frombuffer
