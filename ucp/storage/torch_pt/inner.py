"""Pickles among a checkpoint's bytes: what a module has pickled by itself, and hangs into the state dict as bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ucp.storage.torch_pt import reader
from ucp.storage.torch_pt.named import Global, StorageRef
from ucp.storage.torch_pt.pickles import Unpickler
from ucp.storage.torch_pt.skipped import Skipped, without
from ucp.storage.torch_pt.values import Standin, TensorRef

_FROM_BYTES = Global("torch.storage", "_load_from_bytes")


@dataclass(frozen=True)
class InnerPickle:
    """What a pickle holds. streams: the bytes that its `TensorRef`s lie in, by the name that these have for them."""

    graph: Any
    streams: Mapping[str, bytes]

    def data(self, ref: TensorRef) -> bytes:
        """A tensor's bytes, with the gaps between its elements."""
        start, stop = ref.span
        return self.streams[ref.file][start:stop]

    def plain(self) -> Any:
        """The graph with tensors as (type, shape, strides, bytes): equal for pickles that hold the same, which are
        other bytes in every process, since torch numbers a tensor's storage by its address."""

        def plain(value: Any) -> Any:
            if isinstance(value, TensorRef):
                return value.dtype, value.shape, value.strides, self.data(value)
            if isinstance(value, Standin):
                return value.class_module, value.class_name, plain(value.class_args), plain(value.state)
            if isinstance(value, Mapping):
                return {key: plain(item) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(item) for item in value]
            return value

        return plain(self.graph)


def load(raw: bytes, name: str, skipped: Skipped | None = None) -> InnerPickle:
    """What ``torch.save`` or ``pickle.dumps`` made these bytes of.

    name: what errors call them. skipped: as for `reader.load_file`.

    Raises DamagedCheckpoint, UnsafePickle and Unsupported, as `reader.load_file`.
    """
    if raw[:2] == b"PK":
        return InnerPickle(reader.load_bytes(raw, name, skipped=skipped), {name: raw})
    unpickler = _PlainUnpickler(raw, name, skipped)
    graph = unpickler.load()
    return InnerPickle(without(graph, skipped) if skipped else graph, unpickler.streams)


class _PlainUnpickler(Unpickler):
    """Of a pickle that ``torch.save`` did not make: a tensor's storage is a stream of torch's older format in it."""

    def __init__(self, raw: bytes, name: str, skipped: Skipped | None) -> None:
        super().__init__(io.BytesIO(raw), name, len(raw), None, None, skipped)
        self.streams: dict[str, bytes] = {}

    def find(self, module: str, name: str) -> Any:
        if (module, name) == (_FROM_BYTES.module, _FROM_BYTES.name):
            return _FROM_BYTES
        return super().find(module, name)

    def call(self, target: Any, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        if target is not _FROM_BYTES:
            return super().call(target, args, kwargs)
        if type(args) is not tuple or len(args) != 1 or type(args[0]) is not bytes or kwargs:
            raise TypeError("a storage is loaded from bytes")
        self.spent += len(args[0])
        name = f"{self._path} (tensor {len(self.streams) + 1})"
        self.streams[name] = args[0]
        found = reader.load_bytes(args[0], name)
        if type(found) is not StorageRef:
            raise TypeError(f"a storage's bytes hold a {type(found).__name__}")
        return found
