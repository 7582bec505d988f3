"""LoRA adapters that come to a model, are added into its weights, or are taken off again (PEFT's names).

PEFT calls a layer that has an adapter ``base_model.model.NAME.base_layer.weight``, its matrices
``NAME.lora_A.ADAPTER.weight`` and ``NAME.lora_B.ADAPTER.weight``, and all other parameters ``base_model.model.NAME``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import numpy as np

from ucp.catalog import LogicalTensor, ParameterInfo, bare
from ucp.changes.build import PARAM, Build, few
from ucp.changes.outline import Outline
from ucp.errors import Mismatch, Unsupported
from ucp.geometry import flat_ranges, numel
from ucp.merging.computed import Input
from ucp.storage.dtypes import itemsize
from ucp.storage.numbers import Bytes, Numbers, as_bytes, as_numbers, common_dtype
from ucp.transfer.gather import Want, gather
from ucp.units import counted

_PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer."
_MATRIX = re.compile(r"(?P<layer>.+)\.lora_(?P<which>[AB])\.(?:(?P<adapter>[^.]+)\.)?weight")
_PIECE_ELEMENTS = 1 << 20


def is_adapter(name: str) -> bool:
    """Whether the name is that of an adapter's own parameter."""
    return ".lora_" in f".{name}"


def plain(name: str) -> str:
    """The name without what PEFT has put into it."""
    return bare(name).removeprefix(_PREFIX).replace(_BASE_LAYER, ".")


def added(build: Build, outline: Outline) -> list[str]:
    """Give the checkpoint's parameters the names that they have below the live model's adapters, and drop the optimizer
    states of those that are frozen there. Returns what was changed."""
    known = {bare(name): name for name in build.catalog.parameters}
    new: dict[str, str] = {}
    for name in outline.names:
        short = plain(name)
        if not is_adapter(name) and bare(name) not in known and short in known:
            new[known[short]] = name
    build.rename(new)
    frozen = [
        info
        for name in new.values()
        if len((info := build.catalog.parameters[name]).states) > 1 and outline.parameters[name].kind != "parameter"
    ]
    freeze(build, frozen)
    lines = []
    if new:
        now = counted(len(new), "parameter is", "parameters are")
        lines.append(f"adapters: {now} below adapters now ({few(list(new.values()))})")
    if frozen:
        lines.append(
            f"adapters: {counted(len(frozen), 'parameter is', 'parameters are')} frozen now, without optimizer states"
        )
    return lines


def freeze(build: Build, infos: Sequence[ParameterInfo]) -> None:
    """Leave out what an optimizer keeps for these parameters."""
    build.put(
        [
            (replace(info, kind="frozen" if info.kind == "parameter" else info.kind, scalars={}), [weight])
            for info in infos
            if (weight := build.catalog.tensors.get((info.name, PARAM))) is not None
        ]
    )
    build.ungroup({info.name for info in infos})


def split(build: Build) -> list[str]:
    """Take adapters off: the base alone is left, under the plain model's names."""
    adapters = [name for name in build.catalog.parameters if is_adapter(name)]
    if not adapters:
        return []
    build.drop(adapters)
    _plainly_named(build)
    return [f"adapters: {counted(len(adapters), 'parameter')} of adapters left out ({few(adapters)})"]


def merged(build: Build, scale: float) -> list[str]:
    """Add adapters into the weights below them: ``W + scale * B A``, computed in float64 and rounded once."""
    pairs: dict[str, dict[str, str]] = {}
    adapters = [name for name in build.catalog.parameters if is_adapter(name)]
    for name in adapters:
        found = _MATRIX.fullmatch(name)
        if found is None:
            raise Unsupported(
                f"'{name}' is of an adapter that is no pair of LoRA matrices; merge it in its own library"
            )
        if pairs.setdefault(found["layer"], {}).setdefault(found["which"], name) != name:
            raise Unsupported(f"'{found['layer']}' has several adapters; merge them first (ucp merge --adapter-merge)")
    if not adapters:
        return []
    made = [_merged(build, layer, pair, scale) for layer, pair in pairs.items()]
    build.put(made)
    build.drop(adapters)
    _plainly_named(build)
    return [
        f"adapters: {counted(len(made), 'weight')} with theirs added, W + {scale:g} B A, rounded once "
        f"({few(sorted(pairs))}); "
        "the adapters' optimizer states are left out"
    ]


