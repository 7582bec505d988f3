"""The model and the optimizers of a folder that Accelerate wrote, in any of its forms, as one state dict.

Hugging Face's Trainer writes its model as Accelerate does under FSDP, or as a model folder. It writes one optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ucp.catalog import ByteSource, Catalog, LogicalTensor, ParameterInfo
from ucp.errors import DamagedCheckpoint, Mismatch, Unsupported
from ucp.formats.accelerate.ranks import differ_sentence, joined
from ucp.formats.dcp.reader import add_entries, layout_of
from ucp.formats.huggingface.folder import KINDS
from ucp.formats.huggingface.module_order import module_order
from ucp.formats.huggingface.reader import read as read_weights
from ucp.formats.nouns import ReadRequest
from ucp.formats.shared import flat, numbered
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.copies import check_copies
from ucp.formats.shared.roles import MODEL, PARAM
from ucp.formats.shared.state_dicts import Entries
from ucp.formats.shared.unflatten import unflatten
from ucp.formats.shared.unknown_objects import UnknownObjects, load_file
from ucp.geometry import Shape
from ucp.parallel.mesh import Layout
from ucp.printable import logger
from ucp.storage import graphs, locations
from ucp.storage.files import Files
from ucp.storage.torch_pt.values import TensorRef

log = logger(__name__)

OPTIMIZER = "optim"
_MODEL = re.compile(r"pytorch_model_fsdp(?:_(\d+))?(\.bin)?")
_MORE_WEIGHTS = re.compile(r"(?:model|pytorch_model)_(\d+)\.(?:safetensors|bin)")
_OPTIMIZER = re.compile(r"optimizer(?:_(\d+))?(\.bin|\.pt)?")
_TRAINER = "trainer_state.json"
_OF_RANK = re.compile(r"(pytorch_model_fsdp|optimizer)(?:_(\d+))?_rank(\d+)\.bin")


@dataclass
class Parts:
    """A folder's state dict, as far as it has been read.

    aliases: the owner's name -> other names of a tied parameter.
    ordered: the model's names, if they come in the module's order.
    ranks: how many ranks have written a file each.
    unnamed: a file's name -> an optimizer that numbers its parameters, if nothing tells their names.
    notes: what could not be checked.
    computed: as `Catalog.computed` has it, for weights that are quantised.
    copies: weights that are held a second time.
    units: what the files tell of FSDP1's flat parameters, by unit.
    """

    folder: Path
    request: ReadRequest
    entries: Entries
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ordered: list[str] | None = None
    ranks: int = 1
    unnamed: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    computed: dict[int, ByteSource] = field(default_factory=dict)
    copies: list[LogicalTensor] = field(default_factory=list)
    units: dict[str, Sequence[flat.FlatMember]] = field(default_factory=dict)

    @property
    def unknown(self) -> UnknownObjects:
        return UnknownObjects.of(self.request.options)

    def load(self, name: str) -> Any:
        """What a torch.save file in the folder holds."""
        return load(self.folder / name, self.request)

    def catalog(self, format_name: str, writer: str) -> Catalog:
        """The parts as one catalog. Its training state is still only that of the optimizers."""
        shapes = self.request.options.get("param_shapes")
        self.notes += unflatten(self.entries, self.folder, shapes, self.units, f"{MODEL}.")
        layout = layout_of(self.entries)
        layout = replace(layout, dp=max(layout.dp, self.ranks))
        found = self.entries.catalog(format_name, writer, layout if layout.zero else Layout())
        parameters = {name: self._tied(info) for name, info in found.parameters.items()}
        state = replace(found.training_state, client_state={**found.training_state.client_state, **self.unnamed})
        found = replace(
            found,
            parameters=parameters,
            training_state=state,
            unchecked=tuple(self.notes),
            computed={**found.computed, **self.computed},
            copies=tuple(self.copies),
        )
        found.check()
        try:
            check_copies(found, self.entries.builder.files, "both are to hold the same model; two steps are mixed")
        except Mismatch as error:
            raise DamagedCheckpoint(str(error)) from error
        for note in self.notes:
            log.warning("%s: %s", self.folder, note)
        return found

    def _tied(self, info: ParameterInfo) -> ParameterInfo:
        is_buffer = info.kind == "frozen" and info.name.rpartition(".")[2] in numbered.BUFFERS
        return replace(info, aliases=self.aliases.get(info.name, ()), kind="buffer" if is_buffer else info.kind)


def load(path: Path, request: ReadRequest, *, dtensors: bool = False, alone: bool = False) -> Any:
    """What a torch.save file holds. If the request says so, objects of unknown classes are left out.

    alone: the file is all there is, so that it may have any name.

    Raises DamagedCheckpoint, also for a file that was written as another number's, and UnsafePickle for an object of an
    unknown class.
    """
    found = load_file(path, UnknownObjects.of(request.options), dtensors=dtensors)
    if not alone and found.stem is not None:
        _check_number(path, found.stem)
    graphs.check(str(path), found.graph)
    return found.graph


def _check_number(path: Path, stem: str) -> None:
    """torch keeps in the archive under which name it was written. If that differs from the file's own in nothing but a
    number, the files of two ranks, or of two optimizers, were swapped."""
    if stem != path.stem and _NUMBER.sub("#", stem) == _NUMBER.sub("#", path.stem):
        raise DamagedCheckpoint(
            f"{path}: was written as '{stem}{path.suffix}', as its archive says; the files of two ranks were swapped "
            "or renamed: give each the name that it was written under"
        )


_NUMBER = re.compile(r"\d+")


def read(folder: Path, files: Files, request: ReadRequest, names: Sequence[str]) -> Parts:
    """The model and the optimizers among the folder's names.

    Raises DamagedCheckpoint if there is no model or a part is missing, Unsupported for several models.
    """
    parts = Parts(folder, request, Entries(Builder(files)))
    by_rank = _of_ranks(folder, names)
    if "pytorch_model_fsdp" in by_rank:
        parts.ranks = len(by_rank["pytorch_model_fsdp"])
        add_module(parts, _joined(parts, by_rank["pytorch_model_fsdp"]), "pytorch_model_fsdp_0_rank0.bin")
        if "optimizer" in by_rank:
            add_optimizer(parts, _joined(parts, by_rank["optimizer"]), "optimizer_0_rank0.bin")
        return parts
    _add_model(parts, names)
    optimizers = [found for name in names if (found := _OPTIMIZER.fullmatch(name)) is not None]
    optimizers = [found for found in optimizers if found[2] or locations.is_folder(folder / found[0])]
    numbers = sorted(int(found[1] or 0) for found in optimizers)
    if numbers != list(range(len(numbers))):
        raise DamagedCheckpoint(
            f"{folder}: has the optimizers {', '.join(found[0] for found in optimizers)}, so that some are missing, or "
            "there twice"
        )
    for found in sorted(optimizers, key=lambda found: int(found[1] or 0)):
        _add_optimizer(parts, found[0], int(found[1] or 0), sharded=not found[2])
    return parts


def _of_ranks(folder: Path, names: Sequence[str]) -> dict[str, list[Path]]:
    """The files of which each rank wrote one, rank by rank, for the model and for the optimizer.

    Raises DamagedCheckpoint if one is missing, Unsupported for several models or optimizers.
    """
    found: dict[str, dict[int, Path]] = {}
    for name in names:
        match = _OF_RANK.fullmatch(name)
        if match is None:
            continue
        if int(match[2] or 0):
            raise Unsupported(f"{folder}: '{name}' is of a second model or optimizer; of such files one is read")
        found.setdefault(match[1], {})[int(match[3])] = folder / name
    count = max((max(ranks) + 1 for ranks in found.values()), default=0)
    for kind, ranks in found.items():
        missing = next((rank for rank in range(count) if rank not in ranks), None)
        if missing is not None:
            raise DamagedCheckpoint(f"{folder}: has no '{kind}_0_rank{missing}.bin'; a rank's part is missing")
    return {kind: [ranks[rank] for rank in sorted(ranks)] for kind, ranks in found.items()}


def _joined(parts: Parts, paths: Sequence[Path]) -> Any:
    """The state dict that all ranks' files make together."""
    unequal: list[str] = []
    found = [load(path, parts.request, dtensors=True) for path in paths]
    whole = joined(found, paths, parts.entries.builder, unequal)
    if unequal:
        parts.notes.append(differ_sentence(unequal))
    return whole


