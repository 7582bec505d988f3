"""Reading a ``torch_dist`` folder: DCP's records under the parameters' own names, with the optimizer's states."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.dcp import METADATA, metadata
from ucp.formats.dcp.records import Records
from ucp.formats.dcp.records import tensors as tensors_of
from ucp.formats.megatron import COMMON, CONFIG, WRITTEN_FOR, keys
from ucp.formats.megatron.read import agree, buckets, flattened, layout
from ucp.formats.megatron.read.assembled import BUFFERS, FolderParts, by_parameter, catalog_of
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.malformed import malformed
from ucp.formats.shared.unknown_objects import REFUSED, UnknownObjects, load_file
from ucp.printable import logger, short
from ucp.spec.select import Choice
from ucp.storage import locations
from ucp.storage.files import Files
from ucp.storage.torch_pt.values import TensorRef

log = logger(__name__)

_COMMON_KEY = "common_state"


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


def _read(folder: Path, files: Files, choice: Choice, unknown: UnknownObjects) -> Catalog:
    meta = metadata.load(folder)
    builder = Builder(files)
    with Records(folder, builder) as records:
        objects = {key: records.load(key, record, unknown) for key, record in meta.objects.items()}
        stored = flattened.as_they_were(tensors_of(meta.tensors, records), meta.others)
    said, objects = _common(folder, objects, unknown)
    said = {key: _numbers(value, builder) if key == "optimizer" else value for key, value in said.items()}
    where = layout.of(
        folder, said, objects, stored, [file.path for file in builder.sources], meta.others.get(WRITTEN_FOR)
    )
    tensors = by_parameter({key: tensor for key, tensor in stored.items() if not buckets.is_bucket(key)})
    layout.check_layers(folder, said, (name for name, _ in tensors))
    weights = [tensor for (_, state), tensor in tensors.items() if state == keys.WEIGHT]
    for weight in weights:
        weight.check_coverage()
    if not any(map(buckets.is_bucket, stored)):
        catalog, mastered = catalog_of(folder, FolderParts(said, objects, tensors), builder, where)
        catalog.check()
        agree.check(folder, catalog, mastered, files)
        return catalog
    trained = {w.name: w for w in weights if "float" in w.dtype and not BUFFERS.fullmatch(w.name)}
    fitting = []
    for inside, copies in buckets.read(folder, stored, trained, where):
        parts = FolderParts(said, objects, {**tensors, **inside})
        catalog, mastered = catalog_of(
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
