"""The layout that a Megatron run had: what its arguments say, else what its keys and chunks show."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ucp.catalog import LogicalTensor
from ucp.errors import DamagedCheckpoint
from ucp.formats.megatron import keys
from ucp.formats.megatron.read.common import arguments, optimizers
from ucp.parallel.mesh import Layout

_RANK = re.compile(r"__(\d+)_\d+\.distcp")
_ITERATION = re.compile(r"iter_(\d{7,17})")
# Ranks that may have written nothing, after the last that did: as many as are tried.
_MORE_RANKS = 256
# Cut evenly over tensor-parallel ranks along an axis, in every model, and in one piece on each rank.
_EVENLY_CUT = ("word_embeddings.weight", "output_layer.weight", "linear_proj.weight", "linear_fc2.weight")


@dataclass(frozen=True)
class RunLayout:
    """The layout of a run.

    layout: its dp is that of the dense layers and includes context parallelism.
    others: cp, vp and the optimizer's sharding, if they are known.
    stages: the pipeline stage of each layer of the decoder, if there are several.
    """

    layout: Layout
    others: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[int, int] = field(default_factory=dict)


def of(
    folder: Path,
    common: Mapping[str, Any],
    objects: Mapping[str, Any],
    stored: Mapping[str, LogicalTensor],
    paths: Sequence[str],
    written_for: Any = None,
) -> RunLayout:
    """The layout. written_for: which one we wrote the folder for, if we did (`WRITTEN_FOR`).

    Raises DamagedCheckpoint where what is said contradicts the chunks, or the folder's name the iteration.
    """
    check_iteration(folder, common)
    args = arguments(common)
    tp, pp, ep = (
        _count(args, key)
        for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    )
    cut, shown, ours = _cuts(stored), _rng(objects), {}
    if isinstance(written_for, Mapping):
        # Our chunks are rows, and random generators stay those of the run that had them.
        ours = {key: _count(written_for, key) for key in ("tp", "pp", "ep", "dp")}
        cut, shown = ours["tp"], None
    _check_agree(folder, (tp, pp), (cut, ours.get("pp")), shown)
    tp, pp, ep = tp or ours.get("tp"), pp or ours.get("pp"), ep or ours.get("ep")
    groups = {int(m[1]) for key in stored if (m := re.search(r"optimizer\.distributed\.dp_group_idx_(\d+)\.", key))}
    tp = tp or (shown[1] if shown else None) or cut or 1
    pp = pp or (shown[0] if shown else None) or (_dense_groups(stored) // tp if groups else None)
    ranks = [int(match[1]) for path in paths if (match := _RANK.fullmatch(os.path.basename(path)))]
    world = _count(args, "world_size")
    if world is None and tp and pp and ours.get("dp"):
        world = tp * pp * (ours["dp"] or 1)
    holders = _Holders(
        _ranks("layers", stored, paths), _ranks("experts", stored, paths), world or max(ranks, default=0) + 1, tp
    )
    if world is None:
        # The last ranks may have had nothing to write.
        counts = range(holders.world, min(2 * holders.world, holders.world + _MORE_RANKS))
        more = (replace(holders, world=count) for count in counts if count % tp == 0)
        holders = next((one for one in more if one.stages()), holders)
        world = holders.world
    if pp is not None and not args.get("use_tp_pp_dp_mapping"):
        _check_stages(folder, pp, holders)
    pp = pp or holders.stages() or 1
    ep = ep or holders.expert_ranks(pp) or 1
    dp = max(world // (tp * pp), 1)
    kinds = {str(one.get("param_state_sharding_type")) for one in optimizers(common)} - {"None"}
    others = {
        "cp": _count(args, "context_parallel_size"),
        "vp": _count(args, "virtual_pipeline_model_parallel_size"),
        "optimizer_sharding": next(iter(kinds), None),
    }
    return RunLayout(
        Layout(dp=dp, tp=tp, pp=pp, ep=ep if dp % ep == 0 else 1, zero=1 if kinds else 0),
        {key: value for key, value in others.items() if value is not None},
        holders.stage_of_layers(pp),
    )


def _check_agree(
    folder: Path,
    said: tuple[int | None, int | None],
    cut: tuple[int | None, int | None],
    shown: tuple[int, int] | None,
) -> None:
    """Raise DamagedCheckpoint if (tp, pp) of the arguments are not those that the tensors are cut for, or of which
    there are random generators, (pp, tp)."""
    for one, other, word in zip(said, cut, ("tensor-parallel ranks", "pipeline stages"), strict=True):
        if one is not None and other is not None and one != other:
            raise DamagedCheckpoint(
                f"{folder}: its arguments say {one} {word}, and its tensors are cut for {other}; files of two runs are "
                "mixed"
            )
    tp, pp = said
    if shown is not None and ((tp or shown[1]) != shown[1] or (pp or shown[0]) != shown[0]):
        raise DamagedCheckpoint(
            f"{folder}: its arguments say {tp} tensor- and {pp} pipeline-parallel ranks, and there are random "
            f"generators of {shown[1]} and {shown[0]}; files of two runs are mixed"
        )


def _check_stages(folder: Path, pp: int, holders: _Holders) -> None:
    """Raise DamagedCheckpoint if a layer was written by ranks of several stages."""
    each = max(holders.world // pp, 1)
    for layer, ranks in holders.layers.items():
        if min(ranks) // each != max(ranks) // each:
            raise DamagedCheckpoint(
                f"{folder}: its arguments say {pp} pipeline stages, and layer {layer} was written by the ranks "
                f"{sorted(ranks)[:8]} of {holders.world}, which are of several; files of two runs are mixed"
            )


def check_layers(folder: Path, common: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise DamagedCheckpoint if the decoder does not have the number of layers that the arguments say."""
    said = _count(arguments(common), "num_layers")
    found = keys.layer_counts(names).get("decoder.layers")
    if said is not None and found is not None and said != found:
        raise DamagedCheckpoint(
            f"{folder}: its arguments say {said} layers, and its decoder has {found}; files of two runs are mixed"
        )


