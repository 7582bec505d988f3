"""Pipelines without ZeRO: which stage has which parameters, if no file names them.

A stage's model file then holds only the optimizer's numbered states (``stage0`` names them once it is known which
parameters there are). Layers lie in order, and each stage has a run of them, and maybe tied modules whose layers are
functions. It is also known how many elements, of which shapes, each stage's optimizer keeps. A split is taken if it is
the only one for which all of that is true.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from ucp.errors import Unsupported
from ucp.formats.deepspeed.read.model_files import ModelFile
from ucp.geometry import Shape, numel
from ucp.storage.torch_pt.values import TensorRef

TIED = "tied_modules."


@dataclass(frozen=True)
class _Kept:
    """What a stage's optimizer keeps: elements in all, and the shapes of its parameters where they are told."""

    elements: int
    shapes: Counter[Shape] | None


def split(
    path: Path,
    models: Sequence[ModelFile],
    layers: Sequence[Mapping[str, TensorRef]],
    groups: Sequence[Sequence[str]] | None,
) -> list[list[str]]:
    """The names that each stage trains, in its module's order.

    models: of the stages, in order.
    layers: for each layer file, its tensors by their names in the module.
    groups: the names in each param group over all stages, if the caller knows them. Only then may there be frozen
    parameters or tied modules.

    Raises Unsupported unless exactly one split is possible.
    """
    buffers = {name for model in models for name in model.raw.get("buffer_names") or ()}
    named = None if groups is None else {name for group in groups for name in group}
    units = [[n for n in layer if n not in buffers and (named is None or n in named)] for layer in layers]
    refs = {name: ref for layer in reversed(layers) for name, ref in layer.items()}
    kept = [_kept(model) for model in models]
    found = {tuple(map(tuple, s)) for s in _splits(kept, [u for u in units if u], refs)}
    if len(found) != 1:
        raise Unsupported(
            f"{path}: a pipeline without ZeRO does not name its stages' parameters, and {len(found) or 'no'} splits of "
            f"its {len(layers)} layers make what the {len(models)} optimizers keep; load it into the pipeline's own "
            'engine, or save it at stage 1 or with "ucp": {"save": {"format": "universal"}}'
        )
    return [list(names) for names in found.pop()]


def with_names(model: ModelFile, names: Sequence[str], groups: Sequence[Sequence[str]] | None) -> Any:
    """The stage's optimizer state, with the names in its param groups where the caller's groups tell them: if they list
    layers in order, as a module does, and are as many."""
    saved = model.raw["optimizer"]
    inner = saved.get("optimizer_state_dict", saved)
    if groups is None or any(layers != sorted(layers) for layers in map(_layers, groups)):
        return saved
    own = [[name for name in names if name in set(group)] for group in groups]
    counts = [len(group["params"]) for group in inner["param_groups"]]
    if "fp32_groups_flat" not in saved and counts != [len(group) for group in own]:
        return saved
    if len(own) != len(counts):
        return saved
    recorded = [{**g, "param_names": n} for g, n in zip(inner["param_groups"], own, strict=True)]
    inner = {**inner, "param_groups": recorded}
    return {**saved, "optimizer_state_dict": inner} if "optimizer_state_dict" in saved else inner


def _layers(names: Sequence[str]) -> list[int]:
    return [int(first) for name in names if (first := name.partition(".")[0]).isdigit()]


def _kept(model: ModelFile) -> _Kept:
    saved = model.raw["optimizer"]
    if "fp32_groups_flat" in saved:
        return _Kept(sum(flat.numel for flat in saved["fp32_groups_flat"]), None)
    if "fp32_groups" in saved:
        shapes = Counter(ref.shape for group in saved["fp32_groups"] for ref in group)
    else:
        inner = saved.get("optimizer_state_dict", saved)
        shapes = Counter(_shape(model, inner["state"].get(n, {})) for g in inner["param_groups"] for n in g["params"])
    return _Kept(sum(numel(shape) * count for shape, count in shapes.items()), shapes)


def _shape(model: ModelFile, state: Mapping[str, Any]) -> Shape:
    for value in state.values():
        if isinstance(value, TensorRef) and value.shape:
            return value.shape
    raise Unsupported(
        f"{model.path}: a pipeline without ZeRO does not name its stages' parameters, and the optimizer has no states "
        "that would tell them by their shapes; save it at stage 1"
    )


def _splits(
    kept: Sequence[_Kept], units: Sequence[Sequence[str]], refs: Mapping[str, TensorRef]
) -> Iterator[list[list[str]]]:
    """Every split of the layers' names into stages that makes what the optimizers keep."""
    ties: dict[str, list[str]] = {}
    for name in dict.fromkeys(chain.from_iterable(units)):
        if name.startswith(TIED):
            ties.setdefault(name.split(".")[1], []).append(name)

    def after(stage: int, first: int) -> Iterator[list[list[str]]]:
        if stage == len(kept):
            if first == len(units):
                yield []
            return
        for count in range(len(ties) + 1):
            for extra in combinations(ties, count):
                for last in range(first, len(units) + 1):
                    names = _held(units[first:last], ties, extra)
                    elements = sum(refs[name].numel for name in names)
                    if elements > kept[stage].elements:
                        break
                    if elements == kept[stage].elements and _has_shapes(names, kept[stage], refs):
                        yield from ([names, *rest] for rest in after(stage + 1, last))

    return after(0, 0)


def _held(units: Sequence[Sequence[str]], ties: Mapping[str, Sequence[str]], extra: Sequence[str]) -> list[str]:
    """The names that a module of these layers has, and of these ties besides: tied modules come first."""
    names = list(chain.from_iterable(units))
    tied = [n for n in names if n.startswith(TIED)] + [n for tie in extra for n in ties[tie]]
    return list(dict.fromkeys([*tied, *(n for n in names if not n.startswith(TIED))]))


def _has_shapes(names: Sequence[str], kept: _Kept, refs: Mapping[str, TensorRef]) -> bool:
    return kept.shapes is None or Counter(refs[name].shape for name in names) == kept.shapes