def _add_model(parts: Parts, names: Sequence[str]) -> None:
    folder = parts.folder
    fsdp = [found for name in names if (found := _MODEL.fullmatch(name)) is not None]
    fsdp = [found for found in fsdp if found[2] or locations.is_folder(folder / found[0])]
    plain = [kind for kind in KINDS if kind.in_folder(folder)]
    more = [name for name in names if _MORE_WEIGHTS.fullmatch(name)]
    if len(fsdp) == len(plain) == 1 and fsdp[0][2] and not more and _TRAINER in names:
        add_module(parts, parts.load(fsdp[0][0]), fsdp[0][0])
        _add_copies(parts, fsdp[0][0])
        return
    if len(fsdp) + len(plain) + len(more) > 1:
        models = [*(found[0] for found in fsdp), *(kind.single for kind in plain), *more]
        raise Unsupported(
            f"{folder}: holds several models ({', '.join(models)}), whose parameters may have the same names; give the "
            "path of one of them"
        )
    if plain:
        _add_weights(parts)
    elif not fsdp and any(name.startswith("adapter_model.") for name in names):
        raise Unsupported(
            f"{folder}: holds a PEFT adapter ('adapter_model') without its base model; its optimizer's numbers can be "
            "named by no file, so it is not read: merge the adapter, or resume in its own program"
        )
    elif not fsdp:
        raise DamagedCheckpoint(f"{folder}: has no model: neither weights nor a folder 'pytorch_model_fsdp_0'")
    elif fsdp[0][2]:
        graph = parts.load(fsdp[0][0])
        add_module(parts, graph, fsdp[0][0])
    else:
        add_entries(folder / fsdp[0][0], parts.entries, parts.unknown)