def check_iteration(folder: Path, common: Mapping[str, Any]) -> None:
    """Raise DamagedCheckpoint if the folder's name says another iteration."""
    named, said = _ITERATION.fullmatch(folder.name), common.get("iteration")
    if named is not None and isinstance(said, int) and said != int(named[1]):
        raise DamagedCheckpoint(
            f"{folder}: is called by iteration {int(named[1])}, and its common state is of iteration {said}; files of "
            "two iterations are mixed, or the folder was renamed"
        )


def _count(args: Mapping[str, Any], key: str) -> int | None:
    found = args.get(key)
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 < found < 2**31 else None


def _cuts(stored: Mapping[str, LogicalTensor]) -> int | None:
    """How many ways tensors are cut that tensor-parallel ranks share evenly; None where there are none."""
    found = 0
    for key, tensor in stored.items():
        parsed = keys.parse(key)
        if parsed.state != keys.WEIGHT or not parsed.model.endswith(_EVENLY_CUT) or ".experts." in parsed.model:
            continue
        lead = len(keys.stack(parsed.model).axes)
        offsets = tensor.blocks.offsets[:, lead:]
        found = max(found, *(len(np.unique(offsets[:, axis])) for axis in range(offsets.shape[1])), 0)
    return found or None


def _rng(objects: Mapping[str, Any]) -> tuple[int, int] | None:
    """(pp, tp) as the random generators' places have them."""
    for key in objects:
        found = keys.object_key(key)
        if found is not None and found[0] == "rng_state" and len(found[2]) >= 2:
            return found[2][0], found[2][1]
    return None


def _dense_groups(stored: Mapping[str, LogicalTensor]) -> int:
    """Data-parallel groups of the dense layers' optimizer: one for each tensor- and pipeline-parallel rank."""
    found = {
        int(m[2]): m[1]
        for key in stored
        if (m := re.match(r"(chained_0\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.", key))
    }
    return len(found)


@dataclass(frozen=True)
class _Holders:
    """Which ranks wrote what, in Megatron's order of ranks: tensor parallel first, pipeline stages last."""

    layers: Mapping[int, set[int]]
    experts: Mapping[int, set[int]]
    world: int
    tp: int

    def stages(self) -> int | None:
        """The most pipeline stages of which each holds layers, and no layer lies in two."""
        ends = [(min(ranks), max(ranks)) for ranks in self.layers.values()]
        for pp in range(min(len(ends), self.world // self.tp), 1, -1):
            each = self.world // pp
            within = self.world % (pp * self.tp) == 0 and all(low // each == high // each for low, high in ends)
            if within and len({low // each for low, _ in ends}) == pp:
                return pp
        return None

    def stage_of_layers(self, pp: int) -> dict[int, int]:
        """Each layer's stage: of the ranks that wrote it, or where that is not one, by equal parts in order."""
        out = {}
        for layer, ranks in self.layers.items():
            at = {rank // max(self.world // pp, 1) for rank in ranks}
            out[layer] = at.pop() if len(at) == 1 else layer * pp // len(self.layers)
        return out

    def expert_ranks(self, pp: int) -> int | None:
        """The most expert-parallel ranks of which each holds its part of the experts, and no other's."""
        experts = self.experts
        for ep in range(min(len(experts), self.world // (self.tp * pp)), 1, -1):
            if len(experts) % ep or (self.world // (self.tp * pp)) % ep:
                continue
            each = len(experts) // ep
            if all({rank // self.tp % ep for rank in ranks} == {e // each} for e, ranks in experts.items()):
                return ep
        return None


def _ranks(axis: str, stored: Mapping[str, LogicalTensor], paths: Sequence[str]) -> dict[int, set[int]]:
    """The ranks that wrote something of each layer of the decoder, or of each expert."""
    who = np.array([int(m[1]) if (m := _RANK.fullmatch(os.path.basename(p))) else -1 for p in paths])
    out: dict[int, set[int]] = {}
    for key, tensor in stored.items():
        parsed = keys.parse(key)
        stack = keys.stack(parsed.model)
        if parsed.state != keys.WEIGHT or not len(tensor.blocks):
            continue
        ranks = who[tensor.blocks.buffers]
        if axis in stack.axes:
            at = tensor.blocks.offsets[:, stack.axes.index(axis)]
            for number in np.unique(at).tolist():
                out.setdefault(number, set()).update(ranks[at == number].tolist())
        elif axis == "layers" and (number := keys.layer(parsed.model)) is not None:
            out.setdefault(number, set()).update(ranks.tolist())
    return out
