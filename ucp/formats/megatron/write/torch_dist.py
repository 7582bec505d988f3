"""Writing a ``torch_dist`` folder that stock ``megatron.core.dist_checkpointing.load`` takes at any layout.

Layers that are alike are stacked under one key, as Megatron's own saves have them by default, and so are a layer's
experts. A chunk is rows of one parameter, so that a rank of any layout reads little more than its part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ucp.catalog import Catalog, LogicalTensor, ParameterInfo
from ucp.errors import BadArgument, Unsupported
from ucp.formats.dcp.writer import RecordWriter, WrittenRecord
from ucp.formats.megatron import COMMON, CONFIG, WRITTEN_FOR
from ucp.formats.megatron.read.common import EXTRA
from ucp.formats.megatron.write import common, mixers, places
from ucp.formats.megatron.write.mixers import RowsPart
from ucp.formats.megatron.write.objects import objects
from ucp.formats.megatron.write.places import KeyPlace
from ucp.formats.shared.torch_files import FileBuilder
from ucp.geometry import Shape
from ucp.parallel.mesh import Layout
from ucp.storage.rounding import ROUNDED
from ucp.transfer.targets import TargetFile

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def plan(
    catalog: Catalog, layout: Layout, *, dtype: str | None = None, per_layer: bool = False, plain: bool = False
) -> list[TargetFile]:
    """The files, metadata.json last. ``catalog`` has Megatron's names, and the files of its training state.

    dtype: of the weights of parameters that have masters; None for the type that the source had them in. per_layer:
    layers have keys of their own. plain: for a run without the distributed optimizer.
    Raises BadArgument for a type that is none, Unsupported for what such a folder can't hold.
    """
    if dtype is not None and dtype not in DTYPES:
        raise BadArgument(f"dtype: '{dtype}' is none of {', '.join(DTYPES)}")
    infos = {i.name: i for i in catalog.parameters.values() if i.kind != "padding"}
    for name, info in infos.items():
        if "param" not in info.states:
            raise Unsupported(f"'{name}' has optimizer states and no weight, which Megatron needs")
    stacked = not per_layer and not any(map(mixers.is_mixer, infos)) and places.alike(infos)
    stacks = places.Stacks(infos)
    entries = {name: stacks.entry(name, stacked) for name in infos}
    writer = RecordWriter(catalog, paths=False)
    trained = {name for name, info in infos.items() if set(info.states) - {"param"} and info.kind == "parameter"}
    by_key = _by_key(catalog, infos, entries, trained, dtype, plain)
    masters = any(key.startswith("optimizer.state.fp32_param.") for key in by_key)
    for key, tensors in by_key.items():
        _write(writer, key, tensors)
    for key, value in objects(catalog, entries, stacked).items():
        writer.add_object((key,), [value])
    ndims = {name: len(infos[name].shape) for name in infos if name in trained}
    kind = common.DISTRIBUTED if not plain else common.MASTERS if masters else common.FULL
    said = common.state(catalog, layout, stacked=stacked, kind=kind, ndims=ndims)
    text = json.dumps(
        {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
    ).encode()
    return [
        FileBuilder(COMMON, catalog).finish(said),
        *writer.finish(**{WRITTEN_FOR: {"tp": layout.tp, "pp": layout.pp, "ep": layout.ep, "dp": layout.dp}}),
        TargetFile(CONFIG, len(text), ((0, text),), ()),
    ]


@dataclass(frozen=True)
class _Placed:
    """One parameter's tensor in a key, or some rows of it. rounded: it is a copy of its master in a narrower type."""

    tensor: LogicalTensor
    dtype: str
    entry: KeyPlace
    rounded: bool = False
    part: RowsPart = mixers.WHOLE[0]

    @property
    def shape(self) -> Shape:
        return self.tensor.shape if self.part.count is None else (self.part.count, *self.tensor.shape[1:])

    @property
    def rows(self) -> tuple[int, int] | None:
        return None if self.part.count is None else (self.part.first, self.part.count)


def _by_key(
    catalog: Catalog,
    infos: Mapping[str, ParameterInfo],
    entries: Mapping[str, KeyPlace],
    trained: set[str],
    dtype: str | None,
    plain: bool,
) -> dict[str, list[_Placed]]:
    """All tensors of the folder by their keys."""
    out: dict[str, list[_Placed]] = {}
    kept = catalog.training_state.extra.get(EXTRA, {}).get("weights")

    def add(key: str, placed: _Placed) -> None:
        for part in mixers.parts(placed.tensor.name, infos):
            out.setdefault(f"{key}{part.ending}", []).append(replace(placed, part=part))

    for name, place in entries.items():
        for state in infos[name].states:
            tensor = catalog.tensors[name, state]
            if state != "param":
                add(f"optimizer.state.{state}.{place.key}", _Placed(tensor, tensor.dtype, place))
                continue
            low = tensor.dtype
            if name in trained:
                low = _weight_dtype(catalog, tensor, DTYPES.get(dtype or ""), kept)
                if not plain or low != tensor.dtype:
                    master = f"optimizer.state.{'fp32_param' if plain else 'param'}.{place.key}"
                    add(master, _Placed(tensor, tensor.dtype, place))
            add(place.key, _Placed(tensor, low, place, rounded=low != tensor.dtype))
    return out


def _weight_dtype(catalog: Catalog, master: LogicalTensor, asked: str | None, kept: Any) -> str:
    """The element type of a weight that has a master: as asked, as the source had it, or as it trained."""
    found = asked or (kept if isinstance(kept, str) else None)
    if found is None:
        config = catalog.training_state.config
        for key, name in (("bf16", "bfloat16"), ("fp16", "float16")):
            section = config.get(key)
            if isinstance(section, Mapping) and section.get("enabled") is True:
                found = name
    if found is None or (master.dtype, found) not in ROUNDED:
        return master.dtype
    return found


def _write(writer: RecordWriter, key: str, several: list[_Placed]) -> None:
    """Raises Unsupported for parameters of one key that have several types."""
    first = several[0]
    if len({(p.dtype, p.shape, p.entry.counts) for p in several}) > 1:
        raise Unsupported(f"'{key}' would be stacked of tensors of several types or shapes; write it with --per-layer")
    records: list[WrittenRecord] = []
    for placed in sorted(several, key=lambda p: p.entry.at):
        records += writer.records(placed.tensor, placed.dtype, placed.entry.at, placed.rounded, placed.rows)
    writer.add_written((key,), first.dtype, (*first.entry.counts, *first.shape), records)


def placed(files: list[TargetFile], tag: str) -> list[TargetFile]:
    """The files in an iteration's folder, with the file beside it that names it."""
    number = tag.removeprefix("iter_").lstrip("0") or "0"
    text = (number if tag.startswith("iter_") else tag).encode()
    pointer = TargetFile("latest_checkpointed_iteration.txt", len(text), ((0, text),), ())
    return [*(replace(file, name=f"{tag}/{file.name}") for file in files), pointer]
