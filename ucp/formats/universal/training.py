"""The training state in a manifest: plain values as JSON, and their tensors in a safetensors file of their own."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ucp.catalog import Catalog, LogicalTensor, ParamGroup, SourceFile, TrainingState
from ucp.errors import DamagedCheckpoint
from ucp.formats.shared.samples import counted_by_us
from ucp.formats.shared.training_state import PLAIN, Tensors
from ucp.geometry import box, empty, numel, whole
from ucp.storage import locations, plain, safetensors
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
    values = {name: plain.decode(data[name], get) for name in PLAIN if name in data}
    for name, value in values.items():
        _check(path, name, value, _TYPES.get(name, (object,)))
    return counted_by_us(TrainingState(param_groups=tuple(groups), **values))


def tensors_beside(path: str, files: Sequence[SourceFile]) -> dict[str, TensorRef]:
    """The tensors of the training state in those files that lie beside a manifest."""
    folder = os.path.dirname(path)
    folder = folder if locations.is_remote(folder) else os.path.realpath(folder)
    found: dict[str, TensorRef] = {}
    for file in files:
        if file.path.startswith(folder + "/") and is_tensors_file(os.path.basename(file.path)):
            found.update(safetensors.read_header(file.path).tensors)
    return found


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
