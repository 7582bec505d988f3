"""What is left of a pipeline's checkpoint that lost files of some of its stages.

A stage is whole if its model file, all its optimizer files and the layer files of all that it trains are there and can
be read. The whole stages are read as a pipeline of their own, so what they hold in common with a lost one (tied
modules) is read from them. Files of a lost stage's layers may still be there. They have the weights, in the element
type of the module, but no optimizer states.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from ucp import limits
from ucp.catalog import Catalog, ParameterInfo
from ucp.errors import DamagedCheckpoint, UcpError
from ucp.formats.deepspeed.read import layers, stems
from ucp.formats.deepspeed.read.checkpoint import ASK, degrees, read_stages
from ucp.formats.deepspeed.read.folder import Sorted, load, sort_files
from ucp.formats.deepspeed.read.model_files import ModelFile
from ucp.formats.deepspeed.read.mp_rank import open_models
from ucp.formats.nouns import Remains
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.malformed import malformed
from ucp.geometry import Shape
from ucp.spec.select import Choice
from ucp.storage import locations
from ucp.storage.files import Files
from ucp.storage.torch_pt.values import TensorRef

_TIED = "tied_modules."


def remains(
    path: Path,
    files: Files,
    choice: Choice = ASK,
    *,
    trust_client_state: bool = False,
    skip_unknown_objects: bool = False,
    param_names: Sequence[Sequence[str]] | None = None,
) -> Remains | None:
    """What is left; None if it is not a pipeline's checkpoint or lost nothing. Raises what reading the rest raises."""
    present = sort_files(path)
    if present.parts or not any(layers.LAYER.match(name) for name in locations.names(path)):
        return None
    with stems.noting(), malformed(path, "what its files hold"):
        look = _Look.at(path, present, trust_client_state, skip_unknown_objects)
        if look is None or not look.faults or len(look.lost) == look.pp:
            return None
        numbers = look.lost_numbers()
        kept = [mp for mp in sorted(look.models) if mp // look.tp not in look.lost]
        found = [present.folder(path, mp) for mp in kept]
        opened = {mp: {0: look.models[mp]} for mp in kept}
        catalog = read_stages(path, files, found, opened, choice, param_names, False, without=numbers or {-1})
    known = {n: s for n, s in look.lost_names().items() if n not in catalog.parameters}
    catalog, stateless = _with_weights(catalog, files, look.weights(numbers), known, look.buffers())
    lost = {name: ParameterInfo(name, shape, {}) for name, shape in known.items() if name not in catalog.parameters}
    nameless = [n for n in numbers if look.stage_of(n) not in look.described]
    held = {int(name.partition(".")[0]) for name in stateless}
    return Remains(
        catalog,
        look.faults,
        lost,
        tuple(n for n in nameless if n not in held),
        stateless,
        look.unknown(),
        buffers_known=False,
    )


@dataclass
class _Look:
    """What a look at the files shows.

    models: the model file of every model-parallel rank, if it can be read.
    lost: the lost stages.
    faults: files, each with what is wrong.
    """

    path: Path
    tp: int
    pp: int
    models: dict[int, ModelFile]
    layers: Mapping[int, Mapping[int, Path]]
    lost: set[int] = field(default_factory=set)
    faults: tuple[tuple[str, str], ...] = ()

    @classmethod
    def at(cls, path: Path, present: Sorted, trust: bool, skip: bool) -> _Look | None:
        """None where no model file can be read."""
        models, faults = {}, {}
        for mp in sorted(present.whole):
            try:
                models[mp] = open_models(present.folder(path, mp), trust, skip)[0]
            except DamagedCheckpoint as error:
                faults[mp] = [(str(present.whole[mp]), error.message)]
        if not models:
            return None
        tp, pp = degrees(next(iter(models.values())))
        found: dict[int, dict[int, Path]] = {}
        for name in locations.names(path):
            if match := layers.LAYER.match(name):
                found.setdefault(int(match["tp"] or 0), {})[int(match["layer"])] = path / name
        look = cls(path, tp, pp, models, found)
        for mp in range(tp * pp):
            faults.setdefault(mp, []).extend(look._faults(present, mp))
        look.lost = {mp // tp for mp, wrong in faults.items() if wrong}
        look.faults = tuple(fault for mp in sorted(faults) for fault in faults[mp])
        return look

    def _faults(self, present: Sorted, mp: int) -> list[tuple[str, str]]:
        """What one model-parallel rank lacks."""
        if mp not in present.whole:
            return [(str(self.path / f"mp_rank_{mp:02d}_model_states.pt"), "is missing")]
        if mp not in self.models:
            return []  # that is reported already
        out = []
        model, folder = self.models[mp], present.folder(self.path, mp)
        if model.raw.get("param_shapes") is not None:
            for rank in range(int(model.need("dp_world_size"))):
                name = self.path / folder.optim_pattern.format(rank)
                out += [(str(name), "is missing")] if rank not in folder.optim else _unreadable(folder.optim[rank])
        for number in sorted(_numbers(_names(model))):
            here = self.layers.get(mp % self.tp, {}).get(number)
            if here is None:
                out.append(
                    (str(self.path / f"layer_{number:02d}-model_{mp % self.tp:02d}-model_states.pt"), "is missing")
                )
            else:
                out += _unreadable(here)
        return out

    @property
    def described(self) -> set[int]:
        """The stages for which a model file says what they trained."""
        return {mp // self.tp for mp in self.models}

    def ranges(self) -> dict[int, tuple[int, int]]:
        """The first and the last layer of each stage that a model file describes."""
        out = {}
        for stage in self.described:
            numbers = _numbers({n for mp, m in self.models.items() if mp // self.tp == stage for n in _names(m)})
            if numbers:
                out[stage] = min(numbers), max(numbers)
        return out

    def stage_of(self, number: int) -> int:
        """The stage that had a layer: the lost one between those that are known."""
        ranges = self.ranges()
        for stage, (first, last) in ranges.items():
            if first <= number <= last:
                return stage
        return max((stage + 1 for stage, (_, last) in ranges.items() if last < number), default=0)

    def lost_numbers(self) -> list[int]:
        """The layers of the stages that are lost."""
        kept = sorted(span for stage, span in self.ranges().items() if stage not in self.lost)
        listed = {number for files in self.layers.values() for number in files}
        # A stage that is described has lost only what it names; a function between two layers has no parameters.
        found = _numbers(self.lost_names()) | {n for n in listed if not any(a <= n <= b for a, b in kept)}
        if self.pp - 1 not in self.lost and kept:
            found = {n for n in found if n < kept[-1][1]}  # a layer behind the last stage's is none of this model
        ends = [(-1, -1), *kept]
        for (_, last), (first, _) in pairwise(ends):
            if first - last - 1 > limits.LAYERS_COUNT:
                raise DamagedCheckpoint(f"{self.path}: there are {first - last - 1} layers between two that are left")
            found |= {n for n in range(last + 1, first) if self.stage_of(n) not in self.described}
        return sorted(found)

    def lost_names(self) -> dict[str, Shape]:
        """What the lost stages trained, if a model file that says so is left."""
        out: dict[str, Shape] = {}
        for mp, model in self.models.items():
            if mp // self.tp in self.lost and self.tp == 1 and model.raw.get("param_shapes") is not None:
                out.update({name: shape for group in model.param_shapes for name, shape in group.items()})
        return out

    def buffers(self) -> set[str]:
        """What the lost stages kept as buffers, if a model file that says so is left."""
        lost = [model for mp, model in self.models.items() if mp // self.tp in self.lost]
        return {str(name) for model in lost for name in model.raw.get("buffer_names") or ()}

    def weights(self, numbers: Collection[int]) -> dict[str, TensorRef]:
        """What files of lost layers that are still there hold, by name."""
        out: dict[str, TensorRef] = {}
        for number in numbers if self.tp == 1 else ():
            file = self.layers.get(0, {}).get(number)
            if file is None or _unreadable(file):
                continue
            for key, value in load(file, trust=None).items():
                if isinstance(value, TensorRef):
                    out[f"{number}.{key}"] = value
        return out

    def unknown(self) -> str:
        """Why nothing tells what was lost; an empty string if it is known."""
        last = self.pp - 1
        if last in self.lost and last not in self.described:
            return (
                f"{self.path}: the last stage's model file ('mp_rank_{last * self.tp:02d}_model_states.pt') is lost, "
                "and nothing else tells how many layers there were"
            )
        if self.tp > 1:
            return f"{self.path}: of a stage that is cut by tensor parallelism as well, a file is lost"
        return ""


def _names(model: ModelFile) -> set[str]:
    """What a model file says that its stage trains or keeps."""
    names = {str(name) for name in model.raw.get("buffer_names") or ()}
    if model.raw.get("param_shapes") is not None:
        names.update(name for group in model.param_shapes for name in group)
    return names


def _numbers(names: Collection[str]) -> set[int]:
    heads = (name.partition(".")[0] for name in names)
    return {int(head) for head in heads if head.isascii() and head.isdigit() and len(head) < 10}


def _unreadable(file: Path) -> list[tuple[str, str]]:
    try:
        load(file, trust=None)
    except UcpError as error:
        return [(str(file), error.message)]
    return []


def _with_weights(
    catalog: Catalog,
    files: Files,
    weights: Mapping[str, TensorRef],
    known: Mapping[str, Shape],
    buffers: Collection[str],
) -> tuple[Catalog, frozenset[str]]:
    """The catalog with the weights that layer files of lost stages still have; and their names."""
    tied = {(n.rpartition(".")[2], i.shape) for n, i in catalog.parameters.items() if n.startswith(_TIED)}
    taken = {
        name: ref
        for name, ref in weights.items()
        # A tied layer's file has what another stage has under the tied module's name.
        if (
            known.get(name) == ref.shape or name in buffers
            if known
            else (name.rpartition(".")[2], ref.shape) not in tied
        )
    }
    if not taken:
        return catalog, frozenset()
    sources = list(catalog.files)
    builder = Builder(files, {file.path: k for k, file in enumerate(sources)}, sources)
    for name, ref in taken.items():
        builder.add(name, "buffer" if name in buffers else "parameter", [builder.whole(name, "param", ref)])
    merged = replace(
        catalog,
        files=tuple(builder.sources),
        parameters={**catalog.parameters, **builder.parameters},
        tensors={**catalog.tensors, **builder.tensors},
    )
    return merged, frozenset(name for name in taken if name not in buffers)
