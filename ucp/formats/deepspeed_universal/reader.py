"""Reading DeepSpeed's universal folder: parameters from their folders, all else from its model files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog, LogicalTensor, ParamGroup
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.deepspeed.read.model_files import ModelFile, tied_by_storage
from ucp.formats.deepspeed.read.mp_rank import training_state
from ucp.formats.deepspeed.read.names import MODEL
from ucp.formats.deepspeed.read.optimizer_files import options_of
from ucp.formats.deepspeed_universal import COMMON, FOLDER, NAME
from ucp.formats.shared.builder import Builder, Scalar
from ucp.formats.shared.two_saves import far_apart, uneven_steps
from ucp.formats.shared.unknown_objects import REFUSED, UnknownObjects, load_file
from ucp.geometry import Shape, numel, row_major
from ucp.parallel.mesh import Layout
from ucp.printable import logger
from ucp.storage import graphs, locations
from ucp.storage.crc32 import in_order
from ucp.storage.files import Files
from ucp.storage.torch_pt import reader
from ucp.storage.torch_pt.values import TensorRef

log = logger(__name__)

WEIGHT, STEP = "fp32", "step"
# What a parameter's file says of how its parts were put together; the tensor is whole in any case.
_KEYS = {"param", "cat_dim", "vocab_tensor", "param_n_sub_params", "sub_param_shape"}


@dataclass
class _Model:
    """What the model files say together.

    groups: the parameters of each param group, or at stage 3 of each subgroup, with their shapes in the first file that
    has them.
    whole: whether these shapes are those of the whole parameters.
    """

    files: list[ModelFile]
    groups: list[dict[str, Shape]]
    whole: bool
    rest: dict[str, tuple[str, TensorRef]] = field(default_factory=dict)


def read(path: Path, files: Files, unknown: UnknownObjects = REFUSED) -> Catalog:
    """The folder's catalog. unknown: what becomes of objects of unknown classes in the model files.

    Raises DamagedCheckpoint where files are missing or contradict each other, Unsupported, UnsafePickle.
    """
    folder = locations.locate(path)
    model = _models(folder, unknown)
    common = _load(folder / FOLDER / COMMON)
    builder = Builder(files)
    shared = {**tied_by_storage(model.files[0].module), **model.files[0].shared}
    trained = {name: shape for group in model.groups for name, shape in group.items()}
    aliases: dict[str, list[str]] = {}
    for alias, owner in shared.items():
        alias, owner = (owner, alias) if alias in trained else (alias, owner)
        aliases.setdefault(owner, []).append(alias)
    steps = _common_steps(common, len(model.groups), builder)
    for index, group in enumerate(model.groups):
        held: dict[str, set[str]] = {}
        for name, shape in group.items():
            tensors, scalars = _parameter(folder, name, shape if model.whole else None, builder)
            held[name] = {tensor.state for tensor in tensors} | scalars.keys()
            if STEP not in scalars and index in steps:
                scalars[STEP] = steps[index]
            builder.add(name, "parameter", tensors, scalars, aliases.get(name, ()))
        _check_states(folder, held)
    for name, (kind, ref) in model.rest.items():
        if name not in builder.parameters and name not in {a for owned in aliases.values() for a in owned}:
            builder.add(name, kind, [builder.whole(name, "param", ref)], None, aliases.get(name, ()))
    first = model.files[0]
    groups = _groups(folder, model, common)
    dp = first.integer("dp_world_size") or 1
    catalog = Catalog(
        format=NAME,
        writer=f"deepspeed {first.raw.get('ds_version', 'of unknown version')}",
        layout=Layout(dp=dp),
        files=tuple(builder.sources),
        parameters=builder.parameters,
        tensors=builder.tensors,
        training_state=training_state(first, groups, common, dp),
        crc_records=in_order(builder.records),
    )
    catalog.check()
    notes = tuple(text for text in (far_apart(catalog.on_disk), uneven_steps(catalog)) if text is not None)
    for note in notes:
        log.warning("%s: %s", folder, note)
    return replace(catalog, unchecked=notes)


def _check_states(folder: Path, held: Mapping[str, Collection[str]]) -> None:
    """Raise DamagedCheckpoint where a parameter lacks a state that another of its param group has: an optimizer has the
    same for all of a group."""
    owner = {state: name for name, states in held.items() for state in states}
    for name, states in held.items():
        missing = sorted(owner.keys() - states)
        if missing:
            raise DamagedCheckpoint(
                f"{folder / FOLDER / name}: has no '{missing[0]}.pt', which '{owner[missing[0]]}' of the same "
                "param group has; a part is missing"
            )


def _load(path: Path, unknown: UnknownObjects | None = None) -> Mapping[str, Any]:
    found = reader.load(path, trust=None) if unknown is None else load_file(path, unknown).graph
    graphs.check(str(path), found)
    if not isinstance(found, Mapping):
        raise DamagedCheckpoint(f"{path}: holds a {type(found).__name__}, not what DeepSpeed writes there")
    return found


def _models(folder: Path, unknown: UnknownObjects) -> _Model:
    """The whole model's files if there are any, else rank 0's files of stage 3."""
    names = [name for name in locations.names(folder) if MODEL.fullmatch(name)]
    whole = sorted(name for name in names if name.startswith("mp_rank_"))
    chosen = whole or sorted(name for name in names if name.startswith("zero_pp_rank_0_"))
    if not chosen:
        raise DamagedCheckpoint(
            f"{folder}: has no model file 'mp_rank_00_model_states.pt', by which parameters are grouped"
        )
    files = [ModelFile(folder / name, _load(folder / name, unknown)) for name in chosen]
    groups: list[dict[str, Shape]] = [{} for _ in files[0].param_shapes]
    for file in files:
        if len(file.param_shapes) != len(groups):
            raise DamagedCheckpoint(f"{file.path}: has another number of param groups than '{files[0].path.name}'")
        for group, own in zip(groups, file.param_shapes, strict=True):
            for name, shape in own.items():
                group.setdefault(name, shape)
    tp = max((f.integer("mp_world_size") or 1) for f in files) > 1 or len(files) > 1
    out = _Model(files, groups, whole=not tp)
    for file in files:
        _add_rest(file, out, partial=tp)
    return out


def _add_rest(file: ModelFile, into: _Model, partial: bool) -> None:
    """Buffers and frozen parameters, which have no folders of their own (or ones that are rounded to fp32)."""
    trained = {name for group in into.groups for name in group}
    frozen, fragments = file.frozen_shapes, file.raw.get("frozen_param_fragments") or {}
    for name, ref in file.module.items():
        if name in trained or name in into.rest or name in file.shared:
            continue
        if name in file.buffers:
            into.rest[name] = ("buffer", ref)
        elif name in frozen or not partial:
            into.rest[name] = ("frozen", _frozen(file.path, ref, fragments.get(name), frozen.get(name, ref.shape)))
    for name, shape in frozen.items():
        held = into.rest.get(name)
        if partial or held is None or held[1].shape != shape:
            raise Unsupported(
                f"{file.path}: the frozen parameter '{name}' is not whole in it, and DeepSpeed's universal folder "
                "keeps frozen ones nowhere else; convert the native checkpoint itself"
            )


def _frozen(path: Path, ref: TensorRef, fragment: Any, shape: Shape) -> TensorRef:
    """A frozen weight: the module's, or at stage 3 the rank's fragment if that is all of it."""
    if ref.shape != shape and isinstance(fragment, TensorRef) and fragment.numel == numel(shape):
        return _shaped(path, fragment, shape)
    return ref


def _parameter(
    folder: Path, name: str, shape: Shape | None, builder: Builder
) -> tuple[list[LogicalTensor], dict[str, Scalar]]:
    """All states of one parameter. shape: the shape that it must have; None if only its own file says that."""
    place = folder / FOLDER / name
    if "\0" in name or name in (".", "..") or "/" in name:
        raise DamagedCheckpoint(f"{folder}: a parameter is called {name!r}, which no folder can be")
    try:
        found = locations.names(place)
    except OSError as error:
        raise DamagedCheckpoint(
            f"{place}: cannot be listed ({error.strerror or error}); a parameter is missing"
        ) from error
    if f"{WEIGHT}.pt" not in found:
        raise DamagedCheckpoint(f"{place}: has no '{WEIGHT}.pt'; a part is missing")
    tensors: list[LogicalTensor] = []
    scalars: dict[str, Scalar] = {}
    for file in sorted(found, key=lambda file: (file != f"{WEIGHT}.pt", file)):
        if not file.endswith(".pt"):
            continue
        value = reader.load(place / file, trust=None)
        if isinstance(value, Mapping):
            if unknown := sorted(set(map(str, value)) - _KEYS):
                raise Unsupported(f"{place / file}: has {', '.join(map(repr, unknown))}, which is not understood")
            value = value.get("param")
        state = file.removesuffix(".pt")
        state = "param" if state == WEIGHT else state
        if isinstance(value, TensorRef) and (state == STEP or (value.numel == 1 and shape not in ((), (1,), None))):
            scalars[state] = builder.scalar(value)
        elif isinstance(value, TensorRef):
            wanted = shape or (tensors[0].shape if tensors else value.shape)
            tensors.append(builder.whole(name, state, _shaped(place / file, value, wanted)))
        elif isinstance(value, (bool, int, float)):
            scalars[state] = value
        else:
            raise DamagedCheckpoint(f"{place / file}: holds a {type(value).__name__}, neither a tensor nor a number")
    return tensors, scalars


def _shaped(path: Path, ref: TensorRef, shape: Shape) -> TensorRef:
    """A tensor in its parameter's shape: stage 3's converter leaves it flat."""
    if ref.shape == shape:
        return ref
    if len(ref.shape) == 1 and ref.is_contiguous and ref.numel == numel(shape):
        return replace(ref, shape=shape, strides=row_major(shape))
    raise DamagedCheckpoint(f"{path}: has shape {list(ref.shape)} where the model file says {list(shape)}")


def _common_steps(common: Mapping[str, Any], count: int, builder: Builder) -> dict[int, Scalar]:
    """Step counts that stage 3 keeps by subgroup, or once for all parameters."""
    inner = common.get("optimizer_state_dict")
    states = inner.get("state") if isinstance(inner, Mapping) else None
    out: dict[int, Scalar] = {}
    for index, state in (states or {}).items():
        step = state.get(STEP) if isinstance(state, Mapping) else None
        if isinstance(step, TensorRef) and step.numel == 1:
            out[index] = builder.scalar(step)
        elif isinstance(step, (int, float)):
            out[index] = step
    return dict.fromkeys(range(count), out[0]) if len(out) == 1 and 0 in out else out


def _groups(folder: Path, model: _Model, common: Mapping[str, Any]) -> list[ParamGroup]:
    saved = common.get("param_groups")
    if not isinstance(saved, list) or not all(isinstance(group, Mapping) for group in saved):
        raise DamagedCheckpoint(f"{folder / FOLDER / COMMON}: the key 'param_groups' is missing or no list of groups")
    options = [{key: value for key, value in options_of(group).items() if key != STEP} for group in saved]
    if len(options) == len(model.groups):
        return [ParamGroup(tuple(own), found) for own, found in zip(model.groups, options, strict=True)]
    if len(options) == 1:
        return [ParamGroup(tuple(name for own in model.groups for name in own), options[0])]
    raise Unsupported(
        f"{folder}: has {len(options)} param groups and {len(model.groups)} subgroups of ZeRO-3, and nothing says "
        "which belong together; convert the native checkpoint itself"
    )
