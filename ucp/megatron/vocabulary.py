"""A vocabulary that the checkpoint's run padded otherwise than this one: rows of padding are left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ucp.catalog import Catalog, LogicalTensor
from ucp.errors import BadArgument
from ucp.formats.megatron import keys
from ucp.megatron.source import Told


def without_padding(catalog: Catalog, told: Told, rows: int) -> Catalog:
    """The catalog in which tensors that are padded otherwise here have only their real rows.

    rows: how many these are. Raises BadArgument where it is no such number.
    """
    tensors = dict(catalog.tensors)
    parameters = dict(catalog.parameters)
    for name in told.states:
        info = parameters.get(name)
        fact = told.by_key.get((name, keys.WEIGHT), {})
        live = next(iter(fact.values()), None)
        if info is None or live is None or not live.flexible or not info.shape or info.shape[0] == live.shape[0]:
            continue
        if not 0 < rows <= min(info.shape[0], live.shape[0]):
            raise BadArgument(
                f"vocab_size={rows}: '{name}' has {info.shape[0]} rows in the checkpoint and {live.shape[0]} here; it "
                "has to be the number of rows that both have and that are no padding"
            )
        shape = (rows, *info.shape[1:])
        parameters[name] = replace(info, shape=shape)
        for state in info.states:
            tensors[name, state] = _cut(tensors[name, state], rows)
    return replace(catalog, tensors=tensors, parameters=parameters)


def _cut(tensor: LogicalTensor, rows: int) -> LogicalTensor:
    keep = tensor.blocks.offsets[:, 0] < rows
    blocks = tensor.blocks.take(keep)
    sizes = blocks.sizes.copy()
    sizes[:, 0] = np.minimum(sizes[:, 0], rows - blocks.offsets[:, 0])
    shape = (rows, *tensor.shape[1:])
    return replace(tensor, shape=shape, blocks=replace(blocks, sizes=sizes), bases=tensor.bases[keep], digest=None)
