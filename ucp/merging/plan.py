"""The catalog of a merge: how each parameter is combined, from which sources. It is checked before anything is
written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from ucp.catalog import ByteSource, Catalog, LogicalTensor, ParameterInfo, ParamGroup, SourceFile, TrainingState
from ucp.checkpoint import Checkpoint
from ucp.errors import BadArgument, Mismatch, Unsupported
from ucp.geometry import whole
from ucp.merging.computed import Input, MergedTensor, equal
from ucp.merging.operations import Combination, Copied, Linear
from ucp.parallel.mesh import Layout
from ucp.storage.numbers import FLOATS, common_dtype

PARAM = "param"
_SHOWN = 5


@dataclass(frozen=True)
class MergeSource:
    """One of the checkpoints that are merged. name: what messages call it. is_mask: it only says what counts. shown:
    its catalog for the merge, if that is not the checkpoint's own."""

    name: str
    checkpoint: Checkpoint
    is_mask: bool = False
    shown: Catalog | None = None

    @property
    def catalog(self) -> Catalog:
        return self.checkpoint.catalog if self.shown is None else self.shown


@dataclass(frozen=True)
class MergeRules:
    """How a merge treats what is not plainly a weight.

    operation: gives a parameter's operation, by its name. dtype: the element type of floating-point weights; None for
    the widest of their sources'. optimizer: 'none' (weights alone), 'average' (as the weights are, for linear merges
    only), or the number of the source whose states are taken. step: if averaged step counts differ, 'max' takes the
    largest, and None refuses. buffers: the source whose integer tensors count if they differ; None refuses. finite:
    refuse NaN and infinity.
    """

    operation: Callable[[str], Combination]
    dtype: str | None = None
    optimizer: str | int = "none"
    step: str | None = None
    buffers: int | None = None
    finite: bool = True


def merged_catalog(sources: Sequence[MergeSource], rules: MergeRules) -> Catalog:
    """The catalog of the result. Its training state is that of weights alone, or comes from the source of the states.

    Raises
    ------
    Mismatch
        If parameters, shapes, tied names, integer tensors or step counts differ between the sources.
    Unsupported
        For quantised tensors, and states that cannot be averaged.
    """
    _check_names(sources)
    build = _Build(sources, rules)
    parameters = {}
    for info in sources[0].catalog.parameters.values():
        if info.kind != "padding":
            parameters[info.name] = build.parameter(info)
    return build.catalog(parameters)


def _check_names(sources: Sequence[MergeSource]) -> None:
    """Raise Mismatch unless all sources have the same parameters, of the same shapes, tied alike."""
    first = sources[0]
    expected = {i.name: i for i in first.catalog.parameters.values() if i.kind != "padding"}
    for other in (one for one in sources[1:] if not one.is_mask):
        found = {i.name: i for i in other.catalog.parameters.values() if i.kind != "padding"}
        for here, there, one, two in ((expected, found, first, other), (found, expected, other, first)):
            lacking = sorted(set(here) - set(there))
            if lacking:
                tied = {alias for info in there.values() for alias in info.aliases}
                if lacking[0] in tied:
                    raise Mismatch(
                        f"'{lacking[0]}' is a parameter of its own in '{one.name}' and tied to another in "
                        f"'{two.name}'; merge checkpoints whose tied weights are stored alike"
                    )
                more = f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
                raise Mismatch(
                    f"'{two.name}' lacks {', '.join(map(repr, lacking[:_SHOWN]))}{more}, which '{one.name}' has; merge "
                    "checkpoints of one model"
                )
        for name, info in expected.items():
            if found[name].shape != info.shape:
                raise Mismatch(
                    f"'{name}' is {list(info.shape)} in '{first.name}' and {list(found[name].shape)} in "
                    f"'{other.name}'; merge checkpoints of one shape (or cut vocabularies of different widths: vocab "
                    "cut)"
                )


