"""Lost layers as combinations of their neighbours: what each gets, checked before anything is read.

If m layers in a row are lost, the neighbours of the k-th are the k-th of the m layers before them and the k-th of the m
layers after them. By *checkfree* it becomes the mean of these two, weighted by a power of the norms of their gradients,
or equally if no norms are recorded. If one side has no such layer (at the beginning and the end of a model), the other
one is copied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ucp.catalog import Catalog, LogicalTensor, ParameterInfo, ParamGroup
from ucp.errors import BadArgument, Mismatch, Unsupported
from ucp.formats.nouns import Remains
from ucp.layers import Layer, by_layer, layer_of, runs, shown
from ucp.units import counted

METHODS = ("checkfree", "copy-left", "copy-right", "uniform", "random")
MOMENTS = ("zero", "average")
NORMS = "ucp_gradient_norms"
"""Where a checkpoint's client state has the norm of each layer's gradient."""


@dataclass(frozen=True)
class RepairSettings:
    """How lost layers are filled.

    Attributes
    ----------
    method
        'checkfree', 'copy-left', 'copy-right', 'uniform' or 'random'.
    norm_power
        The power of the norms by which checkfree weighs the neighbours: 1 or 2.
    norms
        A layer's name -> the norm of its gradient, in place of the norms that the checkpoint has recorded.
    moments
        'zero': optimizer states are zeros, with step 0. 'average': the average of the neighbours'.
    lr_scale
        A factor above 0 for the learning rate of the filled parameters, which become a param group of their own. With
        None they stay in their groups.
    seed
        The seed of the draws of 'random'.
    """

    method: str = "checkfree"
    norm_power: int = 2
    norms: Mapping[str, float] | None = None
    moments: str = "zero"
    lr_scale: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise BadArgument for a value that is not allowed."""
        if self.method not in METHODS:
            raise BadArgument(f"layers are filled by {', '.join(METHODS)}, found '{self.method}'")
        if self.norm_power not in (1, 2):
            raise BadArgument(f"the norms' power is 1 or 2, found {self.norm_power}")
        if self.moments not in MOMENTS:
            raise BadArgument(f"optimizer states are filled by {' or '.join(MOMENTS)}, found '{self.moments}'")
        if self.lr_scale is not None and not (math.isfinite(self.lr_scale) and self.lr_scale > 0):
            raise BadArgument(f"the learning rate's factor is above 0, found {self.lr_scale:g}")


@dataclass(frozen=True)
class Filling:
    """What a lost layer is filled with. shares: its neighbours, left before right, each with its share. random: it is
    drawn like the first of them."""

    layer: Layer
    shares: tuple[tuple[Layer, float], ...]
    random: bool = False

    def __str__(self) -> str:
        if self.random:
            return f"drawn like layer {self.shares[0][0]}"
        if len(self.shares) == 1:
            return f"copy of layer {self.shares[0][0]}"
        total = math.fsum(share for _, share in self.shares)
        return " + ".join(f"{share / total:.4g} of layer {layer}" for layer, share in self.shares)


