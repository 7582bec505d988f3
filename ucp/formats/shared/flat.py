"""What FSDP1 keeps flat: all parameters of a unit as one vector, of which each rank has a part.

A unit is a module that FSDP wraps. Its vector, ``<unit>._flat_param``, has the parameters of the module that are in no
unit further inside, one after the other in the module's order (torch distributed/fsdp/_flat_param.py:
_init_flat_param_and_metadata). With ``use_orig_params``, each begins at a multiple of 16 bytes, and the vector is as
long as a multiple of the number of ranks; what lies between them is 42. Every rank has a chunk of the same length, but
for the last ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ucp.catalog import LogicalTensor
from ucp.errors import DamagedCheckpoint, Mismatch, Unsupported
from ucp.formats.shared.builder import Builder
from ucp.geometry import Blocks, Shape, concat, flat_ranges, numel, row_major
from ucp.storage.dtypes import is_numpy_native, itemsize, numpy_dtype
from ucp.transfer.exact import widen

FLAT = frozenset(("flat_param", "_flat_param"))
_WRAPPED = "_fsdp_wrapped_module."
_ALIGNED_BYTES = 16
_PADDING = 42  # _FLAT_PARAM_PADDING_VALUE
_GAPS_READ = 8  # of each vector


@dataclass(frozen=True)
class FlatMember:
    """A parameter in a flat vector. strides: None if it is row-major."""

    name: str
    shape: Shape
    strides: Shape | None = None


def unwrapped(name: str) -> str:
    """A name without what FSDP1 puts into it."""
    return name.replace(_WRAPPED, "")


def unit_of(name: str) -> str | None:
    """The unit whose flat vector has this name, as the prefix of its parameters' names; None for other names."""
    head, _, last = name.rpartition(".")
    if last not in FLAT:
        return None
    unit = unwrapped(f"{head}.").removesuffix(".")
    return f"{unit}." if unit else ""


def refuse(path: Path | str, names: Iterable[str]) -> None:
    """Raise Unsupported if one of the names is a flat vector's."""
    flat = next((name for name in names if not FLAT.isdisjoint(name.split("."))), None)
    if flat is not None:
        raise Unsupported(
            f"{path}: '{flat}' is FSDP1's flat parameter (LOCAL_STATE_DICT, or a flattened optimizer's), and no file "
            "says which parameters lie where in it; give all parameters' shapes in the module's order with "
            "param_shapes (--param-shapes FILE), or load it into the run's model; or save with SHARDED_STATE_DICT or "
            "FULL_STATE_DICT"
        )


