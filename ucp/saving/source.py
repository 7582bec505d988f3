"""What a live training process offers to be saved: the nouns between a framework's engine and the saver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ucp.catalog import ParameterInfo, TrainingState
from ucp.geometry import Blocks, Shape
from ucp.parallel.mesh import Layout
from ucp.saving.late import LateNumbers

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Holding:
    """What this rank holds of one logical tensor.

    tensor: the memory, on any device. It is read as one flat row-major buffer. blocks: which elements these are, and
    where they lie in it, in elements. holders: the global ranks that hold exactly these elements, with the same values,
    in ascending order. They share the work of writing them, so all of them have to list what they hold together in the
    same order. volatile: it may also change in forward or backward, and not only in the optimizer's step.
    """

    name: str
    state: str
    shape: Shape
    dtype: str
    tensor: torch.Tensor
    blocks: Blocks
    holders: tuple[int, ...]
    volatile: bool = False


@dataclass(frozen=True, eq=False)
class Source:
    """The training state of one rank.

    parameters: all parameters of the model, the same on every rank. holdings: every tensor of every parameter; one
    without blocks if this rank has none of its elements. training_state: the first rank's is saved. own: plain values
    that only this rank knows, such as its RNG's state. late: numbers of parameters that ``parameters`` lacks, since a
    device may not have computed them yet; only a save in the background takes such a source.
    """

    layout: Layout
    parameters: Mapping[str, ParameterInfo]
    holdings: Sequence[Holding]
    training_state: TrainingState
    own: Mapping[str, Any] = field(default_factory=dict)
    late: LateNumbers | None = None
