"""Reading a DeepSpeed checkpoint: the parts of all its model-parallel ranks, put together."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog, SourceFile, TrainingState
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.deepspeed import NAME
from ucp.formats.deepspeed.experts import CAPTURES
from ucp.formats.deepspeed.read import same_save, stems
from ucp.formats.deepspeed.read.assemble import assemble
from ucp.formats.deepspeed.read.averages import take_averages
from ucp.formats.deepspeed.read.experts import ExpertFiles, find_experts
from ucp.formats.deepspeed.read.folder import Folder, scan
from ucp.formats.deepspeed.read.layers import tensor_parallel_ranks, with_modules
from ucp.formats.deepspeed.read.model_files import ModelFile
from ucp.formats.deepspeed.read.mp_rank import LocalModel, of_all_ranks, open_models, read_part
from ucp.formats.deepspeed.read.optimizer_files import same_on_all_ranks
from ucp.formats.deepspeed.read.replicated import cuts_said, first_copies, is_autotp
from ucp.formats.deepspeed.read.scaled import undo_scales
from ucp.formats.deepspeed.writers import pipeline_gradients
from ucp.formats.nouns import ModelFacts
from ucp.formats.shared.apart import states_apart
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.copies import check_copies
from ucp.formats.shared.gradients import entry, micro_steps_of, of_pipeline
from ucp.formats.shared.malformed import malformed
from ucp.formats.shared.two_saves import far_apart
from ucp.geometry import Shape, whole
from ucp.parallel.mesh import Coordinate, Layout
from ucp.printable import logger
from ucp.spec.places import Placed, Placements
from ucp.spec.resolve import find_placements
from ucp.spec.select import Choice
from ucp.storage import configs
from ucp.storage.crc32 import StoredCrc32, in_order
from ucp.storage.files import Files

log = logger(__name__)

_DRIFTED = (
    "by the spec or the checkpoint ranks hold it in common, and their copies have drifted apart or it is cut otherwise"
)

_OF_OWN_PART = (
    "each tensor-parallel rank keeps this state of its own part of the parameter, and they differ; a spec may say to "
    'average them, {{axes: "...", states: {{{}: "average(..., tp)"}}}}, which is inexact'
)

# No spec is given, so the checkpoint itself is asked.
ASK = Choice()


def read(
    path: Path,
    files: Files,
    *,
    choice: Choice = ASK,
    trust_client_state: bool = False,
    skip_unknown_objects: bool = False,
    param_names: Sequence[Sequence[str]] | None = None,
    compare: bool = True,
) -> Catalog:
    """The catalog of one tag's folder.

    choice: the spec of how tensor parallelism cuts the model, if the checkpoint itself does not say it.
    trust_client_state: unpickle classes outside the allow-list for real, which runs their code.
    skip_unknown_objects: leave objects of such classes out instead, but for the tensors and plain data in them.
    param_names: each param group's parameters in the optimizer's order, if the caller knows them. Needed only for
    stage-0 checkpoints that leave the names open.
    compare: compare a few elements of copies that several ranks hold, and refuse them if they differ.

    Raises DamagedCheckpoint for missing, truncated or contradicting files, Unsupported (by name) for what cannot be
    read exactly, UnsafePickle for a pickle that asks for anything outside the allow-list, SpecError and Mismatch if the
    spec does not fit.
    """
    with stems.noting() as unchecked, malformed(path, "what its files hold"):
        found = scan(path, skip_unknown_objects)
        opened = {folder.mp: open_models(folder, trust_client_state, skip_unknown_objects) for folder in found}
        catalog = read_stages(path, files, found, opened, choice, param_names, compare)
    sentences = unchecked.sentences()
    if apart := far_apart(catalog.on_disk):
        sentences = (*sentences, apart)
    for sentence in sentences:
        log.warning("%s: %s", path, sentence)
    return replace(catalog, unchecked=sentences)


def read_stages(
    path: Path,
    files: Files,
    found: Sequence[Folder],
    opened: Mapping[int, Mapping[int, ModelFile]],
    choice: Choice,
    param_names: Sequence[Sequence[str]] | None,
    compare: bool,
    without: Collection[int] = (),
) -> Catalog:
    """Like `read`, for these model-parallel ranks, but without reporting what could not be checked.

    opened: the ranks' model files.
    without: layers of a pipeline whose files are ignored. The stages that had them are not among ``found``, and the
    other stages make a pipeline of their own.
    """
    models = with_modules(path, found, opened, param_names, without)
    first = models[found[0].mp][0]
    tp, pp = degrees(opened[found[0].mp][0])
    order = sorted({folder.mp // tp for folder in found})
    pp = len(order) if without else pp
    _check_count(first, tp, pp, len(found))
    paths: dict[str, int] = {}
    sources: list[SourceFile] = []
    records: dict[int, dict[int, StoredCrc32]] = {}
    parts: dict[Coordinate, LocalModel] = {}
    for folder in found:
        stage, slice_ = order.index(folder.mp // tp), folder.mp % tp
        experts = _experts(found, models, folder, tp)
        for rank, held in experts.parts(folder, models[folder.mp]).items():
            builder = Builder(files, paths, sources, records)
            parts[Coordinate(slice_, stage, rank)] = read_part(
                folder, held, builder, param_names, experts.of_rank(rank)
            )
    parts = first_copies(parts)
    _refuse_apart(parts)
    zero = _same_stage(parts)
    ep = max(part.ep for part in parts.values())
    layout = Layout(dp=parts[Coordinate()].dp, tp=tp, pp=pp, ep=ep, zero=zero)
    placements = _placement(first, parts, layout, choice)
    parameters, tensors, copies, state = assemble(parts, placements)
    catalog = Catalog(
        format=NAME,
        writer=f"deepspeed {first.raw.get('ds_version', 'of unknown version')}",
        layout=layout,
        files=tuple(sources),
        parameters=parameters,
        tensors=tensors,
        training_state=_with_gradients(state, opened[found[0].mp][0], layout),
        crc_records=in_order(records),
        copies=copies,
    )
    catalog = take_averages(catalog, parts, placements, files)
    catalog.check()
    if compare:
        own = {name: _OF_OWN_PART.format(state) for name, (_, state) in states_apart(parameters, parameters).items()}
        check_copies(catalog, files, _DRIFTED, own)
    return undo_scales(catalog, placements, files)


def _same_stage(parts: Mapping[Coordinate, LocalModel]) -> int:
    """The ZeRO stage of all parts. Raises DamagedCheckpoint where they are not of one save."""
    same = {part.model.path: part for part in parts.values()}
    for key in ("global_steps", "global_samples", "dp_world_size", "mp_world_size"):
        same_on_all_ranks(f"'{key}'", {p: part.model.raw.get(key) for p, part in same.items()})
    same_save.check_writers({p: part.model.raw for p, part in same.items()})
    return same_on_all_ranks("the ZeRO stage", {p: part.zero for p, part in same.items()})


def _with_gradients(state: TrainingState, model: ModelFile, layout: Layout) -> TrainingState:
    """With what the moments are of, as the release that wrote this model file trains. Only a pipeline's has no
    module."""
    if model.raw.get("module", {}) is not None:
        return state
    how, steps = pipeline_gradients(model.raw.get("ds_version")), micro_steps_of(model.config, layout.dp)
    return replace(state, extra={**state.extra, **entry(of_pipeline(how, steps, layout.pp))})


def _experts(
    found: Sequence[Folder], models: Mapping[int, Mapping[int, ModelFile]], folder: Folder, tp: int
) -> ExpertFiles:
    """The experts that are read with a model-parallel rank's files."""
    beside = [one for one in found if one.mp // tp == folder.mp // tp]
    slice_ = folder.mp % tp
    experts = find_experts(beside, models[folder.mp][0], slice_)
    if tp > 1 and (experts.experts.stacks or experts.experts.held) and not slice_ and folder.optim:
        return replace(experts, optim=of_all_ranks(beside, models))
    return experts


def _refuse_apart(parts: Mapping[Coordinate, LocalModel]) -> None:
    """Raise Unsupported for a model of experts with states of other shapes than their parameter's. What part of the
    whole such a state is, or whether parts differ in it, shapes do not tell."""
    for part in parts.values() if any(part.ep > 1 for part in parts.values()) else ():
        for name, (owner, state) in states_apart(part.parameters, part.parameters).items():
            raise Unsupported(
                f"{part.model.path}: optimizer state '{state}' of '{owner}' has shape "
                f"{list(part.parameters[name].shape)}, neither the parameter's shape nor a single value; checkpoints "
                "of this optimizer cannot be resharded where expert parallelism cuts the model"
            )


def _check_count(model: ModelFile, tp: int, pp: int, count: int) -> None:
    if tp * pp != count:
        raise DamagedCheckpoint(
            f"{model.path}: was saved by {tp * pp} model-parallel ranks (tp={tp}, pp={pp}), but there are files of "
            f"{count}; files are missing or of two runs"
        )


def degrees(model: ModelFile) -> tuple[int, int]:
    """Tensor and pipeline ranks, of a model file as it was read. Files number model-parallel ranks stage by stage
    (``runtime/pipe/topology.py``).

    ``tp_degree`` is not used: under sequence parallelism it is the number of sequence-parallel ranks. Releases before
    0.19 do not write the degrees; there a pipeline's layer files tell how many tensor-parallel ranks there were.
    """
    said = model.raw.get("checkpoint_parallel_dimensions") or {}
    world = int(model.raw.get("mp_world_size") or 1)
    if "pp_degree" not in said and model.raw.get("module", {}) is None:
        tp = tensor_parallel_ranks(model.path.parent)
        return tp, max(world // tp, 1)
    pp = int(said.get("pp_degree") or 1)
    return max(world // pp, 1), pp


def model_facts(path: Path) -> ModelFacts:
    """What a checkpoint's folder says of its model."""
    folder = scan(path)[0]
    with malformed(path, "what its files hold"):
        first = open_models(folder, False)[0]
    return ModelFacts(first.raw.get("universal_checkpoint_info"), recorded_config(first), CAPTURES)


def _placement(model: ModelFile, parts: dict[Coordinate, LocalModel], layout: Layout, choice: Choice) -> Placements:
    shapes = {at: {name: info.shape for name, info in part.parameters.items()} for at, part in parts.items()}
    experts = {}
    if layout.tp > 1 and not choice.apart:  # which does not cut experts
        experts = {
            (at, n): shape for at, held in shapes.items() for n, shape in held.items() if parts[at].experts.has(n)
        }
        shapes = {at: {n: s for n, s in held.items() if (at, n) not in experts} for at, held in shapes.items()}
    stacks = {} if choice.apart else _stacks_of_ranks(parts, shapes)
    shapes = {at: {n: s for n, s in held.items() if (at, n) not in stacks} for at, held in shapes.items()}
    buffers = {n for part in parts.values() for n, info in part.parameters.items() if info.kind == "buffer"}
    factors = {n: of for part in parts.values() for n, of in states_apart(part.parameters, part.parameters).items()}
    info = cuts_said(model.raw.get("universal_checkpoint_info"), model.config)
    said = isinstance(info, Mapping) and "affine_map" in info
    section = "autotp" if said or is_autotp(model.config) else "megatron"
    found = find_placements(
        choice, info, lambda: recorded_config(model), shapes, layout, buffers, section, CAPTURES, factors
    )
    if found is None:
        raise _unknown_cuts(model, shapes)
    found = {**found, **stacks}
    return {**found, **{(at, name): (Placed(name, shape, whole(shape)),) for (at, name), shape in experts.items()}}


def _stacks_of_ranks(
    parts: Mapping[Coordinate, LocalModel], shapes: Mapping[Coordinate, Mapping[str, Shape]]
) -> dict[tuple[Coordinate, str], tuple[Placed, ...]]:
    """Where each expert-parallel rank's stacks lie in the model's. At stage 0 they are parts of their own."""
    return {
        (at, name): (part.experts.place(name, shapes[at][name], at.ep),)
        for at, part in parts.items()
        if part.of_expert_rank
        for name in part.experts.stacks
        if name in shapes[at]
    }


def recorded_config(model: ModelFile) -> Mapping[str, Any] | None:
    """The model's config if the checkpoint has one: Megatron's ``args``, or a config.json beside it.

    Raises DamagedCheckpoint for a config.json that can't be read.
    """
    args = model.raw.get("args")
    if isinstance(args, argparse.Namespace):
        return vars(args)
    if isinstance(args, Mapping):
        return args
    return configs.of_model(model.path.parent, model.path.parent.parent)


def _unknown_cuts(model: ModelFile, shapes: Mapping[Coordinate, Mapping[str, Shape]]) -> Unsupported:
    names = list(shapes[Coordinate()])
    shown = ", ".join(f"'{n}'" for n in names[:3]) + (", ..." if len(names) > 3 else "")
    return Unsupported(
        f"{model.path.parent}: was saved by tensor-parallel ranks, and nothing says how they cut its {len(names)} "
        f"parameters ({shown}); give a spec (spec=, --spec), or write a draft with 'ucp-spec infer {model.path.parent}'"
    )
