"""A native DeepSpeed checkpoint of any ZeRO stage and data-parallel degree, as files to be written.

DeepSpeed 0.19.8 loads it without this project. Sources of the layout: ``runtime/engine.py``
(``_common_checkpoint_state``, ``_save_checkpoint``, ``_save_zero_checkpoint`` and their ``_load`` counterparts), and
``state_dict`` and ``load_state_dict`` of ``runtime/zero/stage_1_and_2.py``, ``runtime/zero/stage3.py``,
``runtime/bf16_optimizer.py``, ``runtime/fp16/fused_optimizer.py`` and ``unfused_optimizer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ucp.catalog import Catalog
from ucp.errors import Unsupported
from ucp.formats.deepspeed.write import affine_info, experts, pipeline, tp_slices
from ucp.formats.deepspeed.write.config import VERSION, EngineConfig, engine_config
from ucp.formats.deepspeed.write.experts import Spread
from ucp.formats.deepspeed.write.groups import check_groups, flats
from ucp.formats.deepspeed.write.model_files import ModelRank, model_file, model_files, weight
from ucp.formats.deepspeed.write.optimizer_files import optimizer_file
from ucp.formats.deepspeed.write.pipeline import Stages
from ucp.formats.deepspeed.write.stage0_files import stage0_file, stage0_optimizer
from ucp.formats.shared.apart import states_apart
from ucp.formats.shared.renaming import best_names
from ucp.formats.shared.torch_files import FileBuilder
from ucp.parallel.mesh import Layout
from ucp.printable import logger
from ucp.spec.select import Choice
from ucp.transfer.targets import TargetFile

# Nothing is cut but by ZeRO and into stages.
NO_SPEC = Choice()

log = logger(__name__)


def plan(
    source: Catalog, layout: Layout, ds_config: Mapping[str, Any] | None = None, choice: Choice = NO_SPEC
) -> list[TargetFile]:
    """The files of a checkpoint that an engine of this layout loads; names are relative to the tag's folder.

    ds_config: the target engine's config; it gives what the layout does not determine (element type, sub_group_size,
    gradient clipping, round_robin_gradients, parameter_alignment, accumulation type, the optimizer's kind). Default:
    the config that the source recorded.

    Raises BadArgument for a config that is missing or contradicts the layout, Unsupported for what such a checkpoint
    cannot hold (each names the parameters or keys), Mismatch where a master weight would lose bits.
    """
    catalog = tp_slices.without_padding(source)
    state = catalog.training_state
    check_groups(catalog)
    _check_apart(catalog, layout)
    config = engine_config(ds_config, state.config, layout.zero, layout.tp, state.clip_grad)
    if state.clip_grad is not None and state.clip_grad != config.clip_grad:
        log.warning(
            "gradient clipping was %s in the source and is %s in the target's config; the checkpoint gets the latter",
            state.clip_grad,
            config.clip_grad,
        )
    config = replace(config, raw=experts.with_ep(config.raw, layout, ds_config is not None))
    spread = experts.spread(catalog, layout, config.raw)
    if spread is not None:
        _check_experts(catalog, layout, spread)
    if spread is not None and layout.tp > 1:
        return _folded(source, config, layout, spread, choice)
    stages = pipeline.stages(config.raw, layout)
    if stages is not None and layout.zero == 0 and config.dtype == "bfloat16":
        raise Unsupported(
            f"layout '{layout}': DeepSpeed {VERSION} loads no checkpoint of a bf16 pipeline at ZeRO stage 0, its own "
            "included (it takes one rank's state for a list of all); choose zero=1"
        )
    if spread is not None:
        return _with_experts(catalog, config, layout, spread, stages)
    files: list[TargetFile] = []
    bound = tp_slices.spec_of(choice, layout, config)
    cuts = None
    if bound is not None and layout.tp > 1 and stages is None:  # a pipeline's layer files don't tell what is a buffer
        cuts = affine_info.said(source, bound, layout, config.autotp)
    for rank in range(layout.tp):
        own = (
            catalog if bound is None or layout.tp == 1 else tp_slices.sliced(source, bound, layout, rank, config.autotp)
        )
        if cuts is not None and not affine_info.covers(cuts, own):
            cuts = None  # a reader needs the spec
        if stages is None:
            files += _share_files(ModelRank(rank, own, cuts=cuts), config, layout)
            continue
        if bound is not None:
            own = best_names(own, bound, pipeline.is_name)
        pipeline.check_names(own, stages)
        suffix = "" if layout.tp == 1 else f"-model_{rank:02d}"
        files += pipeline.layer_files(own, stages, lambda file, info: weight(file, config, info), suffix)
        for stage in range(layout.pp):
            share = pipeline.share(own, stages, stage)
            files += _share_files(ModelRank(stage * layout.tp + rank, share, in_layers=True), config, layout)
    return files


def _check_experts(catalog: Catalog, layout: Layout, spread: Spread) -> None:
    """Raise Unsupported for experts of another order, or beside tensor parallelism, that are not written."""
    experts.check_order(catalog, spread)
    if layout.tp > 1 and not spread.auto:
        raise Unsupported(
            f"layout '{layout}': DeepSpeed's own layers of experts under tensor parallelism are not written; use --to "
            "universal, which the ucp plugin loads there"
        )
    if layout.tp > 1 and not layout.zero:
        raise Unsupported(
            f"layout '{layout}': AutoEP's experts at ZeRO stage 0 under tensor parallelism are not written; use --to "
            "universal, which the ucp plugin loads there, or zero=1, 2 or 3"
        )


def _check_apart(catalog: Catalog, layout: Layout) -> None:
    """Raise Unsupported for states of other shapes than their parameter's where the layout cuts parameters."""
    for name, (owner, state) in states_apart(catalog.parameters, catalog.parameters).items():
        if layout.zero or layout.pp * layout.ep > 1:
            raise Unsupported(
                f"optimizer state '{state}' of '{owner}' has shape {list(catalog.parameters[name].shape)}, and layout "
                f"'{layout}' cuts parameters and their states, which it cannot follow; choose zero=0 without pipeline "
                "or expert parallelism"
            )


