"""A checkpoint's fragments as affine maps, as DeepSpeed's planner takes them (``checkpoint/affine_transfer.py``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ucp import checkpoint
from ucp.catalog import Catalog, LogicalTensor
from ucp.checkpoint import Checkpoint
from ucp.errors import BadArgument, Unsupported
from ucp.formats.shared import affine_maps


def affine_map(source: Checkpoint | str | os.PathLike[str], state: str = "param") -> dict[str, Any]:
    """The affine maps of one state of all parameters: which piece of which file is which box of which tensor.

    Parameters
    ----------
    source
        An open checkpoint, or the path of one. It may have any format and layout, ZeRO's flat buffers included.
    state
        The state, such as ``exp_avg``. Parameters without it are left out.

    Returns
    -------
    dict
        ``{"version": 1, "params": {pattern: map}}``, as under ``affine_map`` of DeepSpeed's
        ``universal_checkpoint_info``. ``ParamAffineMap.from_dict`` reads each map. Its "ranks" are the fragments, one
        box each. Beside them, ``holders`` says where a fragment's elements lie: ``file``, ``dtype``, the byte
        ``offset`` of the first one, and the ``strides``, in elements, of a view with the fragment's shape.

    Raises
    ------
    BadArgument
        No parameter has the state.
    Unsupported
        A tensor is computed and lies in no file.
    UcpError
        What `ucp.open` raises.
    """
    if not isinstance(source, Checkpoint):
        with checkpoint.open(Path(source) if isinstance(source, os.PathLike) else source) as opened:
            return affine_map(opened, state)
    catalog = source.catalog
    found = {name: tensor for (name, kept), tensor in catalog.tensors.items() if kept == state}
    if not found:
        raise BadArgument(f"{source.path}: no parameter has the state '{state}'")
    paths = [file.path for file in catalog.files]
    maps = {name: affine_maps.lowered(_on_disk(tensor, catalog), paths) for name, tensor in found.items()}
    return dict(affine_maps.info(maps)["affine_map"])


def _on_disk(tensor: LogicalTensor, catalog: Catalog) -> LogicalTensor:
    if set(tensor.blocks.buffers.tolist()) & set(catalog.computed):
        raise Unsupported(
            f"'{tensor.name}' ({tensor.state}) is computed as it is read, and lies in no file that a map could name; "
            "convert the checkpoint first"
        )
    return tensor
