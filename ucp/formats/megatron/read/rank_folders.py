"""Reading Megatron's older layout: a folder for each model-parallel rank, ``mp_rank_TT[_PPP][_EEE]``.

Each has ``model_optim_rng.pt`` with the rank's part of the model, and, with the distributed optimizer,
``distrib_optim.pt`` with the optimizer's buffers of its whole data-parallel group (megatron/training/checkpointing.py:
``get_checkpoint_name``; megatron/core/optimizer/distrib_optimizer.py: ``get_parameter_state_dp_zero``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ucp.catalog import Catalog, LogicalTensor
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.megatron import NAME, keys
from ucp.formats.megatron.read import agree, common, module_states
from ucp.formats.megatron.read.module_states import RanksStates
from ucp.formats.megatron.read.rank_places import (
    PlacedPart,
    RankPlace,
    is_gated,
    local_experts,
    norms,
    places,
    state_name,
)
from ucp.formats.megatron.read.rank_states import OwnTensor, optimizer_states
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.malformed import malformed
from ucp.formats.shared.unknown_objects import REFUSED, UnknownObjects, load_file
from ucp.geometry import Shape, concat
from ucp.parallel.mesh import Layout
from ucp.printable import logger, short
from ucp.storage import locations
from ucp.storage.crc32 import in_order
from ucp.storage.files import Files
from ucp.storage.torch_pt.values import TensorRef

log = logger(__name__)

MODEL, OPTIMIZER = "model_optim_rng.pt", "distrib_optim.pt"
_FOLDER = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3,5}))?(?:_(\d{3,5}))?")
_EXPERTS = re.compile(r".*\.experts\..*")


@dataclass(frozen=True)
class RankFolder:
    """A model-parallel rank's folder, what its file of the model holds, and the state dicts of its model's parts."""

    path: Path
    tp: int
    pp: int
    ep: int
    graph: Mapping[str, Any]
    chunks: tuple[Mapping[str, Any], ...]

    @property
    def file(self) -> Path:
        return self.path / MODEL

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(v.shape) for chunk in self.chunks for name, v in chunk.items() if isinstance(v, TensorRef)}


def read(path: Path, files: Files, unknown: UnknownObjects = REFUSED) -> Catalog:
    """The folder's catalog. Raises DamagedCheckpoint where ranks are missing or contradict each other, Unsupported by
    name for what can't be read exactly."""
    folder = locations.locate(path)
    ranks = _folders(folder, unknown)
    _check_step(folder, ranks)
    layout = _layout(folder, ranks)
    builder = Builder(files)
    found = _Found(builder)
    for rank in ranks:
        own = list(_own(folder, rank, ranks, layout, found))
        with malformed(rank.path):
            distributed = _distributed(rank, unknown)
            for tensor in optimizer_states(rank.file, rank.graph.get("optimizer"), distributed, own, builder):
                found.add(tensor.placed, tensor.state, tensor.ref, tensor.start)
    catalog, mastered = _catalog(folder, ranks, layout, found)
    catalog.check()
    agree.check(folder, catalog, mastered, files)
    return catalog


# --- the ranks' folders ----------------------------------------------------------------------------------------------


def _folders(folder: Path, unknown: UnknownObjects) -> list[RankFolder]:
    """The ranks' folders in order, none missing."""
    named = sorted((m, name) for name in locations.names(folder) if (m := _numbers(name)) is not None)
    widths = {len(numbers) for numbers, _ in named}
    if len(widths) > 1:
        raise DamagedCheckpoint(f"{folder}: its folders 'mp_rank_…' have {sorted(widths)} numbers; two runs are mixed")
    ranks = []
    for numbers, name in named:
        path = folder / name
        if not locations.is_file(path / MODEL):
            raise DamagedCheckpoint(f"{path}: has no '{MODEL}', which every model-parallel rank writes")
        graph = load_file(path / MODEL, unknown).graph
        if not isinstance(graph, Mapping):
            raise DamagedCheckpoint(f"{path / MODEL}: holds a {type(graph).__name__} where Megatron writes a dict")
        with malformed(path / MODEL):
            chunks = tuple(_chunks(path / MODEL, graph))
            ranks.append(RankFolder(path, *_places(numbers, chunks), graph, chunks))
    there = {(r.tp, r.pp, r.ep) for r in ranks}
    counts = tuple(1 + max(place[k] for place in there) for k in range(3))
    if len(there) != counts[0] * counts[1] * counts[2]:
        raise DamagedCheckpoint(
            f"{folder}: has {len(there)} folders 'mp_rank_…' of {counts[0]} tensor-parallel, {counts[1]} pipeline- and "
            f"{counts[2]} expert-parallel ranks; some are missing"
        )
    return ranks


