"""Parameters that ranks keep multiplied by a number: an affine map's ``scale``, undone as they are read.

A shard is the weight times s. What the optimizer keeps follows from its arithmetic. Its averages are made of gradients,
and the gradient of what a rank holds is the weight's gradient times how far the weight moves with it:

- A rank holds s times the weight, and the model divides it out. The weight moves 1/s as far, so gradients, and the
  first moment, are 1/s times the weight's, and the second moment is 1/s² times.
- n ranks each hold 1/n of it, and the model adds them up, as a row-parallel layer does with its bias. The weight moves
  just as far as one summand, so gradients and moments are those of the weight.

DeepSpeed's converter knows the first case only (``SCALE_POWER_BY_STATE``) and refuses moments in both, since an update
moves the weight by 1/s times as much as the same learning rate would move a weight that is not multiplied. That is so
here, too: whoever resumes where the scale is another one has to give such parameters the learning rate of the other
run divided by its scale (and in the first case Adam's eps times it). A warning says so.

Numbers are divided in float64 and rounded once. That is exact for powers of two; for other scales it is the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ucp.catalog import ByteSource, Catalog, LogicalTensor, SourceFile
from ucp.errors import Unsupported
from ucp.geometry import Blocks, concat, intersect, packed, take_elements
from ucp.printable import logger
from ucp.spec.places import Placed, Placements
from ucp.storage.dtypes import itemsize
from ucp.storage.files import Files
from ucp.storage.numbers import FLOATS, as_bytes, as_numbers
from ucp.transfer.gather import Reader, Want, gather

log = logger(__name__)

# By which power of the weight's scale a state is multiplied, where the model divides the scale out.
POWERS = {
    "param": 1,
    "exp_avg": -1,
    "momentum_buffer": -1,
    "exp_avg_sq": -2,
    "max_exp_avg_sq": -2,
    "square_avg": -2,
    "sum": -2,
}


@dataclass(frozen=True)
class ScaledElements:
    """A `ucp.catalog.ByteSource`: some blocks of a tensor one after the other, divided by a number. Thread-safe."""

    tensor: LogicalTensor
    blocks: Blocks
    factor: float
    reader: Reader

    def read_into(self, offset: int, parts: Sequence[NDArray[np.uint8]]) -> None:
        """Fill the parts, one after the other, with the bytes from ``offset`` on. Raises what reading raises."""
        width = itemsize(self.tensor.dtype)
        stop = offset + sum(map(len, parts))
        first, last = offset // width, -(-stop // width)
        raw = np.empty((last - first) * width, np.uint8)
        wanted = packed(take_elements(self.blocks, first, last))
        gather(self.reader, [Want(self.tensor, wanted, self.tensor.dtype)], [raw])
        out = as_bytes(as_numbers(raw, self.tensor.dtype) / self.factor, self.tensor.dtype)
        at = offset - first * width
        for part in parts:
            part[:] = out[at : at + len(part)]
            at += len(part)


def undo_scales(catalog: Catalog, placements: Placements, files: Files) -> Catalog:
    """The catalog with the true numbers of all that is kept multiplied.

    Raises Unsupported for optimizer states for which no rule is known, and for elements that are no floating numbers.
    """
    scaled: dict[str, list[Placed]] = {}
    for placed in (placed for places in placements.values() for placed in places if placed.scale != 1):
        scaled.setdefault(placed.name, []).append(placed)
    if not scaled:
        return catalog
    build = _Undoing(catalog, Reader(catalog, files))
    tensors = {key: build.undone(t, scaled[t.name]) if t.name in scaled else t for key, t in catalog.tensors.items()}
    copies = tuple(build.undone(t, scaled[t.name]) if t.name in scaled else t for t in catalog.copies)
    first = next(iter(scaled))
    factors = sorted({placed.scale for places in scaled.values() for placed in places})
    log.warning(
        "%d parameters ('%s', ...) are kept multiplied by %s, as their affine maps say, and were divided by it%s; a "
        "run that does not multiply them needs their learning rate divided by it to go on as this one would have",
        len(scaled),
        first,
        ", ".join(f"{factor:g}" for factor in factors),
        "" if all(math.frexp(f)[0] in (0.5, -0.5) for f in factors) else ", which rounds them",
    )
    return replace(
        catalog,
        files=tuple(build.files),
        tensors=tensors,
        copies=copies,
        computed={**catalog.computed, **build.computed},
    )


class _Undoing:
    """The catalog's files, and those that are computed."""

    def __init__(self, catalog: Catalog, reader: Reader) -> None:
        self.files = list(catalog.files)
        self.computed: dict[int, ByteSource] = {}
        self._reader = reader

    def undone(self, tensor: LogicalTensor, scaled: Iterable[Placed]) -> LogicalTensor:
        """One tensor with its scaled parts as computed ones."""
        factors = np.ones(len(tensor.blocks))
        for placed in scaled:
            found = intersect(placed.blocks, tensor.blocks)
            factors[found.target] = _factor(placed, tensor)
        same = factors == 1
        if same.all():
            return tensor
        blocks, bases = [tensor.blocks.take(same)], [tensor.bases[same]]
        for factor in np.unique(factors[~same]).tolist():
            held = tensor.blocks.take(factors == factor)
            new = packed(held)
            count, index = int(held.counts.sum()), len(self.files)
            size = count * itemsize(tensor.dtype)
            self.files.append(SourceFile(f"({tensor.name}, {tensor.state}, divided by {factor:g})", size, 0))
            whole = replace(tensor, blocks=held, bases=tensor.bases[factors == factor])
            self.computed[index] = ScaledElements(whole, held, factor, self._reader)
            blocks.append(Blocks(new.offsets, new.sizes, new.starts, new.strides, np.full(len(new), index)))
            bases.append(np.zeros(len(new), np.int64))
        return replace(tensor, blocks=concat(blocks, len(tensor.shape)), bases=np.concatenate(bases), digest=None)


def _factor(placed: Placed, tensor: LogicalTensor) -> float:
    """What a state is multiplied by in the ranks' files."""
    power = POWERS.get(tensor.state)
    if power is None or tensor.dtype not in FLOATS:
        raise Unsupported(
            f"'{tensor.name}' is kept multiplied by {placed.scale:g}, and nothing says what that makes of its state "
            f"'{tensor.state}' ({tensor.dtype}); known are {', '.join(map(repr, POWERS))}"
        )
    return float(placed.scale**power) if power == 1 or not placed.summed else 1.0
