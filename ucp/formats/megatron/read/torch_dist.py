"""Reading a ``torch_dist`` folder: DCP's records under the parameters' own names, with the optimizer's states."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog, LogicalTensor
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.dcp import METADATA, metadata
from ucp.formats.dcp.records import Records
from ucp.formats.dcp.records import tensors as tensors_of
from ucp.formats.megatron import COMMON, CONFIG, NAME, keys
from ucp.formats.megatron.read import agree, buckets, common, flattened, layout
from ucp.formats.megatron.read.unstack import joined, unstacked
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.malformed import malformed
from ucp.formats.shared.unknown_objects import REFUSED, UnknownObjects, load_file
from ucp.printable import logger, short
from ucp.spec.select import Choice
from ucp.storage import locations
from ucp.storage.crc32 import in_order
from ucp.storage.files import Files
from ucp.storage.torch_pt.values import TensorRef

log = logger(__name__)

_COMMON_KEY = "common_state"
_BUFFERS = re.compile(r".*\.(expert_bias|local_tokens_per_expert|inv_freq)")


def read(path: Path, files: Files, choice: Choice, unknown: UnknownObjects = REFUSED) -> Catalog:
    """The folder's catalog.

    Raises DamagedCheckpoint where files are missing, truncated or contradict each other, UnsafePickle, and Unsupported
    by name for what can't be read exactly.
    """
    folder = locations.locate(path)
    _check_backend(folder)
    return _read(folder, files, choice, unknown)


def _check_backend(folder: Path) -> None:
    path = folder / CONFIG
    if not locations.is_file(path):
        raise DamagedCheckpoint(
            f"{folder}: has no '{CONFIG}', which Megatron-Core writes last: the save has not come to its end"
        )
    with malformed(path):
        found = json.loads(locations.read(path))
        backend = found["sharded_backend"]
    if backend != "torch_dist":
        raise Unsupported(
            f"{path}: the checkpoint's backend is {short(backend)}; 'torch_dist' is what can be read. Megatron-Core's "
            "releases before 0.12 load 'zarr' and save it as 'torch_dist'"
        )
    if not locations.is_file(folder / METADATA):
        raise DamagedCheckpoint(f"{folder}: has no '{METADATA}', which says where its tensors lie")


@dataclass(frozen=True)
class _FolderParts:
    """The parts of a folder. tensors: by (name, state); a module's own tensors have the state `keys.WEIGHT`."""

    common: Mapping[str, Any]
    objects: Mapping[str, Any]
    tensors: Mapping[tuple[str, str], LogicalTensor]


def _read(folder: Path, files: Files, choice: Choice, unknown: UnknownObjects) -> Catalog:
    meta = metadata.load(folder)
    builder = Builder(files)
    with Records(folder, builder) as records:
        objects = {key: records.load(key, record, unknown) for key, record in meta.objects.items()}
        stored = flattened.as_they_were(tensors_of(meta.tensors, records), meta.others)
    said, objects = _common(folder, objects, unknown)
    said = {key: _numbers(value, builder) if key == "optimizer" else value for key, value in said.items()}
    where = layout.of(folder, said, objects, stored, [file.path for file in builder.sources])
    tensors = _by_parameter({key: tensor for key, tensor in stored.items() if not buckets.is_bucket(key)})
    layout.check_layers(folder, said, (name for name, _ in tensors))
    weights = [tensor for (_, state), tensor in tensors.items() if state == keys.WEIGHT]
    for weight in weights:
        weight.check_coverage()
    if not any(map(buckets.is_bucket, stored)):
        catalog, mastered = _catalog(folder, _FolderParts(said, objects, tensors), builder, where)
        catalog.check()
        agree.check(folder, catalog, mastered, files)
        return catalog
    trained = {w.name: w for w in weights if "float" in w.dtype and not _BUFFERS.fullmatch(w.name)}
    fitting = []
    for inside, copies in buckets.read(folder, stored, trained, where):
        parts = _FolderParts(said, objects, {**tensors, **inside})
        catalog, mastered = _catalog(
            folder, parts, Builder(files, builder.paths, builder.sources, builder.records), where
        )
        catalog = replace(catalog, copies=tuple(copies))
        catalog.check()
        fitting.append((catalog, agree.odd(catalog, mastered, files)))
    return buckets.chosen(folder, fitting)


def _common(folder: Path, objects: Mapping[str, Any], unknown: UnknownObjects) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all ranks have in common, and the objects of single ranks that hold anything."""
    path = folder / COMMON
    if locations.is_file(path):
        found = load_file(path, unknown).graph
    else:
        found = next((_single(o) for key, o in objects.items() if key.startswith(f"{_COMMON_KEY}/")), None)
        if found is None:
            raise DamagedCheckpoint(f"{path}: there is no such file, and no object '{_COMMON_KEY}' in its place")
    if not isinstance(found, dict):
        raise DamagedCheckpoint(f"{path}: holds a {type(found).__name__} where Megatron-Core writes a dict")
    rest = {key: _single(o) for key, o in objects.items() if not key.startswith(f"{_COMMON_KEY}/")}
    return found, {key: value for key, value in rest.items() if value is not None}


def _single(value: Any) -> Any:
    """An object as it was given: Megatron saves each in a list of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _numbers(value: Any, builder: Builder) -> Any:
    """An optimizer's own state with numbers for tensors of one element, such as a step."""
    if isinstance(value, TensorRef) and value.numel == 1:
        return builder.scalar(value)
    if type(value) is dict:
        return {key: _numbers(item, builder) for key, item in value.items()}
    if type(value) is list:
        return [_numbers(item, builder) for item in value]
    return value


