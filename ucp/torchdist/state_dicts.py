"""State dicts of torch.distributed: their entries by flat name, and putting values back where they came from.

Flat names are those of torch.distributed.checkpoint (its ``_nested_dict.py``): the keys that lead to an entry, joined
by dots. Mappings are followed, and so are lists and tuples with tensors or mappings in them. All else is one value.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

import torch

from ucp.columns import made_of
from ucp.errors import BadArgument, Unsupported
from ucp.formats.shared.roles import StateEntry
from ucp.geometry import Shape, row_major
from ucp.storage.dtypes import from_torch, to_safetensors
from ucp.torchdist.dtensors import is_dtensor, local_tensor


def is_stateful(value: Any) -> bool:
    """Whether this has the methods that torch.distributed.checkpoint.stateful.Stateful asks for. Importing that takes
    seconds, which a program without DTensors has no use for."""
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with each Stateful object replaced by its own state dict. Collective if theirs is."""
    if not isinstance(state_dict, Mapping):
        raise BadArgument(f"a state dict is a mapping of names to values, found {type(state_dict).__name__}")
    return {
        key: value.state_dict() if is_stateful(value) else value
        for key, value in sorted(state_dict.items(), key=lambda item: str(item[0]))
    }


@torch.no_grad()  # once for all tensors, not for each
def flatten(state_dict: Mapping[str, Any]) -> dict[str, StateEntry]:
    """All entries by flat name; tensors are checked (`check_tensor`).

    Raises Unsupported for two entries of one flat name, and for tensors that cannot be kept.
    """
    leaves: list[_Leaf] = []
    _add_leaves(leaves, "", (), state_dict)
    kinds = set(map(type, map(itemgetter(2), leaves)))
    if any(issubclass(kind, torch.Tensor) and kind not in _PLAIN for kind in kinds):
        leaves = [part for leaf in leaves for part in _parts(leaf)]
    if not leaves:
        return {}
    keys, paths, values = zip(*leaves, strict=True)
    tensors = {k: value for k, value in enumerate(values) if isinstance(value, torch.Tensor)}
    _check_all(keys, tensors)
    known: dict[torch.Size, Shape] = {}
    shapes: list[Shape | None] = [None] * len(leaves)
    for k, tensor in tensors.items():
        size = tensor.shape
        shapes[k] = known.get(size) or known.setdefault(size, tuple(size))
    out = dict(zip(keys, made_of(StateEntry, len(leaves), paths, shapes, values), strict=True))
    if len(out) < len(leaves):
        twice = next(key for key, times in Counter(keys).items() if times > 1)
        raise Unsupported(f"two entries of the state dict have the flat name '{twice}'; rename one")
    return out


def is_in_parts(tensor: torch.Tensor) -> bool:
    """Whether it is one of torchao's quantised optimizer states, a tensor subclass that is made of plain tensors."""
    kind = type(local_tensor(tensor))
    if kind is torch.Tensor:
        return False
    return kind.__module__.startswith("torchao.optim.") and hasattr(kind, "__tensor_flatten__")


