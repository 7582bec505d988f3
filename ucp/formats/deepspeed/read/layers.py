"""The layer files of a pipeline: what a PipelineModule's model files have in place of a state dict.

``runtime/pipe/module.py: save_state_dict`` writes the state dict of every layer, under its index in the whole model,
and for each tensor-parallel rank. Its keys are the layer's own. In the module, a plain layer's are ``{index}.{key}``,
and a tied layer's are ``tied_modules.{tie}.{key}``. No layer file says which layers are tied. That follows from the
names that the stages' model files give to buffers and to what they train. A tied layer that is used through a function
has no file, and its weights are in the file of another layer of the same tie.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.deepspeed.read import unnamed_pipeline
from ucp.formats.deepspeed.read.folder import Folder, load
from ucp.formats.deepspeed.read.model_files import ModelFile
from ucp.formats.deepspeed.read.names import LAYER
from ucp.formats.deepspeed.read.replicated import is_declared
from ucp.geometry import Shape
from ucp.storage import locations
from ucp.storage.torch_pt.values import TensorRef

_TIED = unnamed_pipeline.TIED


def layer_files(path: Path, without: Collection[int] = ()) -> dict[int, dict[int, Path]]:
    """The layer files of a folder: tensor-parallel rank -> layer -> file; {} if it is not of a pipeline.

    without: layers that are ignored.

    Raises DamagedCheckpoint if tensor-parallel ranks do not have files of the same layers.
    """
    out: dict[int, dict[int, Path]] = {}
    for name in locations.names(path):
        if (found := LAYER.match(name)) and int(found["layer"]) not in without:
            out.setdefault(int(found["tp"] or 0), {})[int(found["layer"])] = path / name
    every = {layer for files in out.values() for layer in files}
    for rank in range(max(out, default=-1) + 1):  # as far as a rank that lacks files, however high the numbers are
        lost = sorted(every - set(out.get(rank, ())))
        if lost:
            raise DamagedCheckpoint(
                f"{path}: layer {lost[0]} has no file of tensor-parallel rank {rank} "
                f"('layer_{lost[0]:02d}-model_{rank:02d}-model_states.pt'); the checkpoint is incomplete"
            )
    return out


def tensor_parallel_ranks(path: Path) -> int:
    """How many tensor-parallel ranks the layer files of a folder name; 1 if they name none."""
    found = (LAYER.match(name) for name in locations.names(path))
    return max((int(layer["tp"] or 0) for layer in found if layer), default=0) + 1


def with_modules(
    path: Path,
    found: Sequence[Folder],
    models: Mapping[int, Mapping[int, ModelFile]],
    param_names: Sequence[Sequence[str]] | None,
    without: Collection[int] = (),
) -> Mapping[int, Mapping[int, ModelFile]]:
    """The model files, by model-parallel and data-parallel rank, with a pipeline's state dicts from its layer files.

    Every stage gets what it trains and its buffers. The first stage also gets what no stage names (frozen parameters).
    Other checkpoints come back as they are, and so do stages with experts, whose model files are whole.

    param_names: as for `ucp.formats.deepspeed.read`.
    without: layers whose files are ignored.

    Raises DamagedCheckpoint for missing files, Unsupported if nothing tells which layers are tied.
    """
    whole = {mp: files for mp, files in models.items() if files[0].raw.get("module", {}) is not None}
    if len(whole) == len(models):
        return models
    layers = layer_files(path, without)
    if not layers:
        raise DamagedCheckpoint(f"{path}: has a pipeline's model files, but no layer files ('layer_*-model_states.pt')")
    count = len(layers)
    if len(models) % count:
        raise DamagedCheckpoint(
            f"{path}: has layer files of {count} tensor-parallel ranks, but model files of {len(models)} ranks, which "
            "is no multiple; files are missing or of two runs"
        )
    if whole and count > 1:
        raise Unsupported(f"{path}: has experts in a pipeline with tensor parallelism, which is not supported")
    out: dict[int, Mapping[int, ModelFile]] = dict(whole)
    for rank, files in layers.items():
        own = [folder for folder in found if folder.mp % count == rank and folder.mp not in whole]
        stages = [_Stage.of(folder, models[folder.mp][0]) for folder in own]
        for stage, completed in _completed(path, files, stages, param_names):
            out[stage.mp] = {0: replace(stage.model, raw={**stage.model.raw, **completed})}
    return {mp: out[mp] for mp in models}


@dataclass(frozen=True)
class _Stage:
    """One stage of a tensor-parallel rank.

    names: of what it trains, with shapes if they are known, and of buffers, without shapes.
    trained: the names in each param group, if the model file does not have them.
    unnamed: no file has the names.
    """

    mp: int
    model: ModelFile
    names: Mapping[str, Shape | None]
    trained: Sequence[Sequence[str]] | None = None
    unnamed: bool = False

    @classmethod
    def of(cls, folder: Folder, model: ModelFile) -> _Stage:
        names: dict[str, Shape | None] = {str(name): None for name in model.raw.get("buffer_names") or ()}
        if model.raw.get("param_shapes") is not None:
            names.update((name, shape) for group in model.param_shapes for name, shape in group.items())
        elif folder.optim:
            groups = _sliced(folder)
            names.update((name, None) for group in groups for name in group)
            return cls(folder.mp, model, names, groups)
        elif model.raw.get("optimizer") is not None:
            return cls(folder.mp, model, names, unnamed=True)
        return cls(folder.mp, model, names)


def _sliced(folder: Folder) -> list[list[str]]:
    """The parameters of each param group in the order of its flat buffer, by the optimizer files' slices. This is for
    pipelines in bf16 without ZeRO, whose BF16_Optimizer cuts states as stage 1 does."""
    groups: dict[int, dict[str, None]] = {}
    for rank in sorted(folder.optim):
        found = load(folder.optim[rank], trust=None).get("optimizer_state_dict")
        slices = found.get("param_slice_mappings") if isinstance(found, Mapping) else None
        if not isinstance(slices, Sequence):
            raise DamagedCheckpoint(f"{folder.optim[rank]}: 'param_slice_mappings' is missing; this is no whole file")
        for g, places in enumerate(slices):
            groups.setdefault(g, {}).update(dict.fromkeys(map(str, places)))
    return [list(groups[g]) for g in sorted(groups)]


def _shape(model: ModelFile, name: str, every: Mapping[str, TensorRef]) -> Shape:
    if name not in every:
        raise Unsupported(
            f"{model.path}: nothing tells the shape of '{name}': no layer file holds it, as its tied layers are used "
            'through functions only; save it at stage 1, or with "ucp": {"save": {"format": "universal"}}'
        )
    return every[name].shape


def _completed(
    path: Path, files: Mapping[int, Path], stages: Sequence[_Stage], param_names: Sequence[Sequence[str]] | None
) -> Iterator[tuple[_Stage, dict[str, Any]]]:
    """Each of these stages with what its model file lacks, from the layer files of their tensor-parallel rank."""
    known = {name: shape for stage in stages for name, shape in stage.names.items()}
    if any(stage.unnamed for stage in stages):
        guessed = known | {name: None for group in param_names or () for name in group}
        layers = [_layer(layer, file, guessed) for layer, file in files.items()]
        stages = _with_split(path, layers, stages, param_names)
        known = {name: None for stage in stages for name in stage.names}
    else:
        layers = [_layer(layer, file, known) for layer, file in files.items()]
    # A tied layer may have two files; the first one counts, as it does for its optimizer states.
    every = {name: ref for layer in reversed(layers) for name, ref in layer.items()}
    lost = sorted(name for name in known.keys() - every.keys() if not name.startswith(_TIED))
    if lost:
        raise DamagedCheckpoint(
            f"{path}: no layer file holds '{lost[0]}', which a model file names; the layer files of layer "
            f"{lost[0].partition('.')[0]} are missing or of another run"
        )
    earlier: set[str] = set()
    for stage in stages:
        rest = [name for name in every if name not in known] if stage is stages[0] else []
        info = stage.model.raw.get("universal_checkpoint_info")
        # The file of a tied layer has the first stage's copy.
        again = {name for name in stage.names if name in earlier and is_declared(info, name)}
        earlier.update(stage.names)
        held = [name for name in (*stage.names, *rest) if name in every and name not in again]
        completed: dict[str, Any] = {"module": {name: every[name] for name in held}}
        if stage.trained is not None:
            completed["param_shapes"] = [{n: _shape(stage.model, n, every) for n in group} for group in stage.trained]
        yield stage, completed


def _with_split(
    path: Path,
    layers: Sequence[Mapping[str, TensorRef]],
    stages: Sequence[_Stage],
    param_names: Sequence[Sequence[str]] | None,
) -> list[_Stage]:
    """The stages with the names of what they train, if no file has them."""
    if not any(name in layer for group in param_names or () for name in group for layer in layers):
        param_names = None  # another model's names
    split = unnamed_pipeline.split(path, [stage.model for stage in stages], layers, param_names)
    out = []
    for stage, trained in zip(stages, split, strict=True):
        raw = {**stage.model.raw, "optimizer": unnamed_pipeline.with_names(stage.model, trained, param_names)}
        names = {**dict.fromkeys(trained), **stage.names}
        out.append(replace(stage, model=replace(stage.model, raw=raw), names=names))
    return out


def _layer(layer: int, file: Path, known: Mapping[str, Shape | None]) -> dict[str, TensorRef]:
    """A layer file's tensors by their names in the module."""
    entries = load(file, trust=None)
    for key, value in entries.items():
        if not isinstance(value, TensorRef):
            raise Unsupported(f"{file}: the layer's '{key}' is a {type(value).__name__}, not a tensor")
    prefix = str(layer)
    if not any(f"{layer}.{key}" in known for key in entries):
        ties = {tie: keys for tie, keys in _ties(known).items() if _may_be(keys, entries)}
        if len(ties) > 1:
            if all(entries.keys() == keys.keys() and None not in keys.values() for keys in ties.values()):
                return {}  # all that it has is in the optimizer's files, by name
            raise Unsupported(
                f"{file}: layer {layer} may be any of the tied modules {', '.join(map(repr, ties))}, which look alike; "
                'save with "ucp": {"save": {"format": "universal"}}, which has every tensor under its own name'
            )
        prefix = "".join(f"{_TIED}{tie}" for tie in ties) or prefix
    return {f"{prefix}.{key}": ref for key, ref in entries.items()}


def _ties(known: Mapping[str, Shape | None]) -> dict[str, dict[str, Shape | None]]:
    """What is known of each tied module."""
    out: dict[str, dict[str, Shape | None]] = {}
    for name, shape in known.items():
        if name.startswith(_TIED):
            tie, _, key = name[len(_TIED) :].partition(".")
            out.setdefault(tie, {})[key] = shape
    return out


def _may_be(keys: Mapping[str, Shape | None], entries: Mapping[str, TensorRef]) -> bool:
    """Whether a layer file has what is known of a tied module."""
    return all(key in entries and shape in (None, entries[key].shape) for key, shape in keys.items())
