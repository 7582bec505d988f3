"""The shards that torch's ``HuggingFaceStorageWriter`` leaves where it does not put them together.

Each rank writes safetensors files of its own, ``shard-00001-model-00001-of-00002.safetensors``, whose metadata says
where its parts begin in the whole tensors (torch/distributed/checkpoint/hf_storage.py, ``DCP_SHARDING_INFO``). How
large the whole tensors are, and how many ranks there were, is said nowhere: the parts must fit together without a hole,
and the ranks' numbers without a gap, but that the last rank's files are missing could only be seen by such a hole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ucp.catalog import LogicalTensor
from ucp.errors import DamagedCheckpoint
from ucp.formats.shared.builder import Builder
from ucp.geometry import Blocks, concat, empty, numel
from ucp.storage import locations, safetensors
from ucp.storage.torch_pt.values import TensorRef

SHARD = re.compile(r"shard-(\d{5,})-model-(\d{5,})-of-(\d{5,})\.safetensors")
_INFO, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"

Part = tuple[tuple[int, ...], TensorRef]


def parts(folder: Path) -> dict[str, list[Part]]:
    """The parts of every tensor by its name, each with its place in the whole; {} if the folder has no such shards.

    Raises DamagedCheckpoint where a rank's file is missing or does not say where its parts belong.
    """
    found = sorted((m for name in locations.names(folder) if (m := SHARD.fullmatch(name))), key=lambda m: m[0])
    ranks = sorted({int(m[1]) for m in found})
    if ranks != list(range(1, len(ranks) + 1)):
        missing = min(set(range(1, ranks[-1] + 1)) - set(ranks))
        raise DamagedCheckpoint(f"{folder}: has shards of the ranks {ranks[:8]}, and none of rank {missing}")
    out: dict[str, list[Part]] = {}
    for m in found:
        path = folder / m[0]
        header = safetensors.read_header(path)
        said = places(path, header.metadata)
        for name, ref in header.tensors.items():
            place = (said.get(name) or {}).get(OFFSETS)
            if (
                not isinstance(place, list)
                or len(place) != len(ref.shape)
                or not all(type(n) is int and 0 <= n < 1 << 60 for n in place)
            ):
                raise DamagedCheckpoint(
                    f"{path}: does not say where its part of '{name}' ({list(ref.shape)}) begins in the whole tensor"
                )
            out.setdefault(name, []).append((tuple(place), ref))
    return out


def places(path: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """What torch's writer says of each tensor's place in a file. Raises DamagedCheckpoint for a file that does not."""
    try:
        found = json.loads(metadata.get(_INFO, "null"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise DamagedCheckpoint(f"{path}: has no readable '{_INFO}', which says where its parts belong")
    return found


def tensor(name: str, held: Iterable[Part], builder: Builder) -> LogicalTensor:
    """A whole tensor from its parts. Raises DamagedCheckpoint if they are of several types or numbers of dimensions."""
    held = list(held)
    kinds = {(ref.dtype, len(ref.shape)) for _, ref in held}
    if len(kinds) > 1:
        raise DamagedCheckpoint(f"{held[0][1].file}: '{name}' has parts of other types or dimensions in other shards")
    shape = tuple(max(place[k] + ref.shape[k] for place, ref in held) for k in range(len(held[0][1].shape)))
    blocks, bases = [], []
    for place, ref in held:
        if numel(ref.shape):
            own = builder.whole(name, "param", ref)
            offsets = own.blocks.offsets + np.array([place], np.int64).reshape(1, len(place))
            blocks.append(Blocks(offsets, own.blocks.sizes, own.blocks.starts, own.blocks.strides, own.blocks.buffers))
            bases.append(own.bases)
    placed = concat(blocks, len(shape)) if blocks else empty(len(shape))
    starts = np.concatenate(bases) if bases else np.zeros(0, np.int64)
    return LogicalTensor(name, "param", shape, held[0][1].dtype, placed, starts)
