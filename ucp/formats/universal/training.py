"""The training state in a manifest: plain values as JSON, and their tensors in a safetensors file of their own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ucp.catalog import Catalog, LogicalTensor, ParamGroup, SourceFile, TrainingState
from ucp.errors import DamagedCheckpoint
from ucp.geometry import box, empty, numel, whole
from ucp.storage import locations, plain, safetensors
from ucp.storage.crc32 import in_order
from ucp.storage.dtypes import canonical
from ucp.storage.torch_pt.values import TensorRef
from ucp.transfer.gather import Want
from ucp.transfer.targets import TargetFile

TENSORS_FILE = "training-state.safetensors"
# Those of the ranks after the first, where ranks save by themselves.
RANK_TENSORS_FILE = "training-state-{rank:05d}.safetensors"
_TENSORS_FILES = re.compile(r"training-state(-\d{5,})?\.safetensors")


def is_tensors_file(name: str) -> bool:
    """Whether a file in a checkpoint's folder holds tensors of the training state."""
    return _TENSORS_FILES.fullmatch(name) is not None


# Kept in one JSON object each; param groups are taken apart below.
_PLAIN = tuple(f.name for f in dataclasses.fields(TrainingState) if f.name != "param_groups")


@dataclass
class Tensors:
    """Tensors met while a training state is encoded. Equal references are stored once."""

    entries: dict[str, TensorRef | Any] = field(default_factory=dict)
    prefix: str = "t"  # of the keys: different ranks' tensors need different ones
    _keys: dict[Any, str] = field(default_factory=dict)

    def put(self, tensor: Any) -> str:
        """Remember a tensor (a TensorRef, or one in memory) and return its key."""
        if isinstance(tensor, TensorRef):
            identity: Any = (tensor.file, tensor.offset, tensor.dtype, tensor.shape, tensor.strides)
        else:
            identity = id(tensor)  # kept alive by `entries`
        if identity not in self._keys:
            self._keys[identity] = f"{self.prefix}{len(self.entries)}"
            self.entries[self._keys[identity]] = tensor
        return self._keys[identity]


def encode(state: TrainingState, tensors: Tensors) -> dict[str, Any]:
    """JSON-able data. Raises Unsupported for a value that is not plain data, naming where it is."""
    return {
        "param_groups": [
            {"names": list(group.names), "options": _encode(group.options, tensors, f"param group {index}")}
            for index, group in enumerate(state.param_groups)
        ],
        **{name: _encode(getattr(state, name), tensors, name) for name in _PLAIN},
    }


def _encode(value: Any, tensors: Tensors, where: str) -> Any:
    if isinstance(value, Mapping) and type(value) not in (dict,) and not hasattr(value, "__dict__"):
        value = dict(value)  # a read-only view
    return plain.encode(value, tensors.put, where)


def decode(path: str, data: Any, tensors: Mapping[str, TensorRef]) -> TrainingState:
    """The training state; tensors in it are references into their file. ``path`` is the manifest's, for messages."""
    if not isinstance(data, dict):
        raise DamagedCheckpoint(f"{path}: 'training_state' is missing")

    def get(key: Any) -> TensorRef:
        if key not in tensors:
            raise DamagedCheckpoint(
                f"{path}: the training state refers to tensor {key!r}, which '{TENSORS_FILE}' lacks"
            )
        return tensors[key]

    listed = data.get("param_groups")
    if not isinstance(listed, list):
        raise DamagedCheckpoint(f"{path}: the training state has no list of param groups")
    groups = []
    for group in listed:
        if not isinstance(group, dict) or not isinstance(group.get("names"), list):
            raise DamagedCheckpoint(f"{path}: a param group has no list of names")
        options = plain.decode(group.get("options"), get)
        _check(path, "param group options", options, (dict, type(None)))
        groups.append(ParamGroup(tuple(map(str, group["names"])), options))
    values = {name: plain.decode(data[name], get) for name in _PLAIN if name in data}
    for name, value in values.items():
        _check(path, name, value, _TYPES.get(name, (object,)))
    return TrainingState(param_groups=tuple(groups), **values)


_NUMBER = (int, type(None))
_TYPES: dict[str, tuple[type, ...]] = {
    "loss_scaler": (dict, type(None)),
    "clip_grad": (int, float, type(None)),
    "global_steps": _NUMBER,
    "global_samples": _NUMBER,
    "skipped_steps": _NUMBER,
    "dp_world_size": _NUMBER,
    "global_batch_size": _NUMBER,
    "extra": (dict,),
    "client_state": (dict,),
    "config": (dict,),
}


def _check(path: str, name: str, value: Any, types: tuple[type, ...]) -> None:
    if not isinstance(value, types):
        raise DamagedCheckpoint(f"{path}: the training state's {name} is a {type(value).__name__}")


def with_sources(catalog: Catalog, tensors: Tensors) -> Catalog:
    """The catalog with the files that the training state's tensors lie in added, where it lacks them, and with the
    CRC-32s of these tensors' bytes."""
    known = {file.path for file in catalog.files}
    missing = dict.fromkeys(
        r.file for r in tensors.entries.values() if isinstance(r, TensorRef) and r.file not in known
    )
    added = []
    for name in missing:
        try:
            stat = locations.stat(name)
        except OSError as error:
            raise DamagedCheckpoint(f"{name}: cannot be read: {error.strerror or error}") from error
        added.append(SourceFile(name, stat.size, stat.mtime_ns))
    files = (*catalog.files, *added)
    index = {file.path: k for k, file in enumerate(files)}
    records = {k: {record.start: record for record in found} for k, found in catalog.crc_records.items()}
    for ref in tensors.entries.values():
        if isinstance(ref, TensorRef) and ref.record is not None:
            records.setdefault(index[ref.file], {})[ref.record.start] = ref.record
    return dataclasses.replace(catalog, files=files, crc_records=in_order(records))


def with_sources_of_state(catalog: Catalog) -> Catalog:
    """The catalog with the files of its training state's tensors. Raises Unsupported for state that is not plain."""
    met = Tensors()
    encode(catalog.training_state, met)
    return with_sources(catalog, met)


def tensors_file(catalog: Catalog, tensors: Tensors, name: str = TENSORS_FILE) -> TargetFile | None:
    """The file that holds the tensors, or None if there are none. ``catalog`` knows their sources."""
    if not tensors.entries:
        return None
    index = {file.path: k for k, file in enumerate(catalog.files)}
    described = {key: (canonical(str(t.dtype)), tuple(t.shape)) for key, t in tensors.entries.items()}
    layout = safetensors.plan_file([(key, dtype, shape) for key, (dtype, shape) in described.items()])
    literals, wants = [(0, layout.header)], []
    for key, tensor in tensors.entries.items():
        dtype, shape = described[key]
        if not numel(shape):
            continue
        if not isinstance(tensor, TensorRef):
            literals.append((layout.offsets[key], _bytes_of(tensor)))
            continue
        blocks = (
            box([0] * len(shape), shape, 0, tensor.strides, index[tensor.file]) if numel(shape) else empty(len(shape))
        )
        source = LogicalTensor(
            key, "training state", shape, dtype, blocks, np.full(len(blocks), tensor.offset, np.int64)
        )
        wants.append(Want(source, whole(shape), dtype, layout.offsets[key]))
    return TargetFile(name, layout.size, tuple(literals), tuple(wants))


def _bytes_of(tensor: Any) -> bytes:
    import torch

    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
