"""Reading ``fsdp_dtensor``: what a run under Megatron-FSDP saves with torch's DCP.

The state dict of Megatron's training program, flattened: the model's tensors and the optimizer's moments by the names
that modules have on a rank, each a DTensor cut where Megatron-FSDP's buffers are; the param groups by parameter; and
all else as single objects (megatron/core/transformer/fsdp_dtensor_checkpoint.py, optimizer/distrib_optimizer.py:
``sharded_param_state_fsdp_dtensor``). There is no ``common.pt`` and no ``metadata.json``. Gated layers are saved in two
parts, experts have their global numbers, and the model's weights are the masters.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog, LogicalTensor, ParamGroup
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.dcp import METADATA, metadata
from ucp.formats.dcp.records import Records
from ucp.formats.dcp.records import tensors as tensors_of
from ucp.formats.megatron import keys
from ucp.formats.megatron.read import layout
from ucp.formats.megatron.read.assembled import FolderParts, by_parameter, catalog_of
from ucp.formats.megatron.read.common import arguments
from ucp.formats.megatron.read.rank_places import RankPlace, logical_name, norms
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.malformed import malformed
from ucp.formats.shared.unknown_objects import REFUSED, UnknownObjects
from ucp.parallel.mesh import Layout
from ucp.storage.files import Files
from ucp.storage.torch_pt.values import TensorRef

_RANK = re.compile(r"__(\d+)_\d+\.distcp")
_GROUPED = re.compile(r"(.+\.experts)\.(linear_fc\d)\.(weight|bias)(\d+)((?:_[wv])?)")
_STACKED = re.compile(r".+\.experts\.weight[12]")
# DistributedDataParallelConfig.data_parallel_sharding_strategy, as ZeRO's stages.
_STAGES = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}


def read(folder: Path, files: Files, unknown: UnknownObjects = REFUSED) -> Catalog:
    """The folder's catalog. Raises as `torch_dist.read`."""
    meta = metadata.load(folder)
    builder = Builder(files)
    with malformed(folder / METADATA):
        found = _entries(folder, meta, builder, unknown)
    layout.check_iteration(folder, found.common)
    where = _layout(folder, found, [os.path.basename(file.path) for file in builder.sources])
    tensors = by_parameter(found.stored)
    layout.check_layers(folder, found.common, (name for name, _ in tensors))
    objects = _generators(found.common.pop("rng_state", None), where.layout)
    groups = _groups(found.groups, {name for name, _ in tensors})
    catalog, _ = catalog_of(folder, FolderParts(found.common, objects, tensors, groups, found.steps), builder, where)
    catalog.check()
    return catalog


# --- the entries -----------------------------------------------------------------------------------------------------


@dataclass
class _Entries:
    """stored: tensors by `keys.parse`'s keys. steps, groups: by parameter. common: all else, nested as it was."""

    stored: dict[str, LogicalTensor] = field(default_factory=dict)
    steps: dict[str, int | float] = field(default_factory=dict)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)


def _entries(folder: Path, meta: metadata.Metadata, builder: Builder, unknown: UnknownObjects) -> _Entries:
    """All entries by what they are. Raises DamagedCheckpoint for one whose path is not recorded."""
    lost = sorted((meta.tensors.keys() | meta.objects.keys()) - meta.paths.keys())
    if lost:
        raise DamagedCheckpoint(f"{folder / METADATA}: does not say where in the state dict '{lost[0]}' was")
    out = _Entries()
    owned = {key: own for key, path in meta.paths.items() if (own := _owned(path)) is not None}
    prefixes = {
        kind: keys.without_prefix(name for k, name, _ in owned.values() if k == kind)
        for kind in ("model", "state", "param_to_group_meta")
    }
    names = (name.removeprefix(prefixes["model"]) for kind, name, _ in owned.values() if kind == "model")
    place = RankPlace(0, 1, 0, 0, 0, False, norms(names))
    large = {key for key in meta.tensors if key in owned and owned[key][2] != "step"}
    with Records(folder, builder) as records:
        stored = tensors_of({key: meta.tensors[key] for key in large}, records)
        for key, path in meta.paths.items():
            kind, name, what = owned.get(key, ("", "", ""))
            name = _named(folder, name.removeprefix(prefixes.get(kind, "")), place)
            if key in large:
                out.stored[name if kind == "model" else f"optimizer.state.{what}.{name}"] = stored[key]
                continue
            value = _value(key, meta, records, builder, unknown)
            if kind == "param_to_group_meta":
                out.groups.setdefault(name, {})[what] = value
            elif what == "step":
                _add_step(folder, out.steps, name, value)
            elif kind == "":
                _nest(out.common, path, value)
    out.common = _with_lists(out.common)
    return out


def _owned(path: tuple[Any, ...]) -> tuple[str, str, str] | None:
    """(kind, parameter, what of it) of a parameter's entry; None for any other."""
    if len(path) == 2 and path[0] == "model":
        return "model", str(path[1]), ""
    if len(path) == 4 and path[0] == "optimizer" and path[1] in ("state", "param_to_group_meta"):
        return str(path[1]), str(path[2]), str(path[3])
    return None