def _share_files(share: ModelRank, config: EngineConfig, layout: Layout) -> list[TargetFile]:
    if layout.zero == 0:
        return [stage0_file(share, config, layout)]
    cut = flats(share.catalog, config, range(layout.dp))
    return model_files(share, config, layout, cut) + [
        optimizer_file(share, config, layout, rank, cut) for rank in range(layout.dp)
    ]


def _with_experts(
    catalog: Catalog, config: EngineConfig, layout: Layout, spread: Spread, stages: Stages | None
) -> list[TargetFile]:
    """A model with experts, or a pipeline's stages: those without experts have layer files, and others none."""
    if stages is None:
        return _spread_files(catalog, config, layout, spread, 0)
    pipeline.check_names(catalog, stages)
    out = []
    for stage in range(layout.pp):
        share = pipeline.share(catalog, stages, stage)
        own = experts.of_stage(share, spread, stage)
        if own is None:
            out += pipeline.layer_files(share, stages, lambda file, info: weight(file, config, info), stage=stage)
            out += _share_files(ModelRank(stage, share, in_layers=True), config, layout)
            continue
        out += _spread_files(experts.in_stage(share, own, catalog), config, layout, own, stage)
    return out


def _spread_files(
    catalog: Catalog, config: EngineConfig, layout: Layout, spread: Spread, number: int
) -> list[TargetFile]:
    """The experts' own files, and the rest from the view of each expert-parallel rank. number: in the files' names."""
    out = experts.files(catalog, spread, lambda file, info: weight(file, config, info), number)
    for rank in range(layout.ep):
        share = ModelRank(number, experts.of_rank(catalog, spread, rank), spread=spread, rank=rank)
        if layout.zero == 0:
            out += [stage0_file(share, config, layout)] if rank == 0 else []
            file = FileBuilder(f"expp_rank_{rank}_mp_rank_{number:02d}_optim_states.pt", share.catalog)
            out.append(file.finish({"optimizer": stage0_optimizer(file, config)}))
            continue
        mine = spread.data_ranks(rank)
        cut = flats(share.catalog, config, range(layout.dp), mine)
        with_model = mine if layout.zero == 3 else [r for r in mine if r == 0]
        out += [model_file(share, config, layout, data_rank, cut) for data_rank in with_model]
        out += [optimizer_file(share, config, layout, data_rank, cut) for data_rank in mine]
    return out


def _folded(source: Catalog, config: EngineConfig, layout: Layout, spread: Spread, choice: Choice) -> list[TargetFile]:
    """A model whose experts are spread over all ranks of tensor and data parallelism."""
    out = experts.files(tp_slices.without_padding(source), spread, lambda file, info: weight(file, config, info))
    bound = tp_slices.spec_of(choice, layout, config)
    if bound is None:
        return out
    cuts = affine_info.said(source, bound, layout, config.autotp, spread.layer_of)
    slices = [tp_slices.sliced(source, bound, layout, n, config.autotp, spread.layer_of) for n in range(layout.tp)]
    for rank in range(layout.dp * layout.tp):
        number, expert_rank = rank % layout.tp, rank % layout.ep
        own = experts.of_rank(slices[number], spread, expert_rank)
        share = ModelRank(number, own, spread=spread, rank=expert_rank, cuts=cuts)
        alike = range(number, layout.dp * layout.tp, layout.tp)
        cut = flats(own, config, alike, spread.data_ranks(expert_rank))
        if layout.zero == 3 or rank < layout.tp:
            out.append(model_file(share, config, layout, rank, cut))
        out.append(optimizer_file(share, config, layout, rank, cut))
    return out
