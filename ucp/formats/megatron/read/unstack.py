"""Tensors that hold several parameters, taken apart along their first axes, and those saved in parts, put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ucp.catalog import LogicalTensor
from ucp.errors import DamagedCheckpoint
from ucp.formats.megatron.keys import Stack
from ucp.geometry import Blocks, concat, numel


def unstacked(tensor: LogicalTensor, stack: Stack, state: str) -> Iterator[LogicalTensor]:
    """Each parameter of a stacked tensor.

    Raises DamagedCheckpoint for a tensor of too few dimensions, and for parameters of which nothing is there.
    """
    lead = len(stack.axes)
    if lead == 0:
        yield replace(tensor, name=stack.name(), state=state)
        return
    if len(tensor.shape) < lead:
        raise DamagedCheckpoint(
            f"'{tensor.name}' has {len(tensor.shape)} dimensions, and the first should count {' and '.join(stack.axes)}"
        )
    counts, shape = tensor.shape[:lead], tensor.shape[lead:]
    blocks, bases, which = _apart(tensor, counts)
    if numel(counts) > len(which) or not numel(shape):
        wanted = " by ".join(f"{count} {axis}" for count, axis in zip(counts, stack.axes, strict=True))
        raise DamagedCheckpoint(
            f"'{tensor.name}' should hold {wanted}, and there are chunks of {len(np.unique(which))} of them; files are "
            "missing"
        )
    order = np.argsort(which, kind="stable")
    ends = np.cumsum(np.bincount(which, minlength=numel(counts)))
    for index, members in enumerate(np.split(order, ends[:-1])):
        at = tuple(int(i) for i in np.unravel_index(index, counts))
        yield LogicalTensor(stack.name(*at), state, shape, tensor.dtype, blocks.take(members), bases[members])


def _apart(tensor: LogicalTensor, counts: Sequence[int]) -> tuple[Blocks, np.ndarray, np.ndarray]:
    """The tensor's blocks cut at every step of its first axes: without these axes, their bases, and where they were."""
    b, lead = tensor.blocks, len(counts)
    times = b.sizes[:, :lead].prod(axis=1)
    source = np.repeat(np.arange(len(b)), times)
    step = np.arange(len(source)) - np.repeat(np.cumsum(times) - times, times)
    at = np.empty((len(source), lead), np.int64)
    for axis in range(lead - 1, -1, -1):
        step, at[:, axis] = np.divmod(step, b.sizes[source, axis])
    starts = b.starts[source] + (at * b.strides[source, :lead]).sum(axis=1)
    at += b.offsets[source, :lead]
    inside = np.ones(len(source), bool)
    for axis, count in enumerate(counts):
        inside &= (at[:, axis] >= 0) & (at[:, axis] < count)
    if not inside.all():
        raise DamagedCheckpoint(f"'{tensor.name}': a chunk lies outside its shape {list(tensor.shape)}")
    blocks = Blocks(
        b.offsets[source, lead:], b.sizes[source, lead:], starts, b.strides[source, lead:], b.buffers[source]
    )
    which = np.zeros(len(source), np.int64)
    for axis, count in enumerate(counts):
        which = which * count + at[:, axis]
    return blocks, tensor.bases[source], which


def joined(name: str, lead: int, parts: Sequence[LogicalTensor]) -> LogicalTensor:
    """Tensors one after the other along the first axis that counts no layers or experts, ``lead``.

    Raises DamagedCheckpoint where they don't fit together.
    """
    first = parts[0]
    shapes = {part.shape[:lead] + part.shape[lead + 1 :] for part in parts}
    if len(shapes) > 1 or len(first.shape) <= lead or len({part.dtype for part in parts}) > 1:
        raise DamagedCheckpoint(
            f"'{name}' is saved in {len(parts)} parts that don't fit together: "
            + ", ".join(f"{part.dtype} {list(part.shape)}" for part in parts)
        )
    moved, at = [], 0
    for part in parts:
        offsets = part.blocks.offsets.copy()
        offsets[:, lead] += at
        moved.append(replace(part.blocks, offsets=offsets))
        at += part.shape[lead]
    shape = (*first.shape[:lead], at, *first.shape[lead + 1 :])
    bases = np.concatenate([part.bases for part in parts])
    return LogicalTensor(name, first.state, shape, first.dtype, concat(moved, len(shape)), bases)
