"""The file ``.metadata`` of torch.distributed.checkpoint, read without torch and without running anything.

It is a pickle of `Metadata` (torch/distributed/checkpoint/metadata.py): every entry of the flattened state dict with
its element type, shape and chunks, and for every chunk the file and byte range that hold it.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ucp.errors import DamagedCheckpoint, UcpError, Unsupported
from ucp.formats.dcp import METADATA
from ucp.geometry import Shape
from ucp.printable import short
from ucp.storage import graphs, locations
from ucp.storage.torch_pt.pickles import Unpickler
from ucp.storage.torch_pt.values import DtypeName, Standin

_ZSTD = re.compile(r"stream\.zstd/1(\..*)?")


@dataclass(frozen=True)
class Record:
    """Bytes of a file, relative to the checkpoint's folder, that `torch.save` wrote. zstd: compressed by it."""

    file: str
    start: int
    length: int
    zstd: bool = False


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where it lies."""

    offsets: Shape
    sizes: Shape
    record: Record


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Metadata:
    """What the metadata says.

    paths: flat name -> the keys that led to it, if that was recorded.
    objects: entries that are not tensors.
    others: attributes that other programs have added.
    """

    paths: Mapping[str, tuple[Any, ...]]
    tensors: Mapping[str, Tensor]
    objects: Mapping[str, Record]
    others: Mapping[str, Any]


def load(folder: Path) -> Metadata:
    """Read the folder's metadata.

    Raises DamagedCheckpoint for a file that is missing or contradicts itself, UnsafePickle, and Unsupported for records
    that a storage extension has transformed.
    """
    path = str(folder / METADATA)
    try:
        raw = locations.read(path)
        found = Unpickler(io.BytesIO(raw), path, len(raw), trust=None).load()
        graphs.check(path, found)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return _interpret(path, found)
    except UcpError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"{path}: is not the metadata of a DCP checkpoint: {error}") from error


def _interpret(path: str, found: Any) -> Metadata:
    if not isinstance(found, Standin) or found.class_name != "Metadata":
        raise DamagedCheckpoint(f"{path}: is not the metadata of a DCP checkpoint")
    records: dict[tuple[str, Shape | None], Record] = {}
    for index, info in (found.storage_data or {}).items():
        name, offset = index.state["fqn"], index.state.get("offset")
        records[name, None if offset is None else tuple(offset)] = _record(path, name, info)
    tensors: dict[str, Tensor] = {}
    objects: dict[str, Record] = {}
    for key, entry in found.state_dict_metadata.items():
        if entry.class_name == "BytesStorageMetadata":
            objects[key] = _find(path, records, key, None)
            continue
        dtype = entry.properties.state["state"][0]
        if not isinstance(dtype, DtypeName):
            raise DamagedCheckpoint(f"{path}: '{key}' has no element type")
        boxes = [(tuple(chunk.state["offsets"]), tuple(chunk.state["sizes"])) for chunk in entry.chunks]
        chunks = tuple(Chunk(offsets, sizes, _find(path, records, key, offsets)) for offsets, sizes in boxes)
        shape = tuple(entry.size)
        if any(len(c.offsets) != len(shape) or len(c.sizes) != len(shape) for c in chunks):
            raise DamagedCheckpoint(f"{path}: a chunk of '{key}' has not the {len(shape)} dimensions of its tensor")
        tensors[key] = Tensor(dtype.name, shape, chunks)
    paths = found.state.get("planner_data")
    known = paths if isinstance(paths, dict) else {}
    own = ("state_dict_metadata", "storage_data", "planner_data", "storage_meta", "version")
    others = {key: value for key, value in found.state.items() if key not in own}
    return Metadata({key: tuple(p) for key, p in known.items() if isinstance(p, tuple)}, tensors, objects, others)


def _record(path: str, key: str, info: Standin) -> Record:
    transforms = info.state.get("transform_descriptors") or []
    zstd = len(transforms) == 1 and isinstance(transforms[0], str) and _ZSTD.fullmatch(transforms[0]) is not None
    if transforms and not zstd:
        raise Unsupported(
            f"{path}: '{key}' was transformed as it was written ({', '.join(map(str, info.transform_descriptors))}); "
            "only records as torch.save writes them, or compressed by torch's own ZStandard, can be read; load it by "
            "torch's dcp.load, which undoes that, and save it without _extensions"
        )
    name, start, length = (info.state[key] for key in ("relative_path", "offset", "length"))
    if not isinstance(name, str) or os.path.isabs(name) or ".." in name.split("/"):
        raise DamagedCheckpoint(f"{path}: '{key}' lies in {short(name)}, which is not a file of this folder")
    if type(start) is not int or type(length) is not int or start < 0 or length < 0:
        raise DamagedCheckpoint(f"{path}: '{key}' has the impossible byte range {short(start)}, {short(length)}")
    return Record(name, start, length, zstd)


def _find(path: str, records: Mapping[tuple[str, Shape | None], Record], key: str, offset: Shape | None) -> Record:
    found = records.get((key, offset))
    if found is None:
        where = "" if offset is None else f" at {list(offset)}"
        raise DamagedCheckpoint(f"{path}: does not say where '{key}'{where} lies; the checkpoint is incomplete")
    return found
