"""The training state as plain data, with the tensors in it apart, and the files that these lie in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ucp.catalog import Catalog, SourceFile, TrainingState
from ucp.errors import DamagedCheckpoint
from ucp.formats.shared.roles import VALUES
from ucp.storage import locations, plain
from ucp.storage.crc32 import in_order
from ucp.storage.torch_pt.values import TensorRef

# Fields that are kept as they are; param groups are taken apart.
PLAIN = tuple(f.name for f in dataclasses.fields(TrainingState) if f.name != "param_groups")


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
        **{name: _encode(getattr(state, name), tensors, name) for name in PLAIN},
    }


def _encode(value: Any, tensors: Tensors, where: str) -> Any:
    if isinstance(value, Mapping) and type(value) not in (dict,) and not hasattr(value, "__dict__"):
        value = dict(value)  # a read-only view
    return plain.encode(value, tensors.put, where)


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


def values_beside(state: TrainingState) -> dict[str, Any]:
    """A state dict's values that are of no optimizer, such as torchtitan's ``train_state``, by their flat names."""
    values: Mapping[str, Any] = state.extra.get(VALUES, {})
    roots = {key.partition("param_groups.")[0] for key in values if "param_groups." in key}
    ours = tuple(f"{root}{part}." for root in roots for part in ("param_groups", "state"))
    return {key: value for key, value in values.items() if not key.startswith(ours)}
