"""Where exactly fragments leave holes in a tensor, or overlap."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from ucp import limits
from ucp.geometry import Blocks, CoverageFault, Shape, coverage_fault


@dataclass(frozen=True)
class Gap:
    """The first box that is held ``times`` times (0: a hole). elements: how many all such boxes of the tensor have.
    times: the largest number among them."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    elements: int
    times: int

    @property
    def box(self) -> str:
        """``[0:4, 7:9]``"""
        spans = (f"{o}:{o + n}" for o, n in zip(self.offsets, self.sizes, strict=True))
        return f"[{', '.join(spans)}]"


def faults(shape: Shape, blocks: Blocks) -> tuple[Gap | None, Gap | None, CoverageFault | None]:
    """The first hole and the first overlap, or None; and what `coverage_fault` says.

    Exact: the boxes' edges cut the tensor into cells, in each of which the number of boxes is the same everywhere.
    """
    fault = coverage_fault(shape, blocks)
    if fault is None or fault.kind == "outside" or not shape:
        return None, None, fault
    edges = [
        np.unique(np.concatenate([[0, n], blocks.offsets[:, k], blocks.offsets[:, k] + blocks.sizes[:, k]]))
        for k, n in enumerate(shape)
    ]
    if np.prod([float(len(e)) for e in edges]) > limits.COVERAGE_CELLS_COUNT:
        return None, None, fault
    # How many boxes begin minus how many end at each corner, summed along every axis.
    held = np.zeros([len(e) for e in edges], np.int64)
    low = [np.searchsorted(e, blocks.offsets[:, k]) for k, e in enumerate(edges)]
    high = [np.searchsorted(e, blocks.offsets[:, k] + blocks.sizes[:, k]) for k, e in enumerate(edges)]
    for corner in product((0, 1), repeat=len(shape)):
        index = tuple(high[k] if end else low[k] for k, end in enumerate(corner))
        np.add.at(held, index, (-1) ** sum(corner))
    for k in range(len(shape)):
        held = np.cumsum(held, axis=k)
    held = held[tuple(slice(0, -1) for _ in shape)]
    volumes = np.ones(held.shape, np.int64)
    for k, e in enumerate(edges):
        volumes *= np.diff(e).reshape([-1 if j == k else 1 for j in range(len(shape))])
    return _gap(held == 0, held, volumes, edges), _gap(held > 1, held, volumes, edges), fault


def _gap(mask: np.ndarray, held: np.ndarray, volumes: np.ndarray, edges: list[np.ndarray]) -> Gap | None:
    mask = mask & (volumes > 0)
    if not mask.any():
        return None
    cell = np.unravel_index(int(np.argmax(mask)), mask.shape)
    return Gap(
        tuple(int(e[i]) for e, i in zip(edges, cell, strict=True)),
        tuple(int(e[i + 1] - e[i]) for e, i in zip(edges, cell, strict=True)),
        int(volumes[mask].sum()),
        int(held[mask].max()),
    )
