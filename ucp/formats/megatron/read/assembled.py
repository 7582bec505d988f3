"""What a folder holds, put together: parameters' tensors by name and state, and the catalog of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog, LogicalTensor, ParamGroup
from ucp.errors import DamagedCheckpoint
from ucp.formats.megatron import NAME, keys
from ucp.formats.megatron.read import common, layout, module_states
from ucp.formats.megatron.read.unstack import joined, unstacked
from ucp.formats.shared.builder import Builder
from ucp.printable import logger
from ucp.storage.crc32 import in_order

log = logger(__name__)

BUFFERS = re.compile(r".*\.(expert_bias|local_tokens_per_expert|inv_freq)")
"""Tensors of modules that no optimizer updates."""
# A gate or an up projection saved by itself (megatron/core/transformer/mlp.py, fsdp_dtensor_checkpoint.py).
_HALF = re.compile(r".+\.(?:weight|bias)\d*_[wv]")


@dataclass(frozen=True)
class FolderParts:
    """The parts of a folder.

    tensors: by (name, state); a module's own tensors have the state `keys.WEIGHT`.
    groups: the param groups with their parameters' names; None where the common state has them without.
    steps: how often the optimizer stepped, by parameter, where each says it.
    """

    common: Mapping[str, Any]
    objects: Mapping[str, Any]
    tensors: Mapping[tuple[str, str], LogicalTensor]
    groups: tuple[ParamGroup, ...] | None = None
    steps: Mapping[str, int | float] = field(default_factory=dict)


def by_parameter(stored: Mapping[str, LogicalTensor]) -> dict[tuple[str, str], LogicalTensor]:
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
            if _HALF.fullmatch(key):
                raise DamagedCheckpoint(
                    f"'{key}' is one half of a gated layer, and its other half is not there; entries are missing"
                )
            for one in unstacked(tensor, keys.stack(key), state):
                if (one.name, state) in out:
                    raise DamagedCheckpoint(f"'{one.name}' ({state}) is there under several keys, such as '{key}'")
                out[one.name, state] = one
    return out


def catalog_of(
    folder: Path, found: FolderParts, builder: Builder, where: layout.RunLayout
) -> tuple[Catalog, list[LogicalTensor]]:
    """The catalog, and the modules' tensors that masters stand for."""
    by_name: dict[str, dict[str, LogicalTensor]] = {}
    for (name, state), tensor in found.tensors.items():
        by_name.setdefault(name, {})[state] = tensor
    trained = {name for name, states in by_name.items() if set(states) - {keys.WEIGHT}}
    saved = common.groups([*common.optimizers(found.common), *_distributed(found.objects)])
    once = common.step(folder, found.common, saved)
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
        if BUFFERS.fullmatch(name) and name not in trained:
            kind = "buffer"
        ordered = {state: states[state] for state in sorted(states, key=lambda s: (s != "param", s))}
        step = found.steps.get(name, once)
        scalars = {"step": step} if name in trained and step is not None else {}
        builder.add(name, kind, list(ordered.values()), scalars)
    ndims = {name: len(by_name[name][keys.WEIGHT].shape) for name in keys.order(trained)}
    groups, unnamed = common.named(saved, ndims) if saved else (found.groups or (), "")
    said = dict(found.common)
    if unnamed:
        said["param_groups"] = [group.options for group in saved]
    if low := {weight.dtype for weight in weights}:
        said["weights"] = low.pop() if len(low) == 1 else {weight.name: weight.dtype for weight in weights}
    beside = {key: value for key, value in found.objects.items() if ".distributed.dp_group_idx_" not in key}
    fp8, odd = module_states.told(beside, builder.files)
    unchecked = (*((unnamed,) if unnamed else ()), *odd)
    for sentence in unchecked:
        log.warning("%s: %s", folder, sentence)
    said[common.RUN] = {**where.others, **({"fp8": fp8} if fp8 else {})}
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
