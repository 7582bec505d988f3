"""Pickles that many files have byte for byte: interpreted once, copied for each further file.

Ranks of one job write files whose pickles are the same: names, shapes and settings, while the tensors' bytes lie beside
them. Interpreting a pickle safely takes milliseconds, and a job has thousands of files. So what came of a pickle is
kept for a while. A file with the same pickle gets a copy of its own, in which every tensor lies in that file.

The copy is made by Python's own pickling of objects that the interpreter made here. It can make nothing but those, and
nothing of it comes from a file. A graph with objects of any other kind is not kept.
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ucp import limits
from ucp.storage.torch_pt.named import Global, StorageClass, StorageRef
from ucp.storage.torch_pt.values import DeviceName, DtypeName, Size, Standin, TensorRef

_KEPT = (
    *(collections.OrderedDict, collections.defaultdict, collections.Counter, collections.deque, argparse.Namespace),
    *(Size, DtypeName, DeviceName, Standin, Global, StorageClass),
)
_CLASSES = frozenset((*_KEPT, set, frozenset, bytearray, dict, list, int))
_FOUND = frozenset((kind.__module__, kind.__qualname__) for kind in _CLASSES)


class _OtherKindError(Exception):
    """The graph has an object that is not copied."""


@dataclass(frozen=True, eq=False)
class Twin:
    """What came of a pickle. passed: what was found true of every graph that comes of it, by the caller's names.

    saved: the storages that it refers to, as it describes them, each once. raw: the graph without what it refers to by
    number: its tensors and sizes, of which there are thousands, and which nobody can change. refs: those. moved: which
    of them are tensors with elements, that lie elsewhere in another file. starts: the first bytes of their storages, by
    key, in the file that the graph was read from.
    """

    saved: Sequence[Any]
    raw: bytes
    refs: Sequence[TensorRef | Size]
    moved: Sequence[tuple[int, TensorRef]]
    starts: Mapping[str, int]
    passed: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, graph: Any, saved: Sequence[Any], storages: Sequence[StorageRef]) -> Twin | None:
        """What to keep of a graph; None if it has objects of other kinds."""
        stream = io.BytesIO()
        pickler = _Pickler(stream, protocol=5)
        try:
            pickler.dump(graph)
        except (_OtherKindError, pickle.PicklingError, RecursionError, TypeError, AttributeError):
            return None
        moved = [(k, ref) for k, ref in enumerate(pickler.refs) if isinstance(ref, TensorRef) and ref.numel]
        starts = {storage.key: storage.start for storage in storages}
        return cls(saved, stream.getvalue(), pickler.refs, moved, starts)

    def copy(self, get: Callable[[Any], StorageRef]) -> Any:
        """The graph for another file. get: finds a storage of that file, and raises what is wrong with it."""
        storages = {storage.key: storage for storage in map(get, self.saved)}
        made = list(self.refs)
        for number, ref in self.moved:
            there = storages[ref.storage[0]]
            offset = ref.offset - self.starts[there.key] + there.start
            made[number] = TensorRef(
                there.file, offset, ref.dtype, ref.shape, ref.strides, ref.device, ref.storage, there.record
            )
        unpickler = _Unpickler(io.BytesIO(self.raw))
        unpickler.persistent_load = made.__getitem__  # type: ignore[method-assign]
        return unpickler.load()


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, protocol: int) -> None:
        super().__init__(stream, protocol)
        self.refs: list[TensorRef | Size] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) is not TensorRef and type(obj) is not Size:
            return None
        number = self._numbers.setdefault(id(obj), len(self.refs))
        if number == len(self.refs):
            self.refs.append(obj)
        return number

    def reducer_override(self, obj: Any) -> Any:
        """Is asked about everything but plain values and containers."""
        if type(obj) in _CLASSES or (isinstance(obj, type) and obj in _CLASSES):
            return NotImplemented
        raise _OtherKindError(type(obj).__name__)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _FOUND:
            raise pickle.UnpicklingError(f"{module}.{name} is nothing that is copied")
        return super().find_class(module, name)


class Twins:
    """What came of the last pickles of this process, by their bytes. Thread-safe."""

    def __init__(self) -> None:
        self._known: collections.OrderedDict[tuple[bytes, bool], Twin] = collections.OrderedDict()
        self._held_bytes = 0
        self._lock = threading.Lock()

    def get(self, data: bytes, dtensors: bool) -> Twin | None:
        """What came of the same bytes. dtensors: whether DTensors were taken."""
        with self._lock:
            found = self._known.get((data, dtensors))
            if found is not None:
                self._known.move_to_end((data, dtensors))
            return found

    def put(self, data: bytes, dtensors: bool, twin: Twin) -> None:
        """Keep it until so many others have come. Long ones are not kept."""
        count = len(data) + len(twin.raw)
        if count > limits.TWIN_BYTES:
            return
        with self._lock:
            if (data, dtensors) in self._known:  # another thread was faster
                return
            self._known[data, dtensors] = twin
            self._held_bytes += count
            while self._held_bytes > limits.TWINS_BYTES:
                (old, _), gone = self._known.popitem(last=False)
                self._held_bytes -= len(old) + len(gone.raw)


TWINS = Twins()
