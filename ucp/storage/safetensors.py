"""safetensors files without torch: headers read and checked, or planned so that ranges can be written in any order.

The format, as its own README states it, is 8 bytes with the header's length N (unsigned, little-endian, at most 100
MB), N bytes of JSON that begin with "{" and may end with spaces, then the data. The JSON maps each tensor's name to its
dtype, shape and `data_offsets` (begin and end, in bytes from the data's start), and `__metadata__` to a map of text to
text. The tensors are row-major and little-endian, and cover the data without holes or overlaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucp import limits
from ucp.errors import BadArgument, DamagedCheckpoint, Unsupported
from ucp.geometry import row_major
from ucp.storage import dtypes, locations
from ucp.storage.torch_pt.values import TensorRef

MAX_HEADER = 100_000_000  # bytes
ALIGNMENT = 64  # bytes; where the data begin, so that a memory-mapped file serves any element type

_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file holds. `data_start` and `file_size` are in bytes from the file's start."""

    tensors: dict[str, TensorRef]
    metadata: dict[str, str]
    data_start: int
    file_size: int


@dataclass(frozen=True, slots=True)
class FilePlan:
    """A safetensors file to be written: `header` goes to byte 0, each tensor's bytes to its offset in the file."""

    header: bytes
    offsets: dict[str, int]
    size: int


def read_header(path: str | os.PathLike[str], start: int = 0) -> Header:
    """Read and check the header. No data is read. start: where it begins, if other data are before it.

    Raises `DamagedCheckpoint` for a file that is missing, truncated, longer than its header says or contradicts the
    format, and `Unsupported` for element types that are not known here.
    """
    name = str(path)
    try:
        with locations.opened(path) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(start)
            length = int.from_bytes(stream.read(8), "little")
            if size - start < 8 or length > size - start - 8:
                raise DamagedCheckpoint(
                    f"{name}: not a safetensors file, or truncated: a header of {length} bytes in a file of {size}"
                )
            if length > MAX_HEADER:
                raise DamagedCheckpoint(f"{name}: a header of {length} bytes is more than the {MAX_HEADER} allowed")
            text = stream.read(length)
    except OSError as error:
        raise DamagedCheckpoint(f"{name}: cannot be read: {error.strerror or error}") from error
    data_start = start + 8 + length
    fields = _parse(name, text)
    metadata = fields.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedCheckpoint(f"{name}: its {_METADATA} is not a map of text to text")
    tensors = {tensor: _tensor(name, tensor, entry, data_start) for tensor, entry in fields.items()}
    _check_coverage(name, tensors, data_start, size)
    return Header(tensors, metadata, data_start, size)


def plan_file(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> FilePlan:
    """Lay out a file for tensors given as (name, dtype, shape).

    Wider element types come first, so that every tensor is aligned to its element. Otherwise the order is the one
    given. Raises `BadArgument` for names used twice, and `Unsupported` for types, or for so many tensors, that the
    format cannot hold.
    """
    fields: dict[str, Any] = {}
    if metadata:
        fields[_METADATA] = dict(metadata)
    at = 0
    starts: dict[str, int] = {}
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -dtypes.itemsize(tensor[1])):
        if name in fields or name == _METADATA:
            raise BadArgument(f"tensor name {name!r} cannot be used twice in a safetensors file, nor {_METADATA!r}")
        end = at + math.prod(shape) * dtypes.itemsize(dtype)
        fields[name] = {"dtype": dtypes.to_safetensors(dtype), "shape": list(shape), "data_offsets": [at, end]}
        starts[name] = at
        at = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise Unsupported(
            f"{len(tensors)} tensors need a safetensors header of {len(text)} bytes; at most {MAX_HEADER}"
        )
    header = len(text).to_bytes(8, "little") + text
    return FilePlan(header, {name: len(header) + start for name, start in starts.items()}, len(header) + at)


def _parse(path: str, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError("a name is used twice")
        return fields

    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with '{'")
        limits.check_json(path, text)
        fields: dict[str, Any] = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        return fields
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: its safetensors header is not valid: {error}") from error


def _tensor(path: str, name: str, entry: Any, data_start: int) -> TensorRef:
    def whole(items: Any) -> bool:
        return isinstance(items, list) and all(type(item) is int and 0 <= item < 2**62 for item in items)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise DamagedCheckpoint(
            f"{path}: tensor {name!r} should have a dtype, a shape and data_offsets, and has {entry!r}"
        )
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or not whole(shape) or not whole(offsets) or len(offsets) != 2:
        raise DamagedCheckpoint(f"{path}: tensor {name!r} has a damaged description: {entry!r}")
    try:
        dtype = dtypes.from_safetensors(code)
    except Unsupported as error:
        raise Unsupported(f"{path}: tensor {name!r}: {error}") from error
    numel = math.prod(shape)
    wanted = numel * dtypes.itemsize(dtype)
    if offsets[1] - offsets[0] != wanted:
        raise DamagedCheckpoint(
            f"{path}: tensor {name!r} is {dtype} of shape {tuple(shape)}, {wanted} bytes, and its data_offsets "
            f"{offsets} hold {offsets[1] - offsets[0]}"
        )
    shape = tuple(shape)
    return TensorRef(path, data_start + offsets[0], dtype, shape, row_major(shape), "cpu", (name, numel))


def _check_coverage(path: str, tensors: dict[str, TensorRef], data_start: int, size: int) -> None:
    at = data_start
    for name, ref in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if ref.offset != at:
            what = "a hole" if ref.offset > at else "an overlap"
            raise DamagedCheckpoint(
                f"{path}: {what} before tensor {name!r}, which begins at byte {ref.offset}; what precedes ends at {at}"
            )
        at += ref.nbytes
    if at != size:
        what = "truncated" if at > size else "longer than its header says"
        raise DamagedCheckpoint(f"{path}: the file is {what}: its tensors end at byte {at}, and it has {size} bytes")
