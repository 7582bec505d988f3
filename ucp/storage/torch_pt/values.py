"""What a checkpoint file's object graph is made of when neither torch nor DeepSpeed is there to build it.

Containers, numbers, strings, numpy arrays and `argparse.Namespace` stay what they are. A tensor is a `TensorRef`: the
place of its bytes. A torch.Size, torch.device or torch.dtype is one of the small values here. An object of a DeepSpeed
class is a `Standin` that has its attributes and none of its code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ucp.geometry import row_major, span
from ucp.storage import dtypes
from ucp.storage.crc32 import StoredCrc32


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor that lies in a file.

    `offset` is that of the tensor's first element, in bytes from the file's start; `strides` are in elements, as
    torch's are. Two tensors of one file that share a storage have the same `storage` (its key, and its length in
    elements of the type it was written with). record: the storage's bytes, with their CRC-32, if the file has one.
    """

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: str
    storage: tuple[str, int]
    record: StoredCrc32 | None = field(default=None, compare=False, repr=False)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, without gaps between them."""
        return self.numel * dtypes.itemsize(self.dtype)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie row-major without gaps, as one byte range."""
        return self.numel == 0 or all(
            size == 1 or stride == wanted
            for size, stride, wanted in zip(self.shape, self.strides, row_major(self.shape), strict=True)
        )

    @property
    def span(self) -> tuple[int, int]:
        """The byte range `[start, stop)` of the file that holds all elements, gaps included."""
        return self.offset, self.offset + span(self.shape, self.strides) * dtypes.itemsize(self.dtype)


class Size(tuple[int, ...]):
    """A torch.Size: a tuple of ints that remembers that it was one."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Size({list(self)})"


@dataclass(frozen=True, slots=True)
class DtypeName:
    """A torch.dtype: `name` is its short name ("bfloat16")."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class DeviceName:
    """A torch.device: `name` is what torch prints ("cuda:0", "cpu")."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(slots=True)
class Standin:
    """An object of a class that is not imported: its name, constructor arguments and attributes, without its code.

    Attributes read as on the original (`standin.cur_scale`); an enum member, which pickles as its class called with its
    value, has `.value`.
    """

    class_module: str
    class_name: str
    class_args: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that are not fields. The dunder guard keeps copy and pickle from finding hooks here.
        if not name.startswith("__"):
            state = object.__getattribute__(self, "state")
            if name in state:
                return state[name]
            args = object.__getattribute__(self, "class_args")
            if name == "value" and len(args) == 1:
                return args[0]
        raise AttributeError(f"the checkpoint's {self.class_module}.{self.class_name} object has no attribute {name!r}")

    def __hash__(self) -> int:
        # Many of these may be used as keys. Attributes of a few plain kinds are enough to tell them apart.
        plain = frozenset(item for item in self.state.items() if type(item[1]) in (str, int, Size))
        return hash((self.class_module, self.class_name, self.class_args, plain))
