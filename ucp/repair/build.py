"""The catalog of a repaired checkpoint: what is left, and what is computed from it to replace what was lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from ucp.catalog import ByteSource, Catalog, LogicalTensor, ParameterInfo, SourceFile, Zeros
from ucp.formats.nouns import Remains
from ucp.geometry import whole
from ucp.merging.computed import Input, MergedTensor
from ucp.merging.operations import Combination, Linear, Redrawn
from ucp.repair.refill import Filling, Outlook, RepairSettings, grouped, neighbours_tensors, twin_of, twin_of_stateless
from ucp.storage.numbers import FLOATS
from ucp.transfer.reader import Reader

PARAM = "param"


@dataclass
class _Repaired:
    catalog: Catalog
    reader: Reader
    settings: RepairSettings
    files: list[SourceFile] = field(default_factory=list)
    computed: dict[int, ByteSource] = field(default_factory=dict)
    tensors: dict[tuple[str, str], LogicalTensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.files, self.computed = list(self.catalog.files), dict(self.catalog.computed)
        self.tensors = dict(self.catalog.tensors)

    def filled(self, name: str, filling: Filling, aliases: Sequence[str]) -> ParameterInfo:
        """A lost parameter, with weight and states."""
        twin = self.catalog.parameters[twin_of(name, filling)]
        for state in twin.states:
            if state == PARAM or self.settings.moments == "average":
                self._combined(name, state, filling)
            else:
                self._zeros(name, state, twin.shape, twin.states[state])
        return dataclasses.replace(twin, name=name, scalars=self._scalars(twin), aliases=tuple(aliases))

    def stateless(self, info: ParameterInfo, twin: ParameterInfo) -> ParameterInfo:
        """A parameter whose weight is left. It gets the same optimizer states as its twin, as zeros."""
        states = {PARAM: info.states[PARAM]}
        for state, dtype in twin.states.items():
            if state != PARAM:
                self._zeros(info.name, state, info.shape, dtype)
                states[state] = dtype
        scalars = {key: 0 if key == "step" else value for key, value in twin.scalars.items()}
        return dataclasses.replace(info, states=states, scalars=scalars, kind=twin.kind)

    def _scalars(self, twin: ParameterInfo) -> dict[str, Any]:
        zero = self.settings.moments == "zero"
        return {key: type(value)(0) if key == "step" and zero else value for key, value in twin.scalars.items()}

    def _combined(self, name: str, state: str, filling: Filling) -> None:
        found = neighbours_tensors(self.catalog, name, state, filling)
        first = found[0]
        if first.dtype not in FLOATS or (len(found) == 1 and not filling.random):
            # Whole numbers are taken from the left neighbour, since their mean is not a whole number.
            self.tensors[name, state] = dataclasses.replace(first, name=name, digest=None)
            return
        operation: Combination = Linear(tuple((k, share) for k, (_, share) in enumerate(filling.shares)), True)
        if filling.random:
            operation = Redrawn(0, self.settings.seed)
        inputs = [
            Input(f"layer {layer}", tensor, self.reader)
            for (layer, _), tensor in zip(filling.shares, found, strict=True)
        ]
        told = repr((name, state, operation, [(t.name, t.dtype) for t in found]))
        source = MergedTensor(name, state, first.shape, first.dtype, operation, inputs)
        self._enter(name, state, first.shape, first.dtype, source, told)

    def _zeros(self, name: str, state: str, shape: tuple[int, ...], dtype: str) -> None:
        self._enter(name, state, shape, dtype, Zeros(), "zeros")

    def _enter(self, name: str, state: str, shape: tuple[int, ...], dtype: str, source: ByteSource, told: str) -> None:
        index = len(self.files)
        blocks = whole(shape, 0, index)
        tensor = LogicalTensor(name, state, shape, dtype, blocks, np.zeros(len(blocks), np.int64))
        self.tensors[name, state] = tensor
        self.computed[index] = source
        self.files.append(SourceFile(f"repaired:{xxhash.xxh3_128_hexdigest(told.encode())}", tensor.nbytes, 0))


def repaired(remains: Remains, outlook: Outlook, settings: RepairSettings, reader: Reader) -> Catalog:
    """The whole catalog. reader: reads what is left.

    Raises Mismatch if neighbours have different states.
    """
    catalog = remains.catalog
    build = _Repaired(catalog, reader, settings)
    parameters: dict[str, ParameterInfo] = dict(catalog.parameters)
    approximate: dict[str, str] = {}
    for name, filling in outlook.parameters.items():
        known = remains.parameters.get(name)
        parameters[name] = build.filled(name, filling, () if known is None else known.aliases)
        approximate[name] = f"{settings.method}: {filling}"
    twins = {name: twin_of(name, filling) for name, filling in outlook.parameters.items()}
    for name in outlook.stateless:
        twins[name] = twin_of_stateless(catalog, name, remains.stateless)
        parameters[name] = build.stateless(parameters[name], parameters[twins[name]])
        if parameters[name].kind == "parameter":
            approximate[name] = "weights from a layer's file, optimizer states zero"
    state = catalog.training_state
    return dataclasses.replace(
        catalog,
        files=tuple(build.files),
        computed=build.computed,
        parameters=parameters,
        tensors=build.tensors,
        approximate={**catalog.approximate, **approximate},
        training_state=dataclasses.replace(state, param_groups=grouped(state.param_groups, twins, settings.lr_scale)),
    )