def _merged(
    build: Build, layer: str, pair: Mapping[str, str], scale: float
) -> tuple[ParameterInfo, list[LogicalTensor]]:
    infos = build.catalog.parameters
    name = next((n for n in (f"{layer}.base_layer.weight", f"{layer}.weight") if n in infos), None)
    if name is None or set(pair) != {"A", "B"}:
        what = "the weight below it" if name is None else "one of its two matrices"
        raise Mismatch(f"the adapter of '{layer}' lacks {what}; the checkpoint has only a part of it")
    base, a, b = (build.catalog.tensors[n, PARAM] for n in (name, pair["A"], pair["B"]))
    if len(base.shape) != 2 or (b.shape[:1], a.shape[1:], a.shape[:1]) != (
        base.shape[:1],
        base.shape[1:],
        b.shape[1:],
    ):
        raise Unsupported(
            f"'{name}' is {list(base.shape)}, and its adapter's matrices {list(b.shape)} and {list(a.shape)}: their "
            "product is no change of it, so it is not a linear layer's"
        )
    info = infos[name]
    if len(info.states) > 1:
        raise Unsupported(f"'{name}' is trained beside its adapter; its optimizer states mean nothing after a merge")
    dtype = common_dtype([base.dtype, a.dtype, b.dtype])
    reader = build.reader()
    below, first, second = (Input(t.name, t, reader) for t in (base, a, b))
    source = WithAdapter(dtype, scale, below, first, second)
    return info, [build.computed(name, PARAM, base.shape, dtype, source, f"{scale!r} {a.name} {b.name}")]


def _plainly_named(build: Build) -> None:
    build.rename({name: plain(name) for name in build.catalog.parameters if plain(name) != name})


@dataclass
class WithAdapter:
    """The bytes of a weight with an adapter added (a `ucp.catalog.ByteSource`). Thread-safe."""

    dtype: str
    scale: float
    base: Input
    a: Input
    b: Input
    _lock: Any = field(default_factory=Lock)
    _factors: tuple[Numbers, Numbers] | None = None

    def read_into(self, offset: int, parts: Sequence[Bytes]) -> None:
        width = itemsize(self.dtype)
        stop = offset + sum(map(len, parts))
        first, last = offset // width, -(-stop // width)
        raw = np.concatenate(
            [
                as_bytes(self._elements(at, min(at + _PIECE_ELEMENTS, last)), self.dtype)
                for at in range(first, last, _PIECE_ELEMENTS)
            ]
            or [np.empty(0, np.uint8)]
        )
        at = offset - first * width
        for part in parts:
            part[:] = raw[at : at + len(part)]
            at += len(part)

    def _elements(self, first: int, last: int) -> Numbers:
        a, b = self._both()
        columns = self.base.tensor.shape[1]
        low, high = first // columns, -(-last // columns)
        change = np.zeros((high - low, columns))
        for k in range(len(a)):  # in one order for each element, so that the bits do not depend on who reads how much
            change += b[low:high, k, None] * a[k]
        wanted = change.reshape(-1)[first - low * columns : last - low * columns]
        return _numbers(self.base, first, last) + self.scale * wanted

    def _both(self) -> tuple[Numbers, Numbers]:
        with self._lock:
            if self._factors is None:
                a, b = (_numbers(x, 0, numel(x.tensor.shape)).reshape(x.tensor.shape) for x in (self.a, self.b))
                self._factors = a, b
            return self._factors


def _numbers(source: Input, first: int, last: int) -> Numbers:
    tensor = source.tensor
    raw = np.empty((last - first) * itemsize(tensor.dtype), np.uint8)
    gather(source.reader, [Want(tensor, flat_ranges(tensor.shape, [first], [last], [0]), tensor.dtype)], [raw], 1)
    return as_numbers(raw, tensor.dtype)
