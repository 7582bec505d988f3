"""A checkpoint's model-parallel ranks, each by itself, to draft a spec for them and to check one.

A draft says what the checkpoint shows, and marks the rest as unknown. A check merges the ranks' weights by the spec,
and cuts them again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ucp import formats
from ucp.checkpoint import Checkpoint, open_apart
from ucp.errors import Mismatch
from ucp.geometry import Shape, numel
from ucp.parallel.mesh import Coordinate, Layout
from ucp.spec import shipped
from ucp.spec.bound import Bound
from ucp.spec.check import Report, check_names, cut, merge
from ucp.spec.evaluate import Cutting, shape_of, shard
from ucp.spec.grammar import Expression
from ucp.spec.infer import draft
from ucp.spec.resolve import name_of_shard, shard_of
from ucp.spec.solve import Observed, solve_cuts

if TYPE_CHECKING:
    import torch


class Shards:
    """An open checkpoint's local tensors. A context manager.

    layout: the ranks. parts: names and shapes by coordinate. buffers: names. tied: other name -> parameter. info:
    DeepSpeed's ``universal_checkpoint_info``; config: the model's; each None where the checkpoint has none. captures:
    as `draft` takes them.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.layout: Layout = checkpoint.layout
        self.parts: dict[Coordinate, dict[str, Shape]] = {}
        self.buffers: set[str] = set()
        self.tied: dict[str, str] = {}
        self.info: Any = None
        self.config: Mapping[str, Any] | None = None
        self.captures: Sequence[tuple[str, str]] = ()
        known = formats.named(checkpoint.format)
        facts = None if known is None else known.model_facts(checkpoint.path)
        self._is_apart = facts is not None
        for info in checkpoint.parameters.values():
            at, name = shard_of(info.name) if self._is_apart else (Coordinate(), info.name)
            self.parts.setdefault(at, {})[name] = info.shape
            self.tied.update(dict.fromkeys(info.aliases, name))
            if info.kind == "buffer":
                self.buffers.add(name)
        if facts is not None:
            self.info, self.config, self.captures = facts.info, facts.config, facts.captures

    def __enter__(self) -> Shards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._checkpoint.close()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for held in self.parts.values() for name in held))

    @property
    def path(self) -> Path:
        return self._checkpoint.path

    def read(self, at: Coordinate, name: str) -> NDArray:
        """A rank's weights: their bits, as whole numbers of their width."""
        return bits(self.tensor(at, name))

    def tensor(self, at: Coordinate, name: str) -> torch.Tensor:
        """A rank's weights."""
        return self._checkpoint.read(name_of_shard(at, name) if self._is_apart else name)

    def tensors(self, name: str) -> dict[int, torch.Tensor]:
        """As `slices`, but the weights themselves."""
        return {at.tp: self.tensor(at, name) for at in self._holders(name)}

    def _holders(self, name: str) -> list[Coordinate]:
        """The first stage that has the parameter, for each tensor-parallel rank."""
        first: dict[int, Coordinate] = {}
        for at in sorted(self.parts):
            if name in self.parts[at]:
                first.setdefault(at.tp, at)
        return list(first.values())

    def slices(self, name: str) -> dict[int, NDArray]:
        """A parameter's weights on every tensor-parallel rank, each from the first stage that has it."""
        return {at.tp: self.read(at, name) for at in self._holders(name)}


def bits(tensor: torch.Tensor) -> NDArray:
    """The bits of its elements, as whole numbers of their width."""
    import torch

    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(width).numpy() if numel(tensor.shape) else np.zeros(tuple(tensor.shape), np.uint8)


def open_shards(path: str | os.PathLike[str], tag: str | int | None = None) -> Shards:
    """Arguments and errors as for `ucp.open`."""
    return Shards(open_apart(path, tag))


