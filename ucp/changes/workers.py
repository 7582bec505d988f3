"""Another number of workers for a run of local SGD (DiLoCo and its like), whose workers train apart between syncs.

Such a checkpoint (`ucp.torchdist.local_sgd`) has the global copy of the weights under the parameters' names, and under
``workers.`` what each worker has of its own, along a first axis that counts workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ucp.catalog import LogicalTensor, ParameterInfo
from ucp.changes.build import PARAM, Build
from ucp.errors import Mismatch, Unsupported
from ucp.geometry import Blocks, Shape, box, concat, restrict
from ucp.merging.computed import Input, MergedTensor, equal
from ucp.merging.operations import Linear
from ucp.spec.changes import AVERAGED, COPIED, KEPT, RESET
from ucp.storage.numbers import FLOATS

WORKERS = "workers."
"""What the names of tensors begin with that each worker has of its own."""
WEIGHTS = f"{WORKERS}model."


def rearranged(build: Build, how: str, count: int) -> list[str]:
    """Give a checkpoint another number of workers. One that has this number stays as it is. Returns what was changed.

    how: 'kept' (each keeps what it had, for fewer workers), 'averaged' (all get the mean), 'copied' (new ones get what
    the first ones have, in turn) or 'reset' (all begin from the global copy, with states of zero).

    Raises Unsupported for a checkpoint without workers or with more than one number of them, Mismatch where a choice
    does not fit it.
    """
    infos = [info for name, info in build.catalog.parameters.items() if name.startswith(WORKERS)]
    had = {info.shape[0] if info.shape else 0 for info in infos}
    if len(had) != 1 or had == {0}:
        raise Unsupported(
            "workers: the checkpoint has no tensors of workers of local SGD (named 'workers.…', one row for each)"
            if not infos
            else f"workers: the tensors of workers have different numbers of rows, {sorted(had)}; they are of two runs"
        )
    (before,) = had
    if before == count:
        return []
    if how == KEPT and count > before:
        raise Mismatch(
            f"workers: {count} workers cannot keep what {before} had; say what the new ones begin with: '{COPIED}', "
            f"'{AVERAGED}' or '{RESET}'"
        )
    build.put([(replace(info, shape=(count, *info.shape[1:])), _tensors(build, info, how, count)) for info in infos])
    said = {
        KEPT: f"the first {count} of {before} keep what they had, and the others' states are left out",
        COPIED: f"{count} have copies of what {before} had, in turn",
        AVERAGED: f"{count} have the mean of what {before} had, in float64, rounded once",
        RESET: f"{count} in place of {before} begin from the global copy, with optimizer states of zero",
    }
    return [f"workers: {said[how]}"]


def _tensors(build: Build, info: ParameterInfo, how: str, count: int) -> list[LogicalTensor]:
    before, shape = info.shape[0], info.shape[1:]
    out = []
    for tensor in build.tensors_of(info):
        if how == RESET:
            rows = [_fresh(build, tensor, shape)] * count
        elif how == AVERAGED:
            rows = [_mean(build, [_row(tensor, k) for k in range(before)])] * count
        else:
            rows = [_row(tensor, k % before) for k in range(count)]
        out.append(_stacked(tensor, rows))
    return out


def _row(tensor: LogicalTensor, number: int) -> LogicalTensor:
    """What one worker has."""
    shape = tensor.shape[1:]
    outer = box([number] + [0] * len(shape), (1, *shape))
    blocks, index = restrict(tensor.blocks, outer, (1, *shape))
    alone = Blocks(blocks.offsets[:, 1:], blocks.sizes[:, 1:], blocks.starts, blocks.strides[:, 1:], blocks.buffers)
    return replace(tensor, shape=shape, blocks=alone, bases=tensor.bases[index], digest=None)


def _stacked(tensor: LogicalTensor, rows: Sequence[LogicalTensor]) -> LogicalTensor:
    """One tensor of these rows."""
    shape = (len(rows), *rows[0].shape)
    blocks = [_along_workers(row.blocks, k) for k, row in enumerate(rows)]
    return replace(
        tensor,
        shape=shape,
        dtype=rows[0].dtype,
        blocks=concat(blocks, len(shape)),
        bases=np.concatenate([row.bases for row in rows]),
        digest=None,
    )


def _along_workers(blocks: Blocks, number: int) -> Blocks:
    one = np.ones((len(blocks), 1), np.int64)
    return Blocks(
        np.hstack([one * number, blocks.offsets]),
        np.hstack([one, blocks.sizes]),
        blocks.starts,
        np.hstack([one, blocks.strides]),
        blocks.buffers,
    )


def _mean(build: Build, rows: Sequence[LogicalTensor]) -> LogicalTensor:
    first = rows[0]
    inputs = [Input(f"worker {k}", row, build.reader()) for k, row in enumerate(rows)]
    if first.dtype not in FLOATS:
        if not all(equal(inputs[0], other) for other in inputs[1:]):
            raise Mismatch(
                f"workers: '{first.name}' is {first.dtype}, and the workers have different values, which have no mean; "
                f"choose '{COPIED}' or '{RESET}'"
            )
        return first
    linear = Linear(tuple((k, 1.0) for k in range(len(rows))), normalised=True)
    source = MergedTensor(first.name, first.state, first.shape, first.dtype, linear, inputs, finite=False)
    return build.computed(first.name, first.state, first.shape, first.dtype, source, "mean of workers")


def _fresh(build: Build, tensor: LogicalTensor, shape: Shape) -> LogicalTensor:
    if not tensor.name.startswith(WEIGHTS):
        return build.zeros(tensor.name, tensor.state, shape, tensor.dtype)
    name = tensor.name.removeprefix(WEIGHTS)
    copy = build.catalog.tensors.get((name, PARAM))
    if copy is None or (copy.shape, copy.dtype) != (shape, tensor.dtype):
        raise Mismatch(
            f"workers: '{tensor.name}' has no global copy to begin from ('{name}'); choose '{COPIED}' or '{AVERAGED}'"
        )
    return copy
