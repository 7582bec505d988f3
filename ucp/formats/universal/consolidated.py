"""The consolidated form: every logical tensor whole, in safetensors files that are also a Hugging Face model folder.

Weights (the state ``param`` of parameters, frozen parameters and buffers) are ``model-0000k-of-0000n.safetensors`` with
``model.safetensors.index.json``, the names and index that transformers looks for; each optimizer state has files and an
index of its own, ``optimizer.<state>-0000k-of-0000n.safetensors``. Tied parameters are stored once, under the name that
owns them. The manifest is written last.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np

from ucp.catalog import Catalog, LogicalTensor, SourceFile
from ucp.errors import BadArgument
from ucp.formats.universal import manifest, schema, training
from ucp.geometry import whole
from ucp.storage import safetensors
from ucp.storage.digests import ChunkDigests
from ucp.transfer.gather import Want
from ucp.transfer.targets import TargetFile

SHARD = 5_000_000_000
"""Bytes that a safetensors file may have before another one is begun; one tensor is never cut."""


@dataclass(frozen=True)
class Plan:
    """A consolidated checkpoint before its first byte is written.

    source: the catalog to read from. files: everything but the manifest. result: the catalog of what will have been
    written, its files' paths relative to the folder.
    """

    source: Catalog
    files: tuple[TargetFile, ...]
    result: Catalog
    training_state: dict[str, Any]

    def manifest(self, digests: Mapping[str, ChunkDigests], writer: str) -> bytes:
        """The manifest's bytes, once the files' digests are known by name."""
        body = schema.encode(
            self.result,
            form="consolidated",
            writer=writer,
            paths=[file.path for file in self.result.files],
            mtimes=[None] * len(self.result.files),
            digests={k: digests[file.path] for k, file in enumerate(self.result.files) if file.path in digests},
            training_state=self.training_state,
            source=(self.source.format, self.source.writer),
        )
        return manifest.frame(body)


def plan(catalog: Catalog, max_shard: int = SHARD) -> Plan:
    """Lay out the files. ``max_shard`` is in bytes.

    Raises Unsupported for element types that safetensors lacks and for training state that is not plain data,
    BadArgument for a shard size below 1.
    """
    if max_shard < 1:
        raise BadArgument(f"a shard size of {max_shard} bytes is impossible; give at least 1")
    met = training.Tensors()
    training_state = training.encode(catalog.training_state, met)
    source = training.with_sources(catalog, met)
    by_state: dict[str, list[LogicalTensor]] = {}
    for tensor in catalog.tensors.values():
        by_state.setdefault(tensor.state, []).append(tensor)
    files: list[TargetFile] = []
    placed: dict[tuple[str, str], LogicalTensor] = {}
    for state, tensors in by_state.items():
        stem = "model" if state == "param" else f"optimizer.{quote(state, safe='')}"
        files += _plan_state(stem, tensors, max_shard, placed, first_file=len(files))
    extra = training.tensors_file(source, met)
    if extra is not None:
        files.append(extra)
    result = dataclasses.replace(
        catalog,
        files=tuple(SourceFile(file.name, file.size, 0) for file in files),
        tensors={key: placed[key] for key in catalog.tensors},
        chunk_digests={},
    )
    return Plan(source, tuple(files), result, training_state)


def _plan_state(
    stem: str,
    tensors: Sequence[LogicalTensor],
    max_shard: int,
    placed: dict[tuple[str, str], LogicalTensor],
    first_file: int,
) -> list[TargetFile]:
    """The files of one state and their index; notes in ``placed`` where each tensor will lie."""
    shards = _shards(tensors, max_shard)
    files: list[TargetFile] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        layout = safetensors.plan_file([(t.name, t.dtype, t.shape) for t in shard], {"format": "pt"})
        wants = []
        for tensor in shard:
            weight_map[tensor.name] = name
            offset = layout.offsets[tensor.name]
            wants.append(Want(tensor, whole(tensor.shape), tensor.dtype, offset))
            blocks = whole(tensor.shape, 0, first_file + len(files))
            placed[tensor.name, tensor.state] = dataclasses.replace(
                tensor, blocks=blocks, bases=np.full(len(blocks), offset, np.int64)
            )
        files.append(TargetFile(name, layout.size, ((0, layout.header),), tuple(wants)))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2, ensure_ascii=False).encode("utf-8") + b"\n"
    files.append(TargetFile(f"{stem}.safetensors.index.json", len(text), ((0, text),), ()))
    return files


def _shards(tensors: Sequence[LogicalTensor], max_shard: int) -> list[list[LogicalTensor]]:
    """Consecutive tensors of at most ``max_shard`` bytes in all; a longer one has a file to itself."""
    shards: list[list[LogicalTensor]] = []
    held = 0
    for tensor in tensors:
        if not shards or (held and held + tensor.nbytes > max_shard):
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    return shards