def _by_parameter(stored: Mapping[str, LogicalTensor]) -> dict[tuple[str, str], LogicalTensor]:
    """Every parameter's tensors. Raises DamagedCheckpoint for two of one parameter."""
    by_state: dict[str, dict[str, LogicalTensor]] = {}
    for key, tensor in stored.items():
        parsed = keys.parse(key)
        by_state.setdefault(parsed.state, {})[parsed.model] = tensor
    prefix = keys.without_prefix(by_state.get(keys.WEIGHT, ()))
    out: dict[tuple[str, str], LogicalTensor] = {}
    for state, tensors in by_state.items():
        bare = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        parts = keys.parts(bare)
        taken = {part for several in parts.values() for part in several}
        for whole, several in parts.items():
            bare[whole] = joined(whole, len(keys.stack(whole).axes), [bare[part] for part in several])
        for key, tensor in bare.items():
            if key in taken:
                continue
            for one in unstacked(tensor, keys.stack(key), state):
                if (one.name, state) in out:
                    raise DamagedCheckpoint(f"'{one.name}' ({state}) is there under several keys, such as '{key}'")
                out[one.name, state] = one
    return out


def _catalog(
    folder: Path, found: _FolderParts, builder: Builder, where: layout.RunLayout
) -> tuple[Catalog, list[LogicalTensor]]:
    """The catalog, and the modules' tensors that masters stand for."""
    by_name: dict[str, dict[str, LogicalTensor]] = {}
    for (name, state), tensor in found.tensors.items():
        by_name.setdefault(name, {})[state] = tensor
    trained = {name for name, states in by_name.items() if set(states) - {keys.WEIGHT}}
    saved = common.groups([*common.optimizers(found.common), *_distributed(found.objects)])
    step = common.step(folder, found.common, saved)
    weights: list[LogicalTensor] = []
    for name in keys.order(by_name):
        states = dict(by_name[name])
        weight = states.pop(keys.WEIGHT, None)
        if weight is None:
            raise DamagedCheckpoint(f"{folder}: has optimizer states of '{name}' ({', '.join(states)}) and no weight")
        if "param" in states:
            weights.append(replace(weight, state="param"))
        else:
            states = {"param": replace(weight, state="param"), **states}
        _check_shapes(folder, name, weight, states)
        floating = "float" in weight.dtype
        kind = "parameter" if name in trained or (not trained and floating) else "frozen" if floating else "buffer"
        if _BUFFERS.fullmatch(name) and name not in trained:
            kind = "buffer"
        ordered = {state: states[state] for state in sorted(states, key=lambda s: (s != "param", s))}
        scalars = {"step": step} if name in trained and step is not None else {}
        builder.add(name, kind, list(ordered.values()), scalars)
    ndims = {name: len(by_name[name][keys.WEIGHT].shape) for name in keys.order(trained)}
    groups, unnamed = common.named(saved, ndims) if saved else ((), "")
    said = dict(found.common)
    if unnamed:
        said["param_groups"] = [group.options for group in saved]
    if low := {weight.dtype for weight in weights}:
        said["weights"] = low.pop() if len(low) == 1 else {weight.name: weight.dtype for weight in weights}
    unchecked = (unnamed,) if unnamed else ()
    for sentence in unchecked:
        log.warning("%s: %s", folder, sentence)
    beside = {key: value for key, value in found.objects.items() if ".distributed.dp_group_idx_" not in key}
    said[common.RUN] = dict(where.others)
    catalog = Catalog(
        format=NAME,
        writer="megatron-core",
        layout=where.layout,
        files=tuple(builder.sources),
        parameters=builder.parameters,
        tensors=builder.tensors,
        training_state=common.training_state(said, beside, groups, where.layout.dp),
        crc_records=in_order(builder.records),
        unchecked=unchecked,
    )
    return catalog, weights


def _check_shapes(folder: Path, name: str, weight: LogicalTensor, states: Mapping[str, LogicalTensor]) -> None:
    for state, tensor in states.items():
        if tensor.shape != weight.shape:
            raise DamagedCheckpoint(
                f"{folder}: '{name}' has shape {list(weight.shape)} and its state '{state}' {list(tensor.shape)}; "
                "files of two runs are mixed"
            )


def _distributed(objects: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What each data-parallel group saved of its optimizer, where that is no common state: the first of each chain."""
    out: dict[str, Mapping[str, Any]] = {}
    for key, value in objects.items():
        found = re.fullmatch(r"((?:chained_\d+\.)?optimizer)\.distributed\.dp_group_idx_\d+\.optimizer/.*", key)
        if found is not None and isinstance(value, Mapping):
            out.setdefault(found[1], value)
    return list(out.values())
