"""A spot check that a stage-1 or -2 checkpoint's files belong together.

Nothing in an optimizer file names the run that wrote it, but the model file holds the same weights, rounded. So a few
elements of every fragment of the masters are compared with them. If most fragments of a file disagree, it comes from
another run or another step. If single parameters disagree, they were changed without the optimizer knowing, and a
warning names them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ucp import limits
from ucp.catalog import LogicalTensor
from ucp.errors import DamagedCheckpoint
from ucp.formats.shared.builder import Builder
from ucp.geometry import row_major
from ucp.printable import logger
from ucp.storage.dtypes import itemsize
from ucp.storage.read_ahead import tell_of
from ucp.storage.rounding import rounds_to
from ucp.storage.torch_pt.values import TensorRef

log = logger(__name__)


def check(builder: Builder, module: Mapping[str, TensorRef]) -> None:
    """Raise DamagedCheckpoint if an optimizer file's masters are not the model file's weights; warn of odd ones."""
    by_file: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for (name, state), tensor in builder.tensors.items():
        if state == "param" and name in module and builder.parameters[name].kind == "parameter":
            for i in range(len(tensor.blocks)):
                by_file[int(tensor.blocks.buffers[i])].append((name, i))
    odd: set[str] = set()
    spots = {
        file: {(n, i): _Spot.of(builder, builder.tensors[n, "param"], i, module[n]) for n, i in _some(fragments)}
        for file, fragments in by_file.items()
    }
    _expect(builder, [spot for own in spots.values() for spot in own.values() if spot is not None])
    for file, own in spots.items():
        verdicts = {of: None if spot is None else spot.agrees(builder) for of, spot in own.items()}
        differ = [name for (name, _), verdict in verdicts.items() if verdict is False]
        agree = sum(verdict is True for verdict in verdicts.values())
        if len(differ) >= limits.SAME_RUN_ENOUGH_COUNT and len(differ) > agree:
            raise DamagedCheckpoint(
                f"{builder.sources[file].path}: {len(differ)} of {len(differ) + agree} fragments of its masters that "
                f"were compared are not the model file's weights ('{differ[0]}', …); files of two runs or of two steps "
                "are mixed"
            )
        odd.update(differ)
    if odd:
        log.warning(
            "the weights of %d parameters ('%s', …) in the model file are not their rounded masters: they were changed "
            "outside the optimizer, and the masters are what is used",
            len(odd),
            min(odd),
        )


def _some(fragments: Sequence[tuple[str, int]]) -> Sequence[tuple[str, int]]:
    return fragments[:: max(1, len(fragments) // limits.SAME_RUN_FRAGMENTS_COUNT)]


class _Spot(NamedTuple):
    """The first elements of one fragment of the masters, and where the model file has the same weights. high, low: the
    file, the first byte, and the element type of either."""

    high: tuple[str, int, str]
    low: tuple[str, int, str]
    elements: int

    @classmethod
    def of(cls, builder: Builder, masters: LogicalTensor, block: int, weight: TensorRef) -> _Spot | None:
        """None if the two cannot be compared."""
        if weight.shape != masters.shape or not weight.is_contiguous:
            return None
        b = masters.blocks
        count = min(limits.SAME_RUN_ELEMENTS_COUNT, int(b.sizes[block, -1]) if b.ndim else 1)
        first = int(np.dot(b.offsets[block], row_major(masters.shape))) if b.ndim else 0
        at = int(masters.bases[block]) + int(b.starts[block]) * itemsize(masters.dtype)
        return cls(
            (builder.sources[int(b.buffers[block])].path, at, masters.dtype),
            (weight.file, weight.offset + first * itemsize(weight.dtype), weight.dtype),
            count,
        )

    def agrees(self, builder: Builder) -> bool | None:
        """Whether the masters, rounded, are the model's weights, bit for bit. None if that tells nothing, since the
        weights are all equal, as those of norms are at first."""
        high, low = (builder.bits(path, at, self.elements, dtype) for path, at, dtype in (self.high, self.low))
        same = rounds_to(high, self.high[2], low, self.low[2])
        return None if same and np.all(low == low[0]) else same


def _expect(builder: Builder, spots: Sequence[_Spot]) -> None:
    """Have the system read all of them at once, if they have to come from a disk."""
    starts: dict[str, list[int]] = defaultdict(list)
    for spot in spots:
        for path, at, _ in (spot.high, spot.low):
            starts[path].append(at)
    for path, own in starts.items():
        tell_of(builder.files, path, own, limits.SAME_RUN_ELEMENTS_COUNT * itemsize("float64"))
