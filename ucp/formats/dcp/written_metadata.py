"""The file ``.metadata`` of a checkpoint that is written, for torch to unpickle.

torch takes seconds to import, longer than many a conversion; and its classes are no more than their attributes
(torch/distributed/checkpoint/metadata.py). So they are pickled by their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucp.geometry import Shape
from ucp.storage.torch_pt.pickler import pickled as to_pickle
from ucp.storage.torch_pt.values import DtypeName, Size, Standin

_MODULE = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True)
class WrittenRecord:
    """A record: its file and byte range, and the chunk of a tensor that it holds; None for an object."""

    file: str
    start: int
    length: int
    chunk: tuple[Shape, Shape] | None


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor's element type, shape, and records."""

    dtype: str
    shape: Shape
    records: Sequence[WrittenRecord]


def pickled(
    tensors: Mapping[str, WrittenTensor],
    objects: Mapping[str, WrittenRecord],
    paths: Mapping[str, tuple[Any, ...]] | None,
    others: Mapping[str, Any],
) -> bytes:
    """The file's bytes. tensors, objects: the entries, by their flat names. paths: the keys that led to each of them.
    others: further attributes, which torch takes no notice of.

    Raises ValueError for a tensor's record without a chunk.
    """
    entries: dict[str, Standin] = {}
    places: dict[Standin, Standin] = {}
    properties = {dtype: _properties(dtype) for dtype in {tensor.dtype for tensor in tensors.values()}}
    for key, tensor in tensors.items():
        chunks = []
        for index, record in enumerate(tensor.records):
            if record.chunk is None:
                raise ValueError(f"'{key}' is a tensor, and a record of it holds no chunk")
            offsets, sizes = map(Size, record.chunk)
            chunks.append(_made("ChunkStorageMetadata", offsets=offsets, sizes=sizes))
            places[_made("MetadataIndex", fqn=key, index=index, offset=offsets)] = _place(record)
        entries[key] = _made(
            "TensorStorageMetadata", properties=properties[tensor.dtype], size=Size(tensor.shape), chunks=chunks
        )
    for key, record in objects.items():
        entries[key] = _made("BytesStorageMetadata")
        places[_made("MetadataIndex", fqn=key, index=None, offset=None)] = _place(record)
    found = _made(
        "Metadata",
        state_dict_metadata=entries,
        planner_data=None if paths is None else dict(paths),
        storage_data=places,
        storage_meta=_made("StorageMeta", checkpoint_id=None, save_id=None, load_id=None, modules=[]),
        version="1.0.0",  # torch 2.6 has no such attribute, and takes it from a file all the same
        **others,
    )
    return to_pickle(found)


def _made(name: str, **attributes: Any) -> Standin:
    return Standin(_MODULE, name, (), attributes)


def _place(record: WrittenRecord) -> Standin:
    state = {"relative_path": record.file, "offset": record.start, "length": record.length}
    return Standin("torch.distributed.checkpoint.filesystem", "_StorageInfo", (), state)


def _properties(dtype: str) -> Standin:
    """Of a plain tensor: whose layout, and whose order of elements, are what torch makes by default."""
    layout = Standin("torch.serialization", "_get_layout", ("torch.strided",))
    order = Standin(_MODULE, "_MEM_FORMAT_ENCODING", (0,))
    state = (DtypeName(dtype), layout, False, order, False)
    return Standin(_MODULE, "TensorProperties", (), {"state": state})