def _add_weights(parts: Parts) -> None:
    """Add a model folder's weights, under the module's own names if a spec knows them."""
    builder = parts.entries.builder
    found = read_weights(parts.folder, builder.files, parts.request.choice, builder)
    parts.computed.update(found.computed)
    for info in found.parameters.values():
        parts.entries.add((MODEL, info.name), found.tensors[info.name, PARAM])
        if info.aliases:
            parts.aliases[info.name] = info.aliases


def _add_copies(parts: Parts, where: str) -> None:
    """Add a model folder's weights that are those of the file ``where`` again.

    The Trainer writes both under FSDP's FULL_STATE_DICT, and itself resumes from ``where``. Raises DamagedCheckpoint
    if they are of different models.
    """
    builder = parts.entries.builder
    again = read_weights(parts.folder, builder.files, parts.request.choice, builder)
    for name in again.parameters:
        copy, own = again.tensors[name, PARAM], parts.entries.tensors.get(f"{MODEL}.{name}")
        if own is None or own.shape != copy.shape:
            has = "no such tensor" if own is None else f"shape {list(own.shape)}"
            raise DamagedCheckpoint(
                f"{parts.folder}: '{name}' has shape {list(copy.shape)} in the model's own files, and '{where}' has "
                f"{has}; files of two models are mixed"
            )
        if own.dtype == copy.dtype:
            parts.copies.append(copy)
        else:
            parts.notes.append(f"'{name}' is {own.dtype} in '{where}', which is read, and {copy.dtype} in another file")


def add_module(parts: Parts, graph: Any, where: str) -> None:
    """Add a module's ``state_dict()``. Its names are in the module's order. Tensors that share their bytes are tied."""
    if not isinstance(graph, Mapping) or not all(isinstance(name, str) for name in graph):
        raise DamagedCheckpoint(f"{parts.folder / where}: holds a {type(graph).__name__}, not a module's state dict")
    owners: dict[Any, str] = {}
    parts.ordered = []
    for name, value in graph.items():
        if isinstance(value, LogicalTensor):
            parts.ordered.append(name)
        elif isinstance(value, TensorRef) and value.numel:
            owner = owners.setdefault((value.file, value.offset, value.dtype, value.shape, value.strides), name)
            if owner != name:
                parts.aliases[owner] = (*parts.aliases.get(owner, ()), name)
                continue
            parts.ordered.append(name)
        parts.entries.add((MODEL, name), value)


def _add_optimizer(parts: Parts, name: str, number: int, sharded: bool) -> None:
    root = OPTIMIZER if not number else f"{OPTIMIZER}_{number}"
    if sharded:
        add_entries(parts.folder / name, parts.entries, parts.unknown, under=(root,) if number else ())
    else:
        add_optimizer(parts, parts.load(name), name, root)


def add_optimizer(parts: Parts, graph: Any, where: str, root: str = OPTIMIZER, kept_as: str | None = None) -> None:
    """Add an optimizer's ``state_dict()``.

    If nothing tells which parameters its numbers are, it is kept unchanged as client state, under the file's name or
    ``kept_as``.
    """
    path = str(parts.folder / where)
    if not numbered.is_optimizer(graph):
        raise DamagedCheckpoint(f"{path}: holds no optimizer's state dict")
    shapes = model_shapes(parts)
    given = parts.request.options.get("param_names")
    try:
        found = numbered.named(graph, numbered.ModelTensors(shapes, lambda: _order(parts, shapes), given), path)
    except numbered.Unnamed as reason:
        if given is not None:  # a run is to resume from it
            raise Unsupported(
                f"{path}: its optimizer numbers its parameters, and the names and groups that are given don't tell "
                f"which they are: {reason}; give the groups as they were when it was saved, in their order"
            ) from None
        parts.unnamed[kept_as or where] = graph
        parts.notes.append(
            f"the optimizer of '{where}' is kept as client state and resumes by no name, since it numbers its "
            f"parameters and nothing tells which they are ({reason}); load it into the run's own model and optimizer, "
            "or give param_names (--param-names FILE)"
        )
        return
    parts.entries.add_tree((root,), found)


def model_shapes(parts: Parts) -> dict[str, Shape]:
    """The shapes of the model's tensors by name; tied ones appear once."""
    prefix = f"{MODEL}."
    return {
        key.removeprefix(prefix): tensor.shape
        for key, tensor in parts.entries.tensors.items()
        if key.startswith(prefix) and key.removeprefix(prefix)
    }


def _order(parts: Parts, shapes: Mapping[str, Shape]) -> Sequence[str] | None:
    if parts.ordered is not None:
        return parts.ordered
    found = module_order(parts.folder, len(shapes))
    if found is None:
        return None
    owner = {alias: name for name, aliases in parts.aliases.items() for alias in aliases}
    names = list(dict.fromkeys(owner.get(name, name) for name in found))
    return names if set(names) <= shapes.keys() else None
