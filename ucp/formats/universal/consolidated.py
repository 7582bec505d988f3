"""The consolidated form: every logical tensor whole, in safetensors files that are also a Hugging Face model folder.

Weights (the state ``param`` of parameters, frozen parameters and buffers) are ``model-0000k-of-0000n.safetensors`` with
``model.safetensors.index.json``, the names and index that transformers looks for; each optimizer state has files and an
index of its own, ``optimizer.<state>-0000k-of-0000n.safetensors``. Tied parameters are stored once, under the name that
owns them. The manifest is written last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ucp import limits
from ucp.catalog import Catalog, LogicalTensor, SourceFile
from ucp.formats.shared import shards
from ucp.formats.shared.training_state import Tensors, encode, with_sources
from ucp.formats.universal import manifest, schema, training
from ucp.geometry import whole
from ucp.logical.record import Recorded
from ucp.storage import names
from ucp.storage.digests import ChunkDigests
from ucp.transfer.targets import TargetFile


@dataclass(frozen=True)
class ConsolidatedPlan:
    """A consolidated checkpoint before its first byte is written.

    source: the catalog to read from.
    files: everything except the manifest.
    result: the catalog of what will have been written. Its files' paths are relative to the folder.
    """

    source: Catalog
    files: tuple[TargetFile, ...]
    result: Catalog
    training_state: dict[str, Any]

    def manifest(
        self,
        digests: Mapping[str, ChunkDigests],
        writer: str,
        logical: Mapping[tuple[str, str], Recorded] | None = None,
    ) -> bytes:
        """The manifest's bytes, once the files' digests are known by name, and the tensors' logical digests, or those
        that the source has."""
        tensors = self.result.tensors
        if logical is not None:
            tensors = {key: dataclasses.replace(tensor, digest=logical.get(key)) for key, tensor in tensors.items()}
        body = schema.encode(
            dataclasses.replace(self.result, tensors=tensors),
            form="consolidated",
            writer=writer,
            paths=[file.path for file in self.result.files],
            mtimes=[None] * len(self.result.files),
            digests={k: digests[file.path] for k, file in enumerate(self.result.files) if file.path in digests},
            training_state=self.training_state,
            source=(self.source.format, self.source.writer),
        )
        return manifest.frame(body)


def plan(catalog: Catalog, max_shard: int = limits.SHARD_FILE_BYTES) -> ConsolidatedPlan:
    """Lay out the files. ``max_shard`` is in bytes.

    Raises Unsupported for element types that safetensors lacks and for training state that is not plain data,
    BadArgument for a shard size below 1.
    """
    met = Tensors()
    training_state = encode(catalog.training_state, met)
    source = with_sources(catalog, met)
    by_state: dict[str, list[LogicalTensor]] = {}
    for tensor in catalog.tensors.values():
        by_state.setdefault(tensor.state, []).append(tensor)
    files: list[TargetFile] = []
    placed: dict[tuple[str, str], LogicalTensor] = {}
    for state, tensors in by_state.items():
        stem = "model" if state == "param" else f"optimizer.{names.escaped(state)}"
        made = shards.plan(stem, tensors, max_shard)
        for tensor in tensors:
            number, offset = made.places[tensor.name]
            blocks = whole(tensor.shape, 0, len(files) + number)
            placed[tensor.name, state] = dataclasses.replace(
                tensor, blocks=blocks, bases=np.full(len(blocks), offset, np.int64)
            )
        files += made.files
    extra = training.tensors_file(source, met)
    if extra is not None:
        files.append(extra)
    result = dataclasses.replace(
        catalog,
        files=tuple(SourceFile(file.name, file.size, 0) for file in files),
        tensors={key: placed[key] for key in catalog.tensors},
        chunk_digests={},
    )
    return ConsolidatedPlan(source, tuple(files), result, training_state)
