"""Where local tensors lie in the logical ones, whoever says so: a spec, or nobody where only ZeRO cuts tensors.

Reading what specs say takes as long to import as all else. So this stands apart: most checkpoints need no spec.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ucp.geometry import Blocks, Shape, whole
from ucp.parallel.mesh import Coordinate


@dataclass(frozen=True)
class Placed:
    """A local tensor's part of one logical tensor.

    name, shape: the logical tensor's.
    blocks: its boxes, at their places in the local tensor's row-major order.
    padding: whether this is the padding of a parameter.
    average: whether the parameter is the average of its copies.
    scale: what the weights are multiplied by in the local tensor (an affine map's ``scale``).
    summed: whether the model adds the copies up, each of which is multiplied by ``scale``.
    """

    name: str
    shape: Shape
    blocks: Blocks
    padding: bool = False
    average: bool = False
    scale: float = 1.0
    summed: bool = False


# Names of tensors that are states of others -> (that parameter, the state's name).
Factors = Mapping[str, tuple[str, str]]
NO_FACTORS: Factors = {}

# Local names and shapes of every part of the model, and where each of these tensors lies.
Parts = Mapping[Coordinate, Mapping[str, Shape]]
Placements = Mapping[tuple[Coordinate, str], tuple[Placed, ...]]


def padding_name(name: str) -> str:
    """The name of a parameter's padding in a catalog."""
    return f"{name}[padding]"


def uncut(parts: Parts) -> Placements:
    """Every local tensor as a logical one: only ZeRO cuts tensors, and each pipeline stage holds some of the names."""
    return {
        (at, name): (Placed(name, shape, _whole(shape)),) for at, held in parts.items() for name, shape in held.items()
    }


@lru_cache(maxsize=1 << 12)
def _whole(shape: Shape) -> Blocks:
    """Like `whole`, but cached: a training run asks for the same blocks at every save."""
    return whole(shape)


def held_first(
    placements: Placements, apart: Collection[str] = ()
) -> dict[tuple[Coordinate, str], tuple[NDArray[np.bool_], ...]]:
    """For every local tensor and each of its places, which of the boxes no earlier coordinate holds.

    apart: names of which every rank holds only parts of its own, whatever its placement says.

    What several parts hold in common is read from the first of them, and written by it. Coordinates are ordered by
    stage, then by tensor-parallel rank, then by expert-parallel rank.
    """
    seen: dict[str, set[tuple[int, ...]]] = {}
    out: dict[tuple[Coordinate, str], tuple[NDArray[np.bool_], ...]] = {}
    for key in sorted(placements, key=lambda key: (key[0].pp, key[0].tp, key[0].ep)):
        masks = []
        for placed in placements[key]:
            known, blocks = seen.setdefault(placed.name, set()), placed.blocks
            boxes = [tuple(row) for row in np.concatenate([blocks.offsets, blocks.sizes], axis=1).tolist()]
            masks.append(np.array([key[1] in apart or box not in known for box in boxes], bool))
            known.update(boxes)
        out[key] = tuple(masks)
    return out