def _numbers(name: str) -> tuple[int, ...] | None:
    found = _FOLDER.fullmatch(name)
    return None if found is None else tuple(int(n) for n in found.groups() if n is not None)


def _places(numbers: tuple[int, ...], chunks: Sequence[Mapping[str, Any]]) -> tuple[int, int, int]:
    """(tp, pp, ep) of a folder's numbers. Of two, the second is the expert rank where the file has the beginning
    and the end of the model, so that there is one stage; else it is the stage."""
    if len(numbers) == 3:
        return numbers[0], numbers[1], numbers[2]
    if len(numbers) == 1:
        return numbers[0], 0, 0
    names = {name for chunk in chunks for name in chunk}
    if {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"} <= names:
        return numbers[0], 0, numbers[1]
    return numbers[0], numbers[1], 0


def _chunks(file: Path, graph: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The state dict of the model, or of each of its virtual stages in order."""
    names = (
        ["model"] if "model" in graph else sorted((k for k in graph if re.fullmatch(r"model\d+", str(k))), key=_last)
    )
    if not names:
        raise DamagedCheckpoint(f"{file}: has no 'model'")
    for name in names:
        state = graph[name]
        if "language_model" in state:
            raise Unsupported(
                f"{file}: its model has a 'language_model', as Megatron's models before Megatron-Core; convert it with "
                "Megatron's tools/checkpoint/convert.py --loader megatron --saver core"
            )
        prefix = keys.without_prefix([k for k in state if isinstance(k, str)])
        yield {str(key).removeprefix(prefix): value for key, value in state.items()}


def _last(name: str) -> int:
    return int(name.removeprefix("model"))


def _check_step(folder: Path, ranks: list[RankFolder]) -> None:
    said = {r.graph.get("iteration") for r in ranks}
    named = re.fullmatch(r"iter_(\d{7,17})", folder.name)
    if named is not None and isinstance(next(iter(said)), int):
        said.add(int(named[1]))
    if len(said) > 1:
        raise DamagedCheckpoint(f"{folder}: its files are of iterations {sorted(map(str, said))}; two saves are mixed")


def _layout(folder: Path, ranks: list[RankFolder]) -> Layout:
    """The layout. Raises DamagedCheckpoint where the arguments contradict the folders."""
    args = common.arguments(ranks[0].graph)
    counts = {
        "tp": 1 + max(r.tp for r in ranks),
        "pp": 1 + max(r.pp for r in ranks),
        "ep": 1 + max(r.ep for r in ranks),
    }
    words = {"tp": "tensor", "pp": "pipeline", "ep": "expert"}
    for key, word in words.items():
        said = args.get(f"{word}_model_parallel_size")
        if isinstance(said, int) and said != counts[key]:
            raise DamagedCheckpoint(
                f"{folder}: its arguments say {said} {word}-parallel ranks, and there are folders of {counts[key]}; "
                "files of two runs are mixed"
            )
    etp = args.get("expert_tensor_parallel_size")
    if isinstance(etp, int) and etp != counts["tp"] and any(_EXPERTS.fullmatch(n) for n in ranks[0].shapes()):
        raise Unsupported(
            f"{folder}: its experts are cut for {etp} tensor-parallel ranks and all else for {counts['tp']}, which is "
            "not read; load it with Megatron and save it with --ckpt-format torch_dist"
        )
    world = args.get("world_size")
    dp = world // (counts["tp"] * counts["pp"]) if isinstance(world, int) else counts["ep"]
    ep = counts["ep"]
    sharded = any(locations.is_file(rank.path / OPTIMIZER) for rank in ranks)
    dp = dp if dp > 0 and dp % ep == 0 else ep
    return Layout(dp=dp, tp=counts["tp"], pp=counts["pp"], ep=ep, zero=int(sharded))


def _distributed(rank: RankFolder, unknown: UnknownObjects) -> Any:
    """What the distributed optimizer wrote; None without one."""
    if locations.is_file(rank.path / OPTIMIZER):
        return load_file(rank.path / OPTIMIZER, unknown).graph
    own = rank.graph.get("optimizer")
    first = own[0] if isinstance(own, (list, tuple)) and own else own
    inner = first.get("optimizer") if isinstance(first, Mapping) else None
    if isinstance(inner, Mapping) and "state" not in inner and rank.ep == 0:
        raise DamagedCheckpoint(
            f"{rank.path}: has no '{OPTIMIZER}', and its optimizer is the distributed one, whose states are there"
        )
    return None


# --- what they hold --------------------------------------------------------------------------------------------------


@dataclass
class _Found:
    """All tensors' fragments by parameter and state, each once; copies beside them."""

    builder: Builder
    tensors: dict[tuple[str, str], LogicalTensor] = field(default_factory=dict)
    copies: list[LogicalTensor] = field(default_factory=list)
    seen: set[tuple[str, str, bytes]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.states = RanksStates(self.builder.files)

    def add(self, placed: PlacedPart, state: str, ref: TensorRef, start: int = 0) -> None:
        """start: element of ``ref``, a flat buffer, from which the rank's tensor lies there row-major."""
        blocks = placed.blocks.in_buffer(self.builder.file(ref), start)
        bases = np.full(len(blocks), ref.offset, np.int64)
        tensor = LogicalTensor(placed.name, state, placed.shape, ref.dtype, blocks, bases)
        key = (placed.name, state)
        mark = (*key, blocks.offsets.tobytes())
        known = self.tensors.get(key)
        if known is not None and (known.shape, known.dtype) != (tensor.shape, tensor.dtype):
            raise DamagedCheckpoint(
                f"{ref.file}: '{placed.name}' ({state}) is {tensor.dtype} {list(tensor.shape)}, and {known.dtype} "
                f"{list(known.shape)} by another rank's file; files of two runs are mixed"
            )
        if mark in self.seen:
            self.copies.append(tensor)
            return
        self.seen.add(mark)
        if known is None:
            self.tensors[key] = tensor
            return
        both = concat([known.blocks, blocks], len(placed.shape))
        self.tensors[key] = replace(known, blocks=both, bases=np.concatenate([known.bases, bases]))


def _own(folder: Path, rank: RankFolder, ranks: list[RankFolder], layout: Layout, found: _Found) -> Iterator[OwnTensor]:
    """The rank's tensors in its module's order, entered with their weights."""
    shapes = rank.shapes()
    args = common.arguments(rank.graph)
    total = args.get("num_experts")
    given = total // layout.ep if isinstance(total, int) and total > 0 else None
    with malformed(rank.file):
        experts, gated = local_experts(shapes, given), is_gated(shapes)
    firsts = _first_layers(folder, ranks, layout.pp, rank.pp)
    tied = layout.pp > 1 and args.get("untie_embeddings_and_output_weights") is False
    for number, chunk in enumerate(rank.chunks):
        place = RankPlace(rank.tp, layout.tp, rank.ep, firsts[number], experts, gated, norms(chunk))
        for name, value in chunk.items():
            if name.endswith(keys.MODULE_STATE):
                found.states.add(name, state_name(name, place), value)
                continue
            if not isinstance(value, TensorRef):
                continue
            if not value.is_contiguous:
                raise Unsupported(f"{rank.file}: '{name}' does not lie in one piece, which is not read")
            own = "embedding.word_embeddings.weight" if tied and name == "output_layer.weight" else name
            parts = tuple(places(own, tuple(value.shape), place))
            for part in parts:
                found.add(part, keys.WEIGHT, value)
            yield OwnTensor(name, value, parts)


def _first_layers(folder: Path, ranks: list[RankFolder], pp: int, stage: int) -> list[int]:
    """The global number of the first layer of each of a stage's chunks: virtual stages go round all stages."""
    counts = {(r.pp, k): _layers(chunk) for r in ranks if r.tp == 0 and r.ep == 0 for k, chunk in enumerate(r.chunks)}
    chunks = 1 + max(k for _, k in counts)
    if len(counts) != pp * chunks:
        raise DamagedCheckpoint(f"{folder}: its stages have different numbers of virtual stages")
    order = [(p, k) for k in range(chunks) for p in range(pp)]
    return [sum(counts[at] for at in order[: order.index((stage, k))]) for k in range(chunks)]


def _layers(chunk: Mapping[str, Any]) -> int:
    numbers = {keys.layer(name) for name in chunk if name.startswith(("decoder.layers.", "encoder.layers."))}
    return len(numbers - {None})


# --- the catalog -----------------------------------------------------------------------------------------------------


def _catalog(
    folder: Path, ranks: list[RankFolder], layout: Layout, found: _Found
) -> tuple[Catalog, list[LogicalTensor]]:
    """The catalog, and the modules' tensors that masters stand for."""
    builder, first = found.builder, ranks[0].graph
    by_name: dict[str, dict[str, LogicalTensor]] = {}
    for (name, state), tensor in found.tensors.items():
        by_name.setdefault(name, {})[state] = tensor
    trained = {name for name, states in by_name.items() if set(states) - {keys.WEIGHT}}
    said = {**first, "optimizer": _as_common(first.get("optimizer"), builder)}
    saved = common.groups(common.optimizers(said))
    step = common.step(folder, said, saved)
    mastered: list[LogicalTensor] = []
    for name in keys.order(by_name):
        states = dict(by_name[name])
        weight = replace(states.pop(keys.WEIGHT), state="param")
        if "param" in states:
            mastered.append(weight)
        else:
            states = {"param": weight, **states}
        floating = "float" in weight.dtype
        kind = "parameter" if name in trained or (not trained and floating) else "frozen" if floating else "buffer"
        scalars = {"step": step} if name in trained and step is not None else {}
        builder.add(name, kind, [states[s] for s in sorted(states, key=lambda s: (s != "param", s))], scalars)
    ndims = {name: len(by_name[name][keys.WEIGHT].shape) for name in keys.order(trained)}
    groups, unnamed = common.named(saved, ndims) if saved else ((), "")
    fp8, odd = module_states.told(found.states.objects, builder.files)
    unchecked = (*((unnamed,) if unnamed else ()), *found.states.apart(), *odd)
    for sentence in unchecked:
        log.warning("%s: %s", folder, sentence)
    rest = {k: v for k, v in said.items() if not re.fullmatch(r"model\d*|rng_state", str(k))}
    if low := {weight.dtype for weight in mastered}:
        rest["weights"] = low.pop() if len(low) == 1 else {weight.name: weight.dtype for weight in mastered}
    args = common.arguments(first)
    counts = {"cp": args.get("context_parallel_size"), "vp": len(ranks[0].chunks) if len(ranks[0].chunks) > 1 else None}
    sharding = "distrib_optim.pt" if layout.zero else "none"
    rest[common.RUN] = {**{k: v for k, v in counts.items() if v is not None}, "optimizer_sharding": sharding}
    if fp8:
        rest[common.RUN]["fp8"] = fp8
    objects = {
        f"rng_state/shard_{r.pp}.{r.tp}_{layout.pp}.{layout.tp}": r.graph["rng_state"]
        for r in ranks
        if r.ep == 0 and r.graph.get("rng_state") is not None
    }
    catalog = Catalog(
        format=NAME,
        writer="megatron (older layout)",
        layout=layout,
        files=tuple(builder.sources),
        parameters=builder.parameters,
        tensors=builder.tensors,
        training_state=common.training_state(rest, {**objects, **found.states.objects}, groups, layout.dp),
        crc_records=in_order(builder.records),
        copies=tuple(_copies(found, by_name)),
        unchecked=unchecked,
    )
    return catalog, mastered


def _copies(found: _Found, by_name: Mapping[str, Mapping[str, LogicalTensor]]) -> Iterator[LogicalTensor]:
    """What several ranks hold, as copies of what the catalog has."""
    for copy in found.copies:
        mastered = "param" in by_name[copy.name]
        if copy.state != keys.WEIGHT:
            yield copy
        elif not mastered:
            yield replace(copy, state="param")


def _as_common(value: Any, builder: Builder) -> Any:
    """The optimizer's own state as the newer layout's common state has it: groups, and one step for all."""
    if isinstance(value, (list, tuple)):
        return {k: _as_common(one, builder) for k, one in enumerate(value)}
    if not isinstance(value, Mapping):
        return value
    inner = value.get("optimizer", value)
    if not isinstance(inner, Mapping) or "param_groups" not in inner:
        raise DamagedCheckpoint(f"the optimizer's state has no param_groups: {short(sorted(map(str, inner)))}")
    groups = [
        {k: builder.scalar(v) if isinstance(v, TensorRef) and v.numel == 1 else v for k, v in group.items()}
        for group in inner["param_groups"]
    ]
    steps = {
        builder.scalar(s["step"]) if isinstance(s["step"], TensorRef) else s["step"]
        for s in (inner.get("state") or {}).values()
        if isinstance(s, Mapping) and "step" in s
    }
    own: dict[str, Any] = {"param_groups": groups}
    if len(steps) > 1:
        raise DamagedCheckpoint(f"its parameters have made {sorted(steps)} steps; they should agree")
    if steps:
        own["state"] = {"common_step": steps.pop()}
    rest = {key: value[key] for key in ("grad_scaler",) if key in value}
    return {"optimizer": own, **rest} if "optimizer" in value else own