def starts_of(members: Sequence[FlatMember], vector: LogicalTensor) -> list[int] | None:
    """Where in the vector each parameter begins; None if together they don't fill it.

    Aligned ones fill it up to what makes its length a multiple of the number of ranks, all of which have a part of it
    then. Both ways give the same starts where both fit, since padding is never negative.
    """
    length = vector.shape[0]
    for aligned in (1, max(1, _ALIGNED_BYTES // itemsize(vector.dtype))):
        starts, end = [], 0
        for member in members:
            end = -(-end // aligned) * aligned
            starts.append(end)
            end += numel(member.shape)
        ranks = max(1, len(np.unique(vector.blocks.offsets))) if aligned > 1 else 1
        if members and -(-end // ranks) * ranks == length:
            return starts
    return None


def chunks_of(vector: LogicalTensor) -> list[tuple[int, int]]:
    """The ranges of the vector that ranks have, (first, last)."""
    begins, sizes = vector.blocks.offsets[:, 0], vector.blocks.sizes[:, 0]
    return sorted({(int(a), int(a + n)) for a, n in zip(begins, sizes, strict=True)})


def lifted(
    path: Path, key: str, vector: LogicalTensor, members: Sequence[FlatMember]
) -> Iterator[tuple[FlatMember, LogicalTensor]]:
    """Every parameter, out of its vector. Raises DamagedCheckpoint if they don't fill it."""
    starts = starts_of(members, vector)
    if starts is None:
        raise DamagedCheckpoint(f"{path}: '{key}' is not as long as the flat parameter that it belongs to")
    for member, start in zip(members, starts, strict=True):
        yield member, taken(path, vector, start, member)


def taken(path: Path, vector: LogicalTensor, start: int, member: FlatMember) -> LogicalTensor:
    """The parameter that begins at this element of the vector. Raises Unsupported for one with gaps in memory."""
    blocks, count, ndim = vector.blocks, numel(member.shape), len(member.shape)
    order = _memory_order(member, path)
    back = np.argsort(order).astype(np.int64)
    shape = tuple(member.shape[axis] for axis in order)
    lo = np.maximum(blocks.offsets[:, 0], start)
    hi = np.maximum(np.minimum(blocks.offsets[:, 0] + blocks.sizes[:, 0], start + count), lo)
    parts: list[Blocks] = []
    bases: list[Any] = []
    for k in np.flatnonzero(hi > lo).tolist():
        if blocks.sizes[k, 0] > 1 and blocks.strides[k, 0] != 1:
            raise Unsupported(f"{path}: FSDP1's flat parameter of '{member.name}' does not lie in one piece")
        at = int(blocks.starts[k] + lo[k] - blocks.offsets[k, 0])
        found = flat_ranges(shape, [lo[k] - start], [hi[k] - start], [at], [int(blocks.buffers[k])])
        if ndim:
            found = Blocks(
                found.offsets[:, back], found.sizes[:, back], found.starts, found.strides[:, back], found.buffers
            )
        parts.append(found)
        bases.append(np.full(len(found), vector.bases[k], np.int64))
    base = np.concatenate(bases) if bases else np.zeros(0, np.int64)
    return LogicalTensor(member.name, "", tuple(member.shape), vector.dtype, concat(parts, ndim), base)


def _memory_order(member: FlatMember, path: Path) -> list[int]:
    """The parameter's axes from the slowest to the fastest. FSDP1 flattens one that is not row-major (such as
    channels_last) as its memory is."""
    axes, strides = list(range(len(member.shape))), member.strides
    if strides is None or not numel(member.shape):
        return axes
    order = sorted(axes, key=lambda axis: (-strides[axis], axis))
    dense = row_major([member.shape[axis] for axis in order])
    if any(strides[axis] != stride and member.shape[axis] > 1 for axis, stride in zip(order, dense, strict=True)):
        raise Unsupported(f"{path}: '{member.name}' has gaps in memory (strides {list(strides)}) and lies flat")
    return order


def check_padding(path: Path, key: str, vector: LogicalTensor, members: Sequence[FlatMember], builder: Builder) -> None:
    """Raise Mismatch where some of what lies between the parameters is not FSDP1's padding: then their shapes or their
    order are others. At most a few places are read."""
    starts = starts_of(members, vector) or []
    ends = [start + numel(member.shape) for start, member in zip(starts, members, strict=True)]
    gaps = [(a, b) for a, b in zip(ends, [*starts[1:], vector.shape[0]], strict=True) if a < b]
    blocks, begins = vector.blocks, vector.blocks.offsets[:, 0]
    for first, last in [*gaps[: _GAPS_READ - 1], *gaps[-1:]] if len(gaps) > _GAPS_READ else gaps:
        for k in np.flatnonzero((begins < last) & (begins + blocks.sizes[:, 0] > first)).tolist():
            lo, hi = max(first, int(begins[k])), min(last, int(begins[k] + blocks.sizes[k, 0]))
            at = int(vector.bases[k]) + int(blocks.starts[k] + lo - begins[k]) * itemsize(vector.dtype)
            raw = bytearray((hi - lo) * itemsize(vector.dtype))
            builder.read_into(int(blocks.buffers[k]), at, raw)
            found = np.frombuffer(raw, numpy_dtype(vector.dtype))
            values = found if is_numpy_native(vector.dtype) else widen(found, vector.dtype, "float64")
            if not (values == _PADDING).all():
                raise Mismatch(
                    f"{path}: in FSDP1's flat parameter '{key}', elements {lo} to {hi} would be padding, and they are "
                    f"not {_PADDING}; the shapes, or their order, are not those of the model that was saved"
                )
