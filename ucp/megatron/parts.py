"""A sharded state dict of Megatron-Core by logical tensors: what this rank holds of each, and in which memory.

A `ShardedTensor` says which box of which global tensor its data are (megatron/core/dist_checkpointing/mapping.py). Its
key is that of Megatron's files, so that a stacked one is several parameters; names here are those that the format
``megatron`` gives (`ucp.formats.megatron.keys`). Factories are applied first: a fused gate and up become two parts of
one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ucp.errors import BadArgument, Unsupported
from ucp.formats.megatron import keys
from ucp.formats.megatron.read.common import optimizers
from ucp.formats.megatron.write.common import DISTRIBUTED, FULL, MASTERS
from ucp.geometry import Blocks, Shape
from ucp.job import ranks
from ucp.parallel.mesh import Layout
from ucp.storage.dtypes import from_torch

Key = tuple[str, str]
"""A parameter's name, and `keys.WEIGHT` for the module's own tensor or the name of an optimizer state."""


@dataclass(frozen=True, eq=False)
class HeldPart:
    """A box of a logical tensor: the live memory, with the tensor's dimensions, and its first element's place."""

    offsets: Shape
    view: torch.Tensor

    @property
    def region(self) -> tuple[Shape, Shape]:
        return self.offsets, tuple(self.view.shape)


@dataclass(frozen=True, eq=False)
class Held:
    """What this rank holds of a logical tensor. flexible: whether Megatron lets its shape differ from the checkpoint's,
    as that of a vocabulary padded for its ranks."""

    name: str
    state: str
    shape: Shape
    dtype: str
    parts: tuple[HeldPart, ...]
    flexible: bool = False

    @property
    def regions(self) -> tuple[tuple[Shape, Shape], ...]:
        return tuple(part.region for part in self.parts)


@dataclass(frozen=True, eq=False)
class Taken:
    """A sharded state dict, taken apart.

    sharded: the tree of its ShardedTensors and ShardedObjects, with factories applied. own: what is for this rank alone
    and not saved. factories: what merges the loaded parts again. common: everything else. held: the tensors. objects:
    the ShardedObjects by unique key. stacked: whether layers share keys.
    """

    sharded: Any
    own: Any
    factories: Any
    common: dict[str, Any]
    held: Mapping[Key, Held]
    objects: Mapping[str, Any]
    stacked: bool


def take_apart(state_dict: Any) -> Taken:
    """Raises BadArgument for what is no sharded state dict, Unsupported by name for parts whose place in the
    parameters is not said."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
    from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8

    if not isinstance(state_dict, dict):
        raise BadArgument(f"a sharded state dict of Megatron-Core is a dict, found {type(state_dict).__name__}")
    prepared, own, factories = load_preprocess(state_dict)
    force_all_tensors_to_non_fp8(prepared)
    sharded, common = extract_sharded_base(prepared)
    tensors = [value for value in nested_values(sharded) if isinstance(value, ShardedTensor)]
    objects = {value.unique_key: value for value in nested_values(sharded) if isinstance(value, ShardedObject)}
    for key in (*(t.key for t in tensors), *(o.key for o in objects.values())):
        if ".distributed.dp_group_idx_" in key:
            raise Unsupported(
                f"'{key}' is a part of the distributed optimizer's buckets, which do not say whose states they hold; "
                "make the state dict with metadata={'distrib_optim_sharding_type': 'fully_reshardable'}"
            )
    if not tensors:
        raise BadArgument(
            "the state dict has no ShardedTensor in it; give it as model.sharded_state_dict() and "
            "optimizer.sharded_state_dict(...) make it, under keys such as 'model' and 'optimizer'"
        )
    stacked = any(keys.stack(keys.parse(tensor.key).model).axes[:1] == ("layers",) for tensor in tensors)
    return Taken(sharded, own, factories, common, _held(tensors), objects, stacked)


def _held(tensors: list[Any]) -> dict[Key, Held]:
    by_state: dict[str, dict[str, list[Any]]] = {}
    for tensor in tensors:
        parsed = keys.parse(tensor.key)
        by_state.setdefault(parsed.state, {}).setdefault(parsed.model, []).append(tensor)
    prefix = keys.without_prefix(by_state.get(keys.WEIGHT, ()))
    out: dict[Key, Held] = {}
    for state, by_key in by_state.items():
        bare = {key.removeprefix(prefix): found for key, found in by_key.items()}
        wholes = {
            part: (whole, parts, place) for whole, parts in keys.parts(bare).items() for place, part in enumerate(parts)
        }
        for key, found in bare.items():
            whole, parts, place = wholes.get(key, (key, (key,), 0))
            stack = keys.stack(whole)
            along = [bare[part][0].global_shape[len(stack.axes)] for part in parts] if len(parts) > 1 else []
            for tensor in found:
                for one in _apart(tensor, stack, state):
                    _add(out, _moved(one, along, place) if along else one)
    return out