@dataclass(frozen=True)
class Outlook:
    """What a repair would do.

    Attributes
    ----------
    fillings
        What each lost layer is filled with.
    parameters
        Names of lost parameters -> what they are filled with.
    stateless
        Names of parameters whose weights are left, and whose optimizer states are lost.
    warnings
        Sentences for people.
    """

    fillings: tuple[Filling, ...]
    parameters: Mapping[str, Filling]
    stateless: tuple[str, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        texts = []
        if self.fillings:
            layers = shown([filling.layer for filling in self.fillings])
            texts.append(f"layers {layers} ({counted(len(self.parameters), 'parameter')}) from their neighbours")
        if self.stateless:
            texts.append(f"the optimizer states of {counted(len(self.stateless), 'parameter')}")
        return " and ".join(texts) or "nothing"


@dataclass
class _Known:
    """What is left, and what is known about what is lost."""

    catalog: Catalog
    lost: Mapping[str, ParameterInfo]
    buffers_known: bool
    left: dict[Layer, set[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.left = by_layer(n for n, info in self.catalog.parameters.items() if info.kind != "padding")

    def shapes(self, layer: Layer) -> dict[str, Any]:
        return {rest: self.catalog.parameters[layer.named(rest)].shape for rest in self.left[layer]}

    def is_like(self, layer: Layer, lost: Mapping[str, Any]) -> bool:
        """Whether a layer that is left has exactly the parameters that are known of a lost one."""
        found = self.shapes(layer)
        more = found.keys() - lost.keys()
        if not self.buffers_known:
            more = {rest for rest in more if self.catalog.parameters[layer.named(rest)].kind != "buffer"}
        return not more and all(found.get(rest) == shape for rest, shape in lost.items())

    def lost_shapes(self, layer: Layer) -> dict[str, Any]:
        found = (layer_of(name) for name in self.lost)
        return {rest: self.lost[at.named(rest)].shape for at, rest in filter(None, found) if at == layer}


def outlook_of(remains: Remains, settings: RepairSettings) -> Outlook:
    """Decide how each lost parameter is filled.

    Parameters
    ----------
    remains
        What is left of the checkpoint, and what is known about what is lost.
    settings
        How lost layers are filled.

    Returns
    -------
    Outlook

    Raises
    ------
    BadArgument
        For settings that are not allowed.
    Unsupported
        If a lost parameter has no neighbour that is like it, or nothing tells what was lost.
    Mismatch
        If the neighbours of a layer differ in names or shapes.
    """
    settings.check()
    if remains.unknown:
        raise Unsupported(f"{remains.unknown}, so it can't be repaired")
    known = _Known(remains.catalog, remains.parameters, remains.buffers_known)
    outside = sorted(name for name in remains.parameters if layer_of(name) is None)
    lost = {found[0] for name in remains.parameters if (found := layer_of(name)) is not None}
    # A lost layer that is like no layer that is left (an embedding, a head) has no neighbour, whatever its number.
    alone = {layer for layer in lost if not any(known.is_like(other, known.lost_shapes(layer)) for other in known.left)}
    outside += sorted(layer.named(rest) for layer in alone for rest in known.lost_shapes(layer))
    if outside:
        raise Unsupported(
            f"'{outside[0]}'{f' and {len(outside) - 1} more' if len(outside) > 1 else ''} is lost and has no neighbour "
            "that is like it, nor a copy that is left; take it from another checkpoint"
        )
    warnings: list[str] = []
    fillings = []
    for run in runs([*lost, *(Layer("", index) for index in remains.layers)]):
        fillings += [_filling(known, layer, len(run), settings, warnings) for layer in run]
    parameters: dict[str, Filling] = {}
    held = remains.catalog.parameters
    for filling in fillings:
        names = sorted(known.shapes(filling.shares[0][0]))
        parameters.update({name: filling for rest in names if (name := filling.layer.named(rest)) not in held})
    return Outlook(tuple(fillings), parameters, tuple(sorted(remains.stateless)), tuple(dict.fromkeys(warnings)))


def _filling(known: _Known, layer: Layer, count: int, settings: RepairSettings, warnings: list[str]) -> Filling:
    wanted = known.lost_shapes(layer)
    sides: list[Layer] = []
    for by in (-count, count):
        at = layer.moved(by)
        if at in known.left and (not wanted or known.is_like(at, wanted)):
            sides.append(at)
    if not wanted and (len(sides) < 2 or known.shapes(sides[0]) != known.shapes(sides[1])):
        raise Mismatch(
            f"nothing tells which parameters layer {layer} had: its neighbours {layer.moved(-count)} and "
            f"{layer.moved(count)} are not both there and alike; take the layer from another checkpoint"
        )
    if not sides:
        raise Unsupported(
            f"layer {layer} is lost, and so are both its neighbours, or they have other parameters "
            f"({layer.moved(-count)} and {layer.moved(count)}); take it from another checkpoint"
        )
    if settings.method == "random":
        return Filling(layer, ((sides[0], 1.0),), random=True)
    if settings.method.startswith("copy-"):
        by = -count if settings.method == "copy-left" else count
        if layer.moved(by) not in sides:
            raise Unsupported(f"layer {layer} has no layer {layer.moved(by)} to copy; copy the other neighbour")
        return Filling(layer, ((layer.moved(by), 1.0),))
    if len(sides) == 1:
        warnings.append(
            f"layer {layer} has a neighbour on one side alone, and is a copy of layer {sides[0]}, a poorer start"
        )
        return Filling(layer, ((sides[0], 1.0),))
    return Filling(layer, _shares(known.catalog, sides, settings, warnings))


def _shares(
    catalog: Catalog, sides: list[Layer], settings: RepairSettings, warnings: list[str]
) -> tuple[tuple[Layer, float], ...]:
    """The shares of both neighbours. Their sum need not be 1."""
    if settings.method == "checkfree":
        norms = settings.norms if settings.norms is not None else catalog.training_state.client_state.get(NORMS)
        found = [_norm(norms.get(str(layer)) if isinstance(norms, Mapping) else None) for layer in sides]
        if all(found):
            return tuple((layer, norm**settings.norm_power) for layer, norm in zip(sides, found, strict=True))
        warnings.append(
            "no gradient norms are recorded for the neighbours, which count equally; a run records them where its "
            'config has "ucp": {"save": {"gradient_norms": 100}}'
        )
    return tuple((layer, 1.0) for layer in sides)


def _norm(value: Any) -> float:
    """A recorded norm. 0 for a value that is no norm, or whose square would not fit a float."""
    return float(value) if type(value) in (int, float) and 1e-100 < value < 1e100 else 0.0


def twin_of(name: str, filling: Filling) -> str:
    """The parameter of the first neighbour from which a filled one is made."""
    found = layer_of(name)
    return "" if found is None else filling.shares[0][0].named(found[1])


def twin_of_stateless(catalog: Catalog, name: str, stateless: Collection[str]) -> str:
    """The parameter whose optimizer states are like those that this one lost: its counterpart in another layer, or else
    any trained one. Raises Unsupported if no parameter that is left has states."""
    found, shape = layer_of(name), catalog.parameters[name].shape
    whole = [i for i in catalog.parameters.values() if i.name not in stateless and i.kind != "padding"]
    if found is not None:
        for info in whole:
            other = layer_of(info.name)
            if other and (other[0].before, other[1], info.shape) == (found[0].before, found[1], shape):
                return info.name
    trained = next((i.name for i in whole if i.kind == "parameter" and len(i.states) > 1), None)
    if trained is None:
        raise Unsupported(f"'{name}' lost its optimizer states, and no parameter that is left has any")
    return trained


def grouped(groups: Sequence[ParamGroup], twins: Mapping[str, str], lr_scale: float | None) -> tuple[ParamGroup, ...]:
    """The param groups with the filled parameters in them. Each is in its twin's group, or with a factor for the
    learning rate in a group of its own kind. twins: those of every filled parameter."""
    listed = {name for group in groups for name in group.names}
    out: list[ParamGroup] = []
    own: list[ParamGroup] = []
    for group in groups:
        members = set(group.names)
        added = [name for name, twin in twins.items() if name not in listed and twin in members]
        names = _inserted(group.names, added)
        filled = [name for name in names if name in twins]
        if lr_scale is None or not filled:
            out.append(dataclasses.replace(group, names=tuple(names)))
            continue
        options = dict(group.options or {})
        if not isinstance(options.get("lr"), (int, float)):
            raise Unsupported(
                f"the param group of '{filled[0]}' has no learning rate that is a number, so none is scaled"
            )
        for key in ("lr", "initial_lr"):
            if isinstance(options.get(key), (int, float)):
                options[key] = options[key] * lr_scale
        out.append(dataclasses.replace(group, names=tuple(name for name in names if name not in twins)))
        own.append(ParamGroup(tuple(filled), options))
    return (*out, *own)


def _inserted(names: Sequence[str], added: Sequence[str]) -> list[str]:
    """The names with the added ones in place: each comes after the layers that precede its own."""
    ends: dict[Layer, int] = {}
    for k, name in enumerate(names):
        if (found := layer_of(name)) is not None:
            ends[found[0]] = k + 1
    behind: dict[int, list[str]] = {}
    for name in added:
        found = layer_of(name)
        before = (
            [0] if found is None else [k for at, k in ends.items() if at.before == found[0].before and at <= found[0]]
        )
        behind.setdefault(max(before, default=0), []).append(name)
    out = list(behind.get(0, ()))
    for k, name in enumerate(names, 1):
        out += [name, *behind.get(k, ())]
    return out


def neighbours_tensors(catalog: Catalog, name: str, state: str, filling: Filling) -> list[LogicalTensor]:
    """The same state of the parameter in each neighbour. Raises Mismatch if a neighbour lacks it."""
    found = layer_of(name)
    out = []
    for layer, _ in filling.shares:
        tensor = catalog.tensors.get((layer.named(found[1] if found else ""), state))
        if tensor is None:
            raise Mismatch(f"layer {layer} has no state '{state}' of '{name}', and the other neighbour has it")
        out.append(tensor)
    return out