def draft_spec(shards: Shards) -> str:
    """The text of a spec for this checkpoint. What the checkpoint does not show is marked as unknown."""
    contents = {}
    if shards.layout.tp > 1 and shards.info is None:
        contents = {name: _contents(list(shards.slices(name).values())) for name in shards.names}
    source = "its universal_checkpoint_info" if shards.info is not None else "names, shapes and contents alone"
    head = [f"Drafted for a checkpoint of {shards.layout} from {source}."]
    if shards.layout.tp == 1:
        head.append(
            "No tensor-parallel ranks have cut it: every parameter is whole here. Write /tp where it may be cut."
        )
    head += [f"The catalogue's spec '{name}' has lines for all of its names." for name in _fitting(shards)]
    model = str((shards.config or {}).get("model_type") or "drafted")
    return draft(
        shards.info,
        shards.parts,
        shards.layout,
        shards.buffers,
        shards.captures,
        model=model,
        head=head,
        contents=contents,
        tied=shards.tied,
    )


def _contents(slices: list[NDArray]) -> str:
    first = slices[0]
    if any(s.shape != first.shape or not np.array_equal(s, first) for s in slices[1:]):
        return "differ"
    return "equal" if first.size and (first != first.flat[0]).any() else "constant"


def _fitting(shards: Shards) -> list[str]:
    """The catalogue's specs that have a line for every parameter."""
    names = [name for name in shards.names if name not in shards.buffers]
    specs = {spec: shipped.find(spec) for spec in shipped.names()}
    return [
        spec
        for spec in specs
        if all(any(line.pattern.match(name) is not None for line in specs[spec].lines) for name in names)
    ]


@dataclass(frozen=True)
class ShardReport:
    """report: what names and whole shapes show. merged: how many parameters' shards were merged and cut again. copies:
    for how many of these several ranks hold the same elements, equal bit for bit."""

    report: Report
    merged: int
    copies: int


def check_spec(bound: Bound, shards: Shards) -> ShardReport:
    """Check a spec against all weights of a checkpoint.

    Raises SpecError and Mismatch at the first shard that contradicts it.
    """
    local = {name: shape for held in shards.parts.values() for name, shape in held.items()}
    if shards.layout.tp == 1:
        return ShardReport(check_names(bound, local, shards.buffers, shards.tied), 0, 0)
    expressions, cuttings = solved(bound, shards)
    whole = {name: shape_of(e, bound.sizes, cuttings[name].padded) for name, e in expressions.items()}
    report = check_names(bound, {**local, **whole}, shards.buffers, shards.tied)
    if report.problems:
        return ShardReport(report, 0, 0)
    copies = 0
    for name, expression in expressions.items():
        if expression.average is not None:
            continue  # its copies may differ
        slices = [({"tp": rank}, array) for rank, array in shards.slices(name).items()]
        tensor = merge(expression, bound.sizes, cuttings[name], slices, name)
        held = [_cut_again(expression, bound, cuttings[name], tensor, at, array, name) for at, array in slices]
        copies += sum(held) > tensor.size
    return ShardReport(report, len(expressions), copies)


def solved(bound: Bound, shards: Shards) -> tuple[dict[str, Expression], dict[str, Cutting]]:
    """What the spec says about every parameter for which it has a line, and how all of these are cut, by the shapes of
    all ranks.

    Raises SpecError if shapes contradict the spec, or do not decide a cut.
    """
    expressions = {name: found.expression for name in shards.names if (found := bound.find(name)) is not None}
    observed = [
        Observed(name, e, [(at._asdict(), held[name]) for at, held in shards.parts.items() if name in held])
        for name, e in expressions.items()
    ]
    return expressions, solve_cuts(observed, bound.sizes, {"tp": shards.layout.tp})


def _cut_again(
    expression: Expression,
    bound: Bound,
    cutting: Cutting,
    tensor: NDArray,
    at: Mapping[str, int],
    own: NDArray,
    name: str,
) -> int:
    """Cut a rank's part from the whole. Returns how many elements it has. Raises Mismatch if the rank had others."""
    again = cut(expression, bound.sizes, cutting, tensor, at, np.invert(own))
    count = int(shard(expression, bound.sizes, cutting, at).blocks.sizes.prod(axis=1).sum())
    if int((again == own).sum()) != count:
        raise Mismatch(
            f"{expression.source.position}: '{name}', merged and cut again, is another on tp rank {at['tp']}"
        )
    return count