def _apart(tensor: Any, stack: keys.Stack, state: str) -> Iterator[Held]:
    """A ShardedTensor by the parameters that it holds."""
    if getattr(tensor, "flattened_range", None) is not None:
        raise Unsupported(
            f"'{tensor.key}' has a flattened_range, as Megatron-Core's releases up to 0.14 cut optimizer states; make "
            "the state dict with metadata={'distrib_optim_sharding_type': 'fully_reshardable'}"
        )
    if tensor.data is None:
        raise BadArgument(f"'{tensor.key}' has no data; the state dict has to be one that still has its tensors")
    lead = len(stack.axes)
    view = tensor.data.detach()[(None,) * tensor.prepend_axis_num]
    if view.ndim != len(tensor.global_shape) or view.ndim < lead:
        raise Unsupported(
            f"'{tensor.key}' has {view.ndim} dimensions here, and {len(tensor.global_shape)} as a whole tensor"
        )
    shape = tuple(map(int, tensor.global_shape[lead:]))
    for at in np.ndindex(*view.shape[:lead]):
        index = [int(offset) + step for offset, step in zip(tensor.global_offset, at, strict=False)]
        name = stack.name(*index)
        part = HeldPart(tuple(map(int, tensor.global_offset[lead:])), view[at])
        flexible = bool(tensor.allow_shape_mismatch)
        yield Held(name, state, shape, from_torch(view.dtype), (part,), flexible)


def _moved(held: Held, along: list[int], place: int) -> Held:
    """A tensor saved in parts along its first axis: this part, as one of the whole."""
    before = sum(along[:place])
    parts = tuple(replace(part, offsets=(part.offsets[0] + before, *part.offsets[1:])) for part in held.parts)
    return replace(held, shape=(sum(along), *held.shape[1:]), parts=parts)


def _add(out: dict[Key, Held], held: Held) -> None:
    known = out.get((held.name, held.state))
    if known is None:
        out[held.name, held.state] = held
        return
    if (known.shape, known.dtype) != (held.shape, held.dtype):
        raise Unsupported(
            f"'{held.name}' ({held.state}) is {known.dtype} {list(known.shape)} in one part and {held.dtype} "
            f"{list(held.shape)} in another"
        )
    if held.parts[0].region in known.regions:
        return  # a tied tensor that the state dict has twice
    parts = tuple(sorted((*known.parts, *held.parts), key=lambda part: part.offsets))
    out[held.name, held.state] = replace(known, parts=parts)


# --- memory ----------------------------------------------------------------------------------------------------------


def flat(held: Held) -> tuple[torch.Tensor | None, Blocks, int]:
    """The parts as one buffer: the live memory, the blocks in it, and its length in elements.

    Parts that fill a range of one storage are that range. For others the memory is None, and the blocks are those of a
    buffer with one part after the other.
    """
    views = [part.view for part in held.parts]
    offsets = np.array([part.offsets for part in held.parts], np.int64).reshape(len(views), -1)
    sizes = np.array([tuple(view.shape) for view in views], np.int64).reshape(len(views), -1)
    count = sum(view.numel() for view in views)
    first = min(view.storage_offset() for view in views)
    last = max(_end(view) for view in views)
    one = len({view.untyped_storage()._cdata for view in views}) == 1
    if one and last - first == count:
        starts = np.array([view.storage_offset() - first for view in views], np.int64)
        strides = np.array([view.stride() for view in views], np.int64).reshape(len(views), -1)
        memory = views[0].as_strided((count,), (1,), first)
    else:
        starts = np.cumsum([0, *(view.numel() for view in views[:-1])], dtype=np.int64)
        strides = np.array([_row_major(view.shape) for view in views], np.int64).reshape(len(views), -1)
        memory = None
    return memory, Blocks(offsets, sizes, starts, strides, np.zeros(len(views), np.int64)), count


def _row_major(shape: torch.Size) -> Shape:
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


def _end(view: torch.Tensor) -> int:
    """The element after the view's last one, in its storage."""
    steps = ((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return int(view.storage_offset()) + (int(sum(steps)) + 1 if view.numel() else 0)


# --- the run ---------------------------------------------------------------------------------------------------------


def optimizer_kind(taken: Taken) -> str:
    """Which of Megatron's optimizers the state dict is of (`ucp.formats.megatron.write.common`)."""
    own = optimizers(taken.common)
    if any("param_state_sharding_type" in one for one in own):
        return DISTRIBUTED
    return MASTERS if any("optimizer" in one for one in own) else FULL


def layout(taken: Taken) -> Layout:
    """The run's layout, as Megatron's parallel state has it; one data-parallel group without it."""
    from megatron.core import parallel_state as ps

    world, sharded = ranks.world_size(), int(optimizer_kind(taken) == DISTRIBUTED)
    if not ps.model_parallel_is_initialized():
        return Layout(dp=world, zero=sharded)
    tp, pp = ps.get_tensor_model_parallel_world_size(), ps.get_pipeline_model_parallel_world_size()
    ep = ps.get_expert_model_parallel_world_size()
    dp = max(world // (tp * pp), 1)
    return Layout(dp=dp, tp=tp, pp=pp, ep=ep if dp % ep == 0 else 1, zero=sharded)