def parts_of(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain tensors that a quantised state is made of, by name, in the memory of the state itself.

    Codes lie as the state does. There is one scale for each block of elements in the flat order of what a rank holds.
    So a sharded state's blocks are those of the whole state if it is cut into equal rows.

    Raises Unsupported, naming the entry, where a cut is not on the blocks' boundaries.
    """
    local: Any = local_tensor(tensor)
    parts = {name: getattr(local, name) for name in local.__tensor_flatten__()[0]}
    if not is_dtensor(tensor):
        return parts
    mesh, placements = tensor.device_mesh, tensor.placements
    cut = [mesh.size(k) for k, placement in enumerate(placements) if not placement.is_replicate()]
    if any(not (p.is_replicate() or p.is_shard(0)) for p in placements) or tensor.shape[0] % math.prod(cut):
        raise Unsupported(
            f"'{key}' is quantised in blocks of {local.block_size} elements, and {list(tensor.shape)} is cut as "
            f"{tuple(placements)} into unequal rows, so blocks of one layout are not those of another: "
            "use a number of ranks that divides the rows"
        )
    from torch.distributed.tensor import DTensor

    out = {}
    for name, part in parts.items():
        if name == "qmap":
            out[name] = part
            continue
        shape = tensor.shape if part.shape == local.shape else (part.shape[0] * math.prod(cut), *part.shape[1:])
        stride = row_major(tuple(shape))
        out[name] = DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    return out


_Leaf = tuple[str, tuple[Any, ...], Any]
"""Flat name, path and value of an entry."""


def _add_leaves(out: list[_Leaf], prefix: str, path: tuple[Any, ...], value: Any) -> None:
    """List what is inside. prefix: of the flat names, with a dot at its end."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(item, torch.Tensor):
                out.append((f"{prefix}{key}", (*path, key), item))
            else:
                _add_leaves(out, f"{prefix}{key}.", (*path, key), item)
    elif isinstance(value, (list, tuple)) and any(map(_is_inner, value)):
        for index, item in enumerate(value):
            _add_leaves(out, f"{prefix}{index}.", (*path, index), item)
    else:
        out.append((prefix[:-1], path, value))


def _parts(leaf: _Leaf) -> list[_Leaf]:
    """The entry itself, or those of the plain tensors that it is made of."""
    key, path, value = leaf
    if isinstance(value, torch.Tensor) and type(value) not in _PLAIN and is_in_parts(value):
        return [(f"{key}.{name}", (*path, name), part) for name, part in parts_of(key, value).items()]
    return [leaf]


def _is_inner(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_inner, value))
    return isinstance(value, (torch.Tensor, Mapping))


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, torch.nn.Buffer))


def _check_all(keys: Sequence[str], tensors: Mapping[int, torch.Tensor]) -> None:
    """`check_tensor` of each, by its number. It is asked once of all that are alike in what it looks at."""
    firsts: dict[Any, int] = {}
    for k, tensor in tensors.items():
        t = local_tensor(tensor)
        firsts.setdefault((type(t), t.dtype, t.layout, t.is_nested, t.is_meta, t.is_conj(), t.is_neg()), k)
    for k in firsts.values():
        check_tensor(keys[k], tensors[k])


def check_tensor(key: str, tensor: torch.Tensor) -> None:
    """Raise Unsupported, naming the entry, for a tensor whose elements cannot be kept exactly as they are."""
    local = local_tensor(tensor)
    what = None
    if type(local) not in _PLAIN:
        what = f"of class {type(local).__name__}, a tensor subclass"
    elif local.layout != torch.strided or local.is_nested:
        what = "a sparse or nested tensor"
    elif local.is_quantized:
        what = "a quantised tensor"
    elif local.is_meta:
        what = "on the meta device, which has no data"
    elif local.is_conj() or local.is_neg():
        what = "one with its conjugate or negative bit set, to be resolved first"
    if what is not None:
        raise Unsupported(f"'{key}' is {what}; checkpoints hold plain tensors and DTensors of them")
    try:
        _check_dtype(local.dtype)
    except Unsupported as error:
        raise Unsupported(f"'{key}': {error}") from error


@lru_cache(64)
def _check_dtype(dtype: torch.dtype) -> None:
    """Raise Unsupported for an element type that no file keeps."""
    to_safetensors(from_torch(dtype))


def put(state_dict: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    """Set the entry at a path. Tuples on the way are replaced by new ones."""
    _put(state_dict, path, value)


def _put(container: Any, path: tuple[Any, ...], value: Any) -> Any:
    key = path[0]
    inner = value if len(path) == 1 else _put(container[key], path[1:], value)
    if isinstance(container, tuple):
        items = (*container[:key], inner, *container[key + 1 :])
        make: Callable[..., Any] = type(container)
        return make(*items) if hasattr(container, "_fields") else make(items)
    container[key] = inner
    return container


def storage_key(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """A key that is equal for entries that see the same memory in the same way (tied parameters). None for a tensor
    without elements."""
    local = local_tensor(tensor)
    if not tensor.numel():
        return None
    placed = (tuple(map(repr, tensor.placements)),) if is_dtensor(tensor) else ()
    shape = tuple(tensor.shape)
    # The storage rather than its address, so that ranks with an empty shard can tell, too.
    storage = local.untyped_storage()._cdata, local.storage_offset(), local.dtype
    return *storage, shape, tuple(local.shape), local.stride(), placed
