"""A catalog of a state dict's entries, wherever they lie. They are named by their roles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ucp.catalog import Catalog, LogicalTensor, ParameterInfo, ParamGroup, TrainingState
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.roles import OUTSIDE, TRAINING_STATE, VALUES, Roles, StateEntry, assign, param_groups
from ucp.geometry import numel
from ucp.parallel.mesh import Layout
from ucp.storage.crc32 import in_order
from ucp.storage.dtypes import is_numpy_native, itemsize, numpy_dtype
from ucp.storage.torch_pt.values import TensorRef
from ucp.transfer.checksums import read_record
from ucp.transfer.exact import widen

GROUPS = "param_groups"
_STEPS = ("train_state.step", "global_step", "step", "iteration")
_SCHEDULERS = ("lr_scheduler", "scheduler")


@dataclass
class Entries:
    """The entries of a state dict by their flat names, and where the tensors among them lie, in the builder's files."""

    builder: Builder
    entries: dict[str, StateEntry] = field(default_factory=dict)
    tensors: dict[str, LogicalTensor] = field(default_factory=dict)

    def add(self, path: Sequence[Any], value: Any) -> None:
        """An entry: a tensor, in a file or known already, or any other value."""
        key = ".".join(map(str, path))
        if isinstance(value, TensorRef):
            value = self.builder.whole(key, "", value)
        if isinstance(value, LogicalTensor):
            self.tensors[key] = value
            self.entries[key] = StateEntry(tuple(path), value.shape)
        else:
            self.entries[key] = StateEntry(tuple(path), None, value)

    def add_tree(self, path: Sequence[Any], value: Any) -> None:
        """Add a nested state dict: mappings, and an optimizer's param groups, entry by entry; other values whole."""
        if isinstance(value, Mapping):
            for name, item in value.items():
                self.add_tree((*path, name), item)
        elif isinstance(value, list) and path and path[-1] == GROUPS:
            for index, item in enumerate(value):
                self.add_tree((*path, index), item)
        else:
            self.add(path, value)

    def catalog(self, format_name: str, writer: str, layout: Layout) -> Catalog:
        """All that was added; its coverage is not checked."""
        return _catalog(self, format_name, writer, layout)


def _catalog(state_dict: Entries, format_name: str, writer: str, layout: Layout) -> Catalog:
    entries, found, builder = state_dict.entries, state_dict.tensors, state_dict.builder
    roles = assign(entries)
    tensors: dict[tuple[str, str], LogicalTensor] = {}
    states: dict[str, dict[str, str]] = {}
    for key, (name, state) in roles.tensors.items():
        t = found[key]
        tensors[name, state] = LogicalTensor(name, state, t.shape, t.dtype, t.blocks, t.bases)
        states.setdefault(name, {})[state] = t.dtype

    def value(key: str) -> Any:
        return _item(found[key], builder) if key in found else entries[key].value

    scalars: dict[str, dict[str, Any]] = {}
    for key, (name, scalar) in roles.scalars.items():
        scalars.setdefault(name, {})[scalar] = value(key)
    options: dict[str, dict[str, Any]] = {}
    for key, (group, option) in roles.options.items():
        options.setdefault(group, {})[option] = value(key)
    parameters = {
        name: ParameterInfo(
            name,
            (t := tensors.get((name, "param")) or tensors[name, next(iter(kept))]).shape,
            kept,
            roles.kind(name, "float" in t.dtype or "complex" in t.dtype),
            scalars.get(name, {}),
        )
        for name, kept in states.items()
    }
    return Catalog(
        format=format_name,
        writer=writer,
        layout=layout,
        files=tuple(builder.sources),
        parameters=parameters,
        tensors=tensors,
        training_state=_training_state(roles, entries, param_groups(roles, options, repr), value),
        crc_records=in_order(builder.records),
        computed=dict(builder.computed),
    )


def _training_state(
    roles: Roles, entries: Mapping[str, StateEntry], groups: list[ParamGroup], value: Callable[[str], Any]
) -> TrainingState:
    """Values that belong to no parameter; fields of a training state where DCP's writer here made the checkpoint."""
    values = {key: entries[key].value for key in roles.values}
    known = {f"{TRAINING_STATE}.{f.name}": f.name for f in dataclasses.fields(TrainingState)}
    fields = {known[key]: values.pop(key) for key in list(values) if key in known}
    extra = {**fields.pop("extra", {}), VALUES: values, OUTSIDE: roles.outside}
    told = {"global_steps": _step(entries, value), "lr_scheduler": _scheduler(values, entries)}
    return TrainingState(**{**told, **fields, "param_groups": tuple(groups), "extra": extra})


def _step(entries: Mapping[str, StateEntry], value: Callable[[str], Any]) -> int | None:
    """How far the run has come, by the keys that programs use; torchtitan's is a tensor in some releases."""
    for key in _STEPS:
        entry = entries.get(key)
        if entry is not None and (entry.shape is None or numel(entry.shape) == 1):
            found = value(key)
            if type(found) is int and 0 <= found < 2**63:
                return found
    return None


def _scheduler(values: Mapping[str, Any], entries: Mapping[str, StateEntry]) -> Any:
    """The lr scheduler's state, put together from its flat entries; these stay what they are besides."""
    for root in _SCHEDULERS:
        keys = [key for key, entry in entries.items() if entry.path[0] == root and len(entry.path) > 1]
        if keys and all(key in values and len(entries[key].path) == 2 for key in keys):
            return {entries[key].path[1]: values[key] for key in keys}
    return None


def _item(tensor: LogicalTensor, builder: Builder) -> Any:
    """The value of a tensor of one element. Raises DigestMismatch where its record is damaged."""
    file, at = int(tensor.blocks.buffers[0]), int(tensor.bases[0])
    record = builder.records.get(file, {}).get(at)
    size, path = itemsize(tensor.dtype), builder.sources[file].path
    if record is not None and record.stop - record.start == size:
        raw = bytearray(read_record(builder.files, path, record))
    else:
        raw = bytearray(size)
        builder.read_into(file, at, raw)
    number = np.frombuffer(raw, numpy_dtype(tensor.dtype))
    return (number if is_numpy_native(tensor.dtype) else widen(number, tensor.dtype, "float64")).item()