def _named(folder: Path, name: str, place: RankPlace) -> str:
    """The name that one rank's whole model would have: an expert of a grouped layer is a module of its own."""
    if _STACKED.fullmatch(name):
        raise Unsupported(
            f"{folder}: '{name}' holds several experts under one name on every expert-parallel rank, and Megatron-FSDP "
            "keeps one rank's; save it from a run with sequential or Transformer Engine's experts"
        )
    found = _GROUPED.fullmatch(name)
    if found is not None:
        name = f"{found[1]}.local_experts.{found[4]}.{found[2]}.{found[3]}{found[5]}"
    return logical_name(name, place)


def _value(key: str, meta: metadata.Metadata, records: Records, builder: Builder, unknown: UnknownObjects) -> Any:
    """An object, or a tensor that is no parameter's: a number where it has one element."""
    if key in meta.objects:
        return records.load(key, meta.objects[key], unknown)
    chunks = meta.tensors[key].chunks
    if len(chunks) != 1:
        raise DamagedCheckpoint(f"'{key}' is no parameter's, and it lies in {len(chunks)} pieces")
    found = records.load(key, chunks[0].record, unknown)
    return builder.scalar(found) if isinstance(found, TensorRef) and found.numel == 1 else found


def _add_step(folder: Path, steps: dict[str, int | float], name: str, value: Any) -> None:
    for part in ("_w", "_v"):
        name = name.removesuffix(part)
    if not isinstance(value, (int, float)) or steps.setdefault(name, value) != value:
        raise DamagedCheckpoint(f"{folder}: the two parts of '{name}' have made {steps.get(name)} and {value} steps")


def _nest(into: dict[str, Any], path: Sequence[Any], value: Any) -> None:
    for key in path[:-1]:
        into = into.setdefault(key, {})
    into[path[-1]] = value


def _with_lists(value: Any) -> Any:
    """A nested dict with lists where the keys are numbers."""
    if type(value) is not dict:
        return value
    inner = {key: _with_lists(item) for key, item in value.items()}
    if inner and all(type(key) is int for key in inner):
        return [inner[key] for key in sorted(inner)]
    return inner


# --- the run ---------------------------------------------------------------------------------------------------------


def _layout(folder: Path, found: _Entries, files: Iterable[str]) -> layout.RunLayout:
    """The layout that the arguments say. Raises Unsupported for pipelines."""
    args = arguments(found.common)

    def count(key: str) -> int:
        value = args.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 1

    stages = max(
        count("pipeline_model_parallel_size"), *(pp + 1 for pp, _ in _places(found.common.get("rng_state"))), 1
    )
    if stages > 1:
        raise Unsupported(
            f"{folder}: was saved by {stages} pipeline stages, and in this form each calls its layers by its own "
            "numbers, so that one stage's layers stand for all; save it as torch_dist, or from a run of one stage"
        )
    tp, ep = count("tensor_model_parallel_size"), count("expert_model_parallel_size")
    writers = 1 + max((int(m[1]) for name in files if (m := _RANK.fullmatch(name))), default=0)
    dp = max(max(count("world_size"), writers) // tp, 1)
    others = {"cp": args.get("context_parallel_size"), "optimizer_sharding": "fsdp_dtensor"}
    zero = _STAGES.get(str(args.get("data_parallel_sharding_strategy")), 3)
    return layout.RunLayout(
        Layout(dp=dp, tp=tp, ep=ep if dp % ep == 0 else 1, zero=zero if found.groups else 0),
        {key: value for key, value in others.items() if value is not None},
    )


def _places(saved: Any) -> list[tuple[int, int]]:
    """(pp, tp) of the random generators that were saved."""
    names = saved if isinstance(saved, Mapping) else ()
    return [(int(m[1]), int(m[2])) for name in names if (m := re.fullmatch(r"\((\d{1,9}), (\d{1,9})\)", str(name)))]


def _generators(saved: Any, run: Layout) -> dict[str, Any]:
    """The random generators as objects of the ranks that had them."""
    return {f"rng_state/shard_{pp}.{tp}_{run.pp}.{run.tp}": saved[f"({pp}, {tp})"] for pp, tp in _places(saved)}


def _groups(saved: Mapping[str, Mapping[str, Any]], names: set[str]) -> tuple[ParamGroup, ...]:
    """The param groups: the parameters that have the same options, as far as the model has them."""
    groups: list[tuple[list[str], Mapping[str, Any]]] = []
    for name in keys.order(sorted(saved)):
        if name not in names:
            continue
        known = next((members for members, options in groups if options == saved[name]), None)
        if known is None:
            groups.append(([name], saved[name]))
        else:
            known.append(name)
    return tuple(ParamGroup(tuple(members), options) for members, options in groups)
