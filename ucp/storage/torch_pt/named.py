"""What stands for the classes, functions and storages that a pickle names."""

from __future__ import annotations

from dataclasses import dataclass, field

from ucp.storage import dtypes
from ucp.storage.crc32 import StoredCrc32
from ucp.storage.torch_pt.values import TensorRef


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names and the allow-list knows. It cannot be called by itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True)
class StorageRef:
    """A torch storage: `numel` elements of `dtype` under `key`; `start` is its first byte in the file.

    In the older format the place is known only after the pickle was read: `start` is 0 until `move_to`. record: the
    CRC-32 of its bytes, if the file has one.
    """

    file: str
    key: str
    dtype: str
    numel: int
    device: str
    start: int
    record: StoredCrc32 | None = None
    refs: list[TensorRef] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.numel * dtypes.itemsize(self.dtype)

    def move_to(self, start: int) -> None:
        """Set the place, for the storage and for the tensors already built on it."""
        for ref in self.refs:
            # This is still inside `load`, so nobody has seen the frozen value yet.
            object.__setattr__(ref, "offset", ref.offset - self.start + start)
        self.start = start


@dataclass(frozen=True, slots=True)
class StorageClass:
    """A torch storage class, as the element type that it stands for."""

    dtype: str
