"""What each rank of a layout holds of a checkpoint's tensors in a DeepSpeed run, and so what a resume brings to it.

A rank of ZeRO stage 1 or 2 holds its partition of every param group's masters and states, and everything that no
optimizer updates. At stage 3 it holds its piece of every parameter, and at stage 0 it holds everything. Under tensor,
pipeline and expert parallelism each rank's part of the model is cut in this way.

A model-parallel part (a pipeline stage's slice on a tensor-parallel rank) has a catalog of its own, the one that its
native files would be written from. What it trains is cut over the ranks that hold it. A rank's number counts stages
outermost and tensor-parallel ranks innermost (DeepSpeed ``runtime/pipe/topology.py: PipeModelDataParallelTopology``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ucp.catalog import Catalog, LogicalTensor, ParameterInfo
from ucp.errors import BadArgument, Unsupported
from ucp.formats.deepspeed.experts import counts, expert_of
from ucp.formats.deepspeed.write import experts, pipeline, tp_slices
from ucp.formats.deepspeed.write.experts import Spread
from ucp.formats.deepspeed.write.pipeline import Stages
from ucp.formats.nouns import Division
from ucp.formats.shared.renaming import best_names
from ucp.geometry import Blocks, Shape, concat, numel, whole
from ucp.parallel import zero
from ucp.parallel.mesh import Layout
from ucp.spec.select import Choice


@dataclass(frozen=True)
class ModelPart:
    """What some ranks hold together.

    catalog: the tensors, under the part's own names and shapes.
    ranks: the ranks that they are cut over, in order, by their numbers among all ranks.
    """

    catalog: Catalog
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class ModelParts:
    """The parts of a whole model.

    stages: the first layer of each pipeline stage, and at the end the number of layers; None without a pipeline.
    """

    parts: tuple[ModelPart, ...]
    stages: tuple[int, ...] | None


def divide(catalog: Catalog, layout: Layout, choice: Choice, given: Mapping[str, Any] | None) -> Division:
    """What each rank holds. Arguments and errors are those of `parts`."""
    found = parts(catalog, layout, choice, given)
    return Division((both for part in found.parts for both in held(part, layout)), found.stages)


def parts(catalog: Catalog, layout: Layout, choice: Choice, given: Mapping[str, Any] | None) -> ModelParts:
    """The parts of a model in this layout.

    choice: the spec, if tensor parallelism or other names need one.
    given: the DeepSpeed config of the resume, or None for the one that the checkpoint recorded. It says how AutoEP and
    AutoTP work, and under "pipeline" which layers each stage has (as in `ucp.formats.deepspeed.write.pipeline`).
    Without that, layers are divided as PipelineModule does by default.

    Raises Unsupported for layouts that can't be resumed in, or if nothing says how they cut the model. Raises
    BadArgument for a config that contradicts the layout, and SpecError and Mismatch if the spec doesn't fit.
    """
    config = catalog.training_state.config if given is None else given
    config = experts.with_ep(config, layout, given is not None)
    plain = tp_slices.without_padding(catalog)
    spread = None
    if layout.ep > 1 or counts(plain.parameters) or (layout.pp > 1 and experts.is_auto(config)):
        spread = experts.spread(plain, layout, config)
    if layout.tp * layout.pp == 1:
        return ModelParts(tuple(_with_experts(plain, spread, _ranks(layout, 0, 0), 0)), None)
    return _model_parallel(catalog, layout, choice, config, given is not None, spread)


def held(part: ModelPart, layout: Layout) -> Iterator[tuple[LogicalTensor, Blocks]]:
    """Every tensor of the part, with the boxes of it that ranks hold. ``buffers`` is the rank."""
    infos, dp = part.catalog.parameters, len(part.ranks)
    groups = [[n for n in group.names if n in infos] for group in part.catalog.training_state.param_groups]
    grouped = {name for names in groups for name in names}
    groups.append([n for n, info in infos.items() if info.kind == "parameter" and n not in grouped])
    cuts = {n: _cut_alone(info, dp, layout.zero) for n, info in infos.items() if info.kind != "parameter"}
    for names in groups:
        cuts.update(zip(names, _cut_group([infos[n].shape for n in names], dp, layout.zero), strict=True))
    numbers = np.array(part.ranks, np.int64)
    placed = {name: replace(blocks, buffers=numbers[blocks.buffers]) for name, blocks in cuts.items()}
    for tensor in part.catalog.tensors.values():
        yield tensor, placed[tensor.name]


# --- ZeRO ------------------------------------------------------------------------------------------------------------


def _cut_group(shapes: Sequence[Shape], dp: int, stage: int) -> list[Blocks]:
    """Where the trained parameters of one param group go. ``buffers`` is the rank among those that share them."""
    if stage == 0:
        return [_on_all(shape, dp) for shape in shapes]
    if stage == 3:
        return [zero.ceil_partition(shape, 0, dp) for shape in shapes]
    offsets, total = zero.flat_offsets([numel(shape) for shape in shapes])
    size = zero.partition_size(total, dp)
    return [zero.flat_partition(shape, at, size) for shape, at in zip(shapes, offsets, strict=True)]


def _cut_alone(info: ParameterInfo, dp: int, stage: int) -> Blocks:
    """Buffers are whole on every rank; so are frozen parameters below stage 3."""
    if stage == 3 and info.kind == "frozen":
        return zero.ceil_partition(info.shape, 0, dp)
    return _on_all(info.shape, dp)


def _on_all(shape: Shape, dp: int) -> Blocks:
    one = whole(shape)
    return concat((one.in_buffer(rank) for rank in range(dp)), len(shape))


# --- experts ---------------------------------------------------------------------------------------------------------


def _with_experts(
    catalog: Catalog, spread: Spread | None, ranks: tuple[int, ...], first: int | None
) -> Iterator[ModelPart]:
    """Each expert-parallel rank's experts on the ranks that have them, and the rest of the model on these ranks. first:
    the first rank that has any of these experts; None to leave experts out."""
    if spread is None:
        yield ModelPart(catalog, ranks)
        return
    shared = [name for name in catalog.parameters if not spread.layer_of(name)]
    yield ModelPart(_only(catalog, shared), ranks)
    for rank in range(spread.layout.ep if first is not None else 0):
        names = [name for name in catalog.parameters if spread.layer_of(name) and _is_on(name, spread, rank)]
        own = _only(catalog, names)
        if spread.auto:
            tensors = {
                key: experts.rank_rows(tensor, spread.held(spread.layer_of(key[0])), rank)
                for key, tensor in own.tensors.items()
            }
            infos = {n: replace(info, shape=tensors[n, "param"].shape) for n, info in own.parameters.items()}
            own = replace(own, parameters=infos, tensors=tensors)
        yield ModelPart(own, tuple((first or 0) + r for r in spread.data_ranks(rank)))


def _is_on(name: str, spread: Spread, rank: int) -> bool:
    """Whether a rank has some of these experts. Every rank has some of AutoEP's stacks."""
    expert = expert_of(name)
    return spread.auto or (expert is not None and expert.number // spread.held(expert.layer) == rank)


def _only(catalog: Catalog, names: Sequence[str]) -> Catalog:
    """The catalog with only these parameters."""
    kept = dict.fromkeys(names)
    state = catalog.training_state
    groups = (replace(group, names=tuple(n for n in group.names if n in kept)) for group in state.param_groups)
    return replace(
        catalog,
        parameters={name: catalog.parameters[name] for name in names},
        tensors={key: tensor for key, tensor in catalog.tensors.items() if key[0] in kept},
        training_state=replace(state, param_groups=tuple(groups)),
    )


# --- tensor parallelism and pipelines --------------------------------------------------------------------------------


def _model_parallel(
    catalog: Catalog, layout: Layout, choice: Choice, config: Mapping[str, Any], is_given: bool, spread: Spread | None
) -> ModelParts:
    autotp = _is_autotp(catalog, config, is_given)
    bound = choice.bound(None, "autotp" if autotp else "megatron")
    if layout.tp > 1 and bound is None:
        raise Unsupported(
            f"layout '{layout}': how tensor parallelism cuts the model is not known; give a spec (--spec)"
        )
    out: list[ModelPart] = []
    stages: Stages | None = None
    for tp in range(layout.tp):
        own = tp_slices.without_padding(catalog)
        if layout.tp > 1 and bound is not None:
            left_out = (lambda name: False) if spread is None else spread.layer_of
            own = tp_slices.sliced(catalog, bound, layout, tp, autotp, left_out)
        if layout.pp == 1:
            out += _with_experts(own, spread, _ranks(layout, 0, tp), None if tp else 0)
            continue
        if bound is not None:
            own = best_names(own, bound, pipeline.is_name)
        if stages is None:
            stages = _stages(own, layout, config)
        pipeline.check_names(own, stages)
        for pp in range(layout.pp):
            share = pipeline.share(own, stages, pp)
            of_stage = None if spread is None else experts.of_stage(share, spread, pp)
            if of_stage is not None and layout.zero:
                share = experts.in_stage(share, of_stage, own)
            out += _with_experts(share, of_stage, _ranks(layout, pp, tp), None if tp else _ranks(layout, pp, 0)[0])
    return ModelParts(tuple(out), None if stages is None else stages.bounds)


def _is_autotp(catalog: Catalog, config: Mapping[str, Any], is_given: bool) -> bool:
    """Whether DeepSpeed itself cuts the model, as the config says. A run without tensor parallelism tells nothing."""
    if not is_given and catalog.layout.tp == 1:
        return True
    section = config.get("tensor_parallel")
    return isinstance(section, Mapping) and int(section.get("autotp_size") or 1) > 1


def _ranks(layout: Layout, pp: int, tp: int) -> tuple[int, ...]:
    return tuple((pp * layout.dp + dp) * layout.tp + tp for dp in range(layout.dp))


def _stages(catalog: Catalog, layout: Layout, config: Mapping[str, Any]) -> Stages:
    """The split that the config says, else PipelineModule's default: by the layers' parameters."""
    section = config.get("pipeline")
    section = section if isinstance(section, Mapping) else {}
    if "partition" not in section:
        section = {**section, "partition": balanced(_weights(catalog, section, layout), layout.pp)}
    found = pipeline.stages({**config, "pipeline": section}, layout)
    if found is None:  # not with several stages
        raise BadArgument(f"layout '{layout}': has no pipeline")
    return found


def _weights(catalog: Catalog, section: Mapping[str, Any], layout: Layout) -> list[int]:
    """The number of the parameters' elements in each layer. Tied ones count in each of their layers."""
    tied = section.get("tied")
    tied = tied if isinstance(tied, Mapping) else {}
    out: Counter[int] = Counter()
    for name, info in catalog.parameters.items():
        first, _, rest = name.partition(".")
        if not pipeline.is_name(name):
            raise Unsupported(
                f"layout '{layout}': '{name}' is no name of a pipeline's, whose parameters are called '{{layer}}.…' or "
                "'tied_modules.{tie}.…'; give a spec (--spec) whose names: tell what is what"
            )
        layers = [int(first)] if first.isdigit() else tied.get(rest.partition(".")[0])
        if not isinstance(layers, list):
            raise BadArgument(
                f"layout '{layout}': '{name}' lies in the tied module '{rest.partition('.')[0]}', and nothing says "
                'which layers that is; give a DeepSpeed config (--ds-config) with "pipeline": {"tied": '
                f'{{"{rest.partition(".")[0]}": [0, 7]}}}}'
            )
        for layer in layers:
            # Stages are made of layers as a rank builds them: with its part of DeepSpeed's own experts, and with all
            # of those that AutoEP then divides.
            out[layer] += numel(info.shape) * (info.kind == "parameter") // (layout.ep if expert_of(name) else 1)
    return [out[layer] for layer in range(1 + max(out, default=-1))]


def balanced(weights: Sequence[int], count: int) -> list[int]:
    """The bounds of ``count`` consecutive spans of nearly equal weight.

    They are those of DeepSpeed's ``partition_balanced`` (``runtime/utils.py``), which
    ``partition_method="parameters"`` uses. From left to right, each split is the one whose heaviest and lightest span
    differ least, and the last one if several are equal.
    """
    n = len(weights)
    if n <= count:
        return [min(k, n) for k in range(count + 1)]
    upto = np.concatenate([[0.0], np.cumsum(np.asarray(weights, np.float64))])
    heaviest, lightest = np.full(n + 1, np.inf), np.full(n + 1, np.inf)
    heaviest[0] = 0.0
    splits = []
    for spans in range(1, count + 1):
        after, least = np.full(n + 1, np.inf), np.full(n + 1, np.inf)
        split = np.zeros(n + 1, np.int64)
        for end in range(spans, n + 1):
            last = upto[end] - upto[:end]
            high, low = np.maximum(heaviest[:end], last), np.minimum(lightest[:end], last)
            k = end - 1 - int(np.argmin((high - low)[::-1]))
            split[end], after[end], least[end] = k, high[k], low[k]
        splits.append(split)
        heaviest, lightest = after, least
    bounds = [n]
    for split in reversed(splits):
        bounds.append(int(split[bounds[-1]]))
    return bounds[::-1]
