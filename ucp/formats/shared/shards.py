"""Whole tensors in safetensors files of bounded size, with the index that transformers looks for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ucp import limits
from ucp.catalog import LogicalTensor
from ucp.errors import BadArgument
from ucp.geometry import numel, whole
from ucp.storage import safetensors
from ucp.storage.dtypes import itemsize
from ucp.transfer.gather import Want
from ucp.transfer.targets import TargetFile


@dataclass(frozen=True)
class Sharded:
    """The files of tensors.

    files: the tensors' files, then their index, if there is one.
    places: a tensor's name -> which of the files it is in, and its byte there.
    """

    files: tuple[TargetFile, ...]
    places: Mapping[str, tuple[int, int]]


def plan(
    stem: str,
    tensors: Sequence[LogicalTensor],
    max_shard: int = limits.SHARD_FILE_BYTES,
    *,
    dtypes: Mapping[str, str] | None = None,
    always_index: bool = True,
) -> Sharded:
    """Lay out ``<stem>-00001-of-0000n.safetensors`` and ``<stem>.safetensors.index.json``.

    max_shard: bytes.
    dtypes: element types to write, if other than the tensor's own. If they are narrower, the values are rounded.
    always_index: without it, what fits in one file is ``<stem>.safetensors`` and has no index.

    Raises Unsupported for element types that safetensors lacks, BadArgument for a shard size below 1.
    """
    if max_shard < 1:
        raise BadArgument(f"a shard size of {max_shard} bytes is impossible; give at least 1")
    kept = [(tensor, (dtypes or {}).get(tensor.name, tensor.dtype)) for tensor in tensors]
    sizes = [numel(tensor.shape) * itemsize(dtype) for tensor, dtype in kept]
    files: list[TargetFile] = []
    weight_map: dict[str, str] = {}
    places: dict[str, tuple[int, int]] = {}
    shards = _shards(sizes, max_shard)
    single = not always_index and len(shards) <= 1
    for number, shard in enumerate(shards or [[]] if single else shards, start=1):
        name = f"{stem}.safetensors" if single else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        mine = [kept[k] for k in shard]
        layout = safetensors.plan_file([(t.name, dtype, t.shape) for t, dtype in mine], {"format": "pt"})
        wants = []
        for tensor, dtype in mine:
            weight_map[tensor.name] = name
            offset = layout.offsets[tensor.name]
            places[tensor.name] = (len(files), offset)
            wants.append(Want(tensor, whole(tensor.shape), dtype, offset, round=dtype != tensor.dtype))
        files.append(TargetFile(name, layout.size, ((0, layout.header),), tuple(wants)))
    if not single:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2, ensure_ascii=False).encode("utf-8") + b"\n"
        files.append(TargetFile(f"{stem}.safetensors.index.json", len(text), ((0, text),), ()))
    return Sharded(tuple(files), places)


def _shards(sizes: Sequence[int], max_shard: int) -> list[list[int]]:
    """Consecutive tensors of at most ``max_shard`` bytes in all; a longer one has a file to itself."""
    shards: list[list[int]] = []
    held = 0
    for k, size in enumerate(sizes):
        if not shards or (held and held + size > max_shard):
            shards.append([])
            held = 0
        shards[-1].append(k)
        held += size
    return shards