@dataclass
class _Build:
    """A catalog under construction. Its files are those of all sources, then one "file" for every computed tensor."""

    sources: Sequence[MergeSource]
    rules: MergeRules
    tensors: dict[tuple[str, str], LogicalTensor] = field(default_factory=dict)
    computed: list[MergedTensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        counts = [len(source.catalog.files) for source in self.sources]
        self.first_file = [sum(counts[:k]) for k in range(len(counts))]
        self.files = [file for source in self.sources for file in source.catalog.files]

    def parameter(self, info: ParameterInfo) -> ParameterInfo:
        """The merged parameter's entry. Adds its tensors to the catalog."""
        operation = _simplest(self.rules.operation(info.name))
        states = {PARAM: self._tensor(info.name, PARAM, operation)}
        scalars: Mapping[str, Any] = {}
        taken = self.rules.optimizer
        if isinstance(taken, int):
            owner = self._info(taken, info.name)
            scalars = owner.scalars
            for state in owner.states:
                if state != PARAM:
                    states[state] = self._tensor(info.name, state, Copied(taken))
        elif taken == "average":
            scalars = self._scalars(info.name, operation)
            for state in self._info(operation.sources[0], info.name).states:
                if state != PARAM:
                    states[state] = self._tensor(info.name, state, _averaged(info.name, state, operation))
        return dataclasses.replace(info, states=states, scalars=scalars)

    def _info(self, source: int, name: str) -> ParameterInfo:
        return self.sources[source].catalog.parameters[name]

    def _given(self, source: int, name: str, state: str) -> LogicalTensor:
        found = self.sources[source].catalog.tensors.get((name, state))
        if found is None:
            raise Mismatch(
                f"'{name}' has no state '{state}' in '{self.sources[source].name}', and other sources have it; merge "
                "weights alone (optimizer none), or take one source's states"
            )
        return found

    def _tensor(self, name: str, state: str, operation: Combination) -> str:
        """Add one merged tensor; returns its element type."""
        read = {k: self._given(k, name, state) for k in dict.fromkeys(operation.sources)}
        dtypes = [tensor.dtype for k, tensor in read.items() if not self.sources[k].is_mask]
        if not all(dtype in FLOATS for dtype in dtypes):
            return self._unmixed(name, state, operation)
        dtype = common_dtype(dtypes)
        if self.rules.dtype is not None and state == PARAM:
            dtype = self.rules.dtype
        if isinstance(operation, Copied) and dtype == dtypes[0]:
            return self._as_it_is(operation.source, read[operation.source])
        inputs = [self._input(k, read.get(k)) for k in range(len(self.sources))]
        shape = next(iter(read.values())).shape
        merged = MergedTensor(name, state, shape, dtype, operation, inputs, self.rules.finite)
        index = len(self.files) + len(self.computed)
        blocks = whole(shape, 0, index)
        self.computed.append(merged)
        self.tensors[name, state] = LogicalTensor(name, state, shape, dtype, blocks, np.zeros(len(blocks), np.int64))
        return dtype

    def _input(self, source: int, tensor: LogicalTensor | None) -> Input | None:
        given = self.sources[source]
        return None if tensor is None else Input(given.name, tensor, given.checkpoint.reader)

    def _unmixed(self, name: str, state: str, operation: Combination) -> str:
        """Add a tensor whose elements are no floating-point numbers. It has to be the same in all sources that are
        read, unless the rules say whose counts."""
        chosen = self.rules.buffers
        order = list(dict.fromkeys(operation.sources)) if chosen is None else [chosen]
        first = self._given(order[0], name, state)
        if first.dtype.startswith("float8"):
            raise Unsupported(f"'{name}' is {first.dtype}, quantised; merge what it was quantised from")
        for k in order[1:]:
            other = self._given(k, name, state)
            one, two = self._input(order[0], first), self._input(k, other)
            if first.dtype != other.dtype or one is None or two is None or not equal(one, two):
                raise Mismatch(
                    f"'{name}' ({first.dtype}) differs between '{self.sources[order[0]].name}' and "
                    f"'{self.sources[k].name}', and whole numbers are not averaged; name the source that counts "
                    "(buffers from=N)"
                )
        return self._as_it_is(order[0], first)

    def _as_it_is(self, source: int, tensor: LogicalTensor) -> str:
        blocks = dataclasses.replace(tensor.blocks, buffers=tensor.blocks.buffers + self.first_file[source])
        self.tensors[tensor.name, tensor.state] = dataclasses.replace(tensor, blocks=blocks)
        return tensor.dtype

    def _scalars(self, name: str, operation: Combination) -> dict[str, Any]:
        """Values such as 'step', which have to be equal unless the rules say what counts."""
        found = [self._info(k, name).scalars for k in operation.sources]
        out = dict(found[0])
        for key in out:
            values: list[Any] = [scalars.get(key) for scalars in found]
            if all(value == values[0] for value in values):
                continue
            if key != "step" or self.rules.step != "max":
                raise Mismatch(
                    f"'{name}' has {key} {values} in the sources, which can't be averaged; say which counts (step "
                    "max), or take one source's states"
                )
            out[key] = max(values)
        return out

    def catalog(self, parameters: Mapping[str, ParameterInfo]) -> Catalog:
        computed: dict[int, ByteSource] = {}
        digests: dict[int, Any] = {}
        files = list(self.files)
        for first, source in zip(self.first_file, self.sources, strict=True):
            computed.update({first + k: held for k, held in source.catalog.computed.items()})
            digests.update({first + k: table for k, table in source.catalog.chunk_digests.items()})
        for merged in self.computed:
            computed[len(files)] = merged
            files.append(SourceFile(f"merged:{_identity(merged)}", merged.nbytes, 0))
        return Catalog(
            "merge",
            f"merge of {', '.join(source.name for source in self.sources)}",
            Layout(),
            tuple(files),
            parameters,
            self.tensors,
            self._training_state(),
            digests,
            computed=computed,
        )

    def _training_state(self) -> TrainingState:
        taken = self.rules.optimizer
        if taken == "none":
            groups = self.sources[0].catalog.training_state.param_groups
            fresh = tuple(ParamGroup(group.names, group.options) for group in groups)
            return TrainingState(param_groups=fresh, global_steps=0, global_samples=0, skipped_steps=0)
        return self.sources[taken if isinstance(taken, int) else -1].catalog.training_state


def _simplest(operation: Combination) -> Combination:
    """The operation, or a copy for a linear merge that takes one source whole: bit for bit, without arithmetic."""
    if isinstance(operation, Linear):
        terms = [(k, weight) for k, weight in operation.terms if weight]
        if len(terms) == 1 and (operation.normalised or terms[0][1] == 1.0):
            return Copied(terms[0][0])
    return operation


def _averaged(name: str, state: str, operation: Combination) -> Combination:
    """The operation that averages a state as its weight is. Raises Unsupported, or BadArgument for negative weights."""
    if not isinstance(operation, (Linear, Copied)):
        raise Unsupported(
            f"'{name}': optimizer states are averaged in linear merges only; take one source's states, or none"
        )
    if isinstance(operation, Linear) and state == "exp_avg_sq" and any(weight < 0 for _, weight in operation.terms):
        raise BadArgument(
            f"'{name}': second moments (exp_avg_sq) can't be averaged with negative weights; merge weights alone"
        )
    return operation


def _identity(merged: MergedTensor) -> str:
    """A digest of everything that decides the tensor's bytes, except its sources' files."""
    told = (merged.name, merged.state, merged.shape, merged.dtype, merged.operation, merged.finite)
    given = [None if each is None else (each.name, each.tensor.dtype) for each in merged.inputs]
    return xxhash.xxh3_128_hexdigest(repr((told, given)).encode())
