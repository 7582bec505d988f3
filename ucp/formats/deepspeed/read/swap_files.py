"""Swap files: what ZeRO-Infinity keeps on an NVMe disk, and DeepSpeed's save copies beside the optimizer files.

Source: ``runtime/swap_tensor/optimizer_utils.py`` and ``runtime/engine.py: save_checkpoint``. Each rank has a folder
``offloaded_tensors/rankNN`` (NN is its global rank) with a raw little-endian file for each swapped tensor:
``ID.tensor.swp`` for a subgroup's masters, ``STATE-ID.tensor.swp`` for its states. A file is as long as the tensor,
rounded up. The ``.pt`` file has an empty tensor in its place. Tensors below 1 MiB stay in the ``.pt`` file.

ID is ``FIRST_LAST``: the numbers of the subgroup's first and last parameter. Stage 3 numbers a model's parameters in
their order, from 0, or from any other number where the process had made another engine before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.geometry import Shape, numel
from ucp.parallel.zero import ceil_size
from ucp.storage import locations, names
from ucp.storage.dtypes import itemsize
from ucp.storage.torch_pt.values import TensorRef

FOLDER = "offloaded_tensors"

# Each thread of DeepSpeed's aio takes units of this many bytes (``runtime/swap_tensor/utils.py``).
_ALIGNMENT_BYTES = 1024
_MASTER = re.compile(r"(\d{1,9})_(\d{1,9})\.tensor\.swp")

Id = tuple[int, int]


def bring_back(
    path: Path,
    rank: int,
    state_dict: Mapping[str, Any],
    masters: str,
    groups: Sequence[Mapping[str, Shape]],
    order: Sequence[str],
    dp: int,
) -> Mapping[str, Any]:
    """A rank's optimizer state dict with its swap files' tensors in place of the empty ones.

    Parameters
    ----------
    path: the optimizer file
    masters: the key of the list of flat buffers
    groups: each subgroup's parameters and shapes
    order: the model's parameters, in its order

    Raises DamagedCheckpoint where swap files are missing or of another length, Unsupported where it cannot be told
    which subgroup a file is of.
    """
    flats, base = state_dict.get(masters), state_dict.get("optimizer_state_dict")
    if not isinstance(flats, (list, tuple)) or not isinstance(base, Mapping) or len(flats) != len(groups):
        return state_dict
    if not any(map(_is_empty, flats)):  # as almost always, so that nothing is computed
        return state_dict
    states = base.get("state")
    sizes = [sum(ceil_size(numel(shape), dp) for shape in shapes.values()) for shapes in groups]
    swapped = [s for s, size in enumerate(sizes) if size and _is_empty(flats[s])]
    if not swapped or not isinstance(states, Mapping):
        return state_dict
    folder = path.parent / FOLDER / f"rank{rank:02d}"
    if not locations.is_folder(folder):
        raise DamagedCheckpoint(
            f"{path}: subgroup {swapped[0]} of its masters is empty, as DeepSpeed leaves it where the optimizer is "
            f"offloaded to NVMe, but its swap files ('{FOLDER}/{folder.name}') are not there; they belong to the "
            "checkpoint: copy them, too"
        )
    ids = _ids(path, folder, swapped, groups, order)
    full, filled = list(flats), dict(states)
    for s in swapped:
        name = f"{ids[s][0]}_{ids[s][1]}.tensor.swp"
        full[s] = _ref(folder / name, flats[s].dtype, sizes[s])
        state = states.get(s)
        if isinstance(state, Mapping):
            filled[s] = {
                key: _ref(folder / _state_file(path, key, name), value.dtype, sizes[s]) if _is_empty(value) else value
                for key, value in state.items()
            }
    return {**state_dict, masters: full, "optimizer_state_dict": {**base, "state": filled}}


def _state_file(path: Path, state: Any, of_masters: str) -> str:
    """The name of a state's swap file. The state's name is the checkpoint's, and may not lead elsewhere."""
    return names.entry(f"{state}-{of_masters}", f"{path}: an optimizer state's swap file", DamagedCheckpoint)


def _is_empty(value: Any) -> bool:
    return isinstance(value, TensorRef) and value.shape == (0,)


def _ref(path: Path, dtype: str, count: int) -> TensorRef:
    """The tensor of ``count`` elements that a swap file begins with."""
    try:
        size = locations.stat(path).size
    except OSError as error:
        raise DamagedCheckpoint(
            f"{path}: cannot be read ({error.strerror or error}); it is a swap file that the checkpoint needs"
        ) from error
    wanted = count * itemsize(dtype)
    # Rounded up to whole units for each of the threads, whose number only the writer's config says.
    if size < wanted or size % _ALIGNMENT_BYTES or size - wanted >= max(wanted, 64 * _ALIGNMENT_BYTES):
        raise DamagedCheckpoint(
            f"{path}: has {size} bytes; the tensor that was swapped to it has {wanted}, and its file is that long, "
            f"rounded up to {_ALIGNMENT_BYTES}; it is damaged, truncated, or of another subgroup"
        )
    return TensorRef(str(path), 0, dtype, (count,), (1,), "cpu", (path.name, size // itemsize(dtype)))


def _ids(
    path: Path, folder: Path, swapped: Sequence[int], groups: Sequence[Mapping[str, Shape]], order: Sequence[str]
) -> dict[int, Id]:
    """Which file's id each subgroup has: that of the places of its first and last parameter in the model's order."""
    found = sorted((int(m[1]), int(m[2])) for name in locations.names(folder) if (m := _MASTER.fullmatch(name)))
    place = {name: i for i, name in enumerate(order)}
    wanted: dict[int, Id] = {}
    for s in swapped:
        own = list(groups[s])
        if own[0] not in place or own[-1] not in place:
            raise Unsupported(f"{folder}: '{own[0]}' or '{own[-1]}' is not among the model's parameters")
        wanted[s] = place[own[0]], place[own[-1]]
    first = min(found, default=(0, 0))[0] - min(wanted.values())[0]
    out = {s: (a + first, b + first) for s, (a, b) in wanted.items()}
    if sorted(out.values()) != found:
        raise Unsupported(
            f"{path}: its optimizer is offloaded to NVMe, and '{FOLDER}/{folder.name}' has swap files of the subgroups "
            f"{_text(found)}, where by the model's parameters they would be {_text(sorted(out.values()))}; files are "
            "missing, or which is whose cannot be told"
        )
    return out


def _text(ids: Sequence[Id]) -> str:
    shown = ", ".join(f"{a}_{b}" for a, b in ids[:6])
    return (shown or "none") + (", …" if len(ids) > 6 else "")
