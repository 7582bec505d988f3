"""Subgroups of stage 3 whose masters and states lie on an NVMe disk (ZeRO-Infinity).

Between steps DeepSpeed's swapper (``runtime/swap_tensor``) leaves their tensors empty. For reading, the swap files are
mapped into memory, so that a save needs no extra memory. For writing, one subgroup at a time is brought in, filled,
rounded into the model's weights and put back, as in a step. So at most one subgroup is in host memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from ucp.deepspeed.live.base import scalar_like
from ucp.errors import DestinationError, Unsupported
from ucp.loading.target import Loaded

_ROUNDED_UP_BYTES = 1 << 20
"""At most so much longer is a swap file than what is in it: a block of the asynchronous writes."""


def is_swapped(zero: Any, s: int) -> bool:
    """Whether the swapper keeps this subgroup. Those below its minimum size stay in host memory."""
    return bool(zero._swappable_optimizer_subgroup(s))


def length(zero: Any, s: int) -> int:
    """How many elements this rank's part of a subgroup has, wherever it lies."""
    return int(zero.fp16_partitioned_groups_flat_numel[s])


def view(zero: Any, s: int) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """A subgroup's masters and states, mapped from the swap files. Values that are not swapped stay as they are."""
    flat = zero.fp32_partitioned_groups_flat[s]
    swapper, count = zero.optimizer_swapper, length(zero, s)
    states: dict[str, Any] = dict(zero.optimizer.state.get(flat, {}))
    for name, value in states.items():
        if isinstance(value, torch.Tensor) and value.dim() and not value.numel():
            states[name] = _mapped(swapper, f"{name}-{flat.ds_id}", count, value.dtype)
    return _mapped(swapper, str(flat.ds_id), count, flat.dtype), states


def _mapped(swapper: Any, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
    path = os.path.join(swapper.swap_folder, f"{name}.tensor.swp")
    try:
        return torch.from_file(path, shared=False, size=count, dtype=dtype)
    except RuntimeError as error:
        raise Unsupported(f"{path}: DeepSpeed's swap file cannot be mapped: {error}") from error


def check_room(zero: Any, kept: Callable[[int], Collection[str]]) -> None:
    """Raise DestinationError if the swap folder has no room for the states of subgroups that have none yet. What is
    there already is written over. kept: the states that the optimizer keeps for a subgroup.

    A node's ranks are taken to share one disk, and to need alike.
    """
    needed, folder = 0, ""
    for s in range(len(zero.fp32_partitioned_groups_flat)):
        if is_swapped(zero, s):
            flat, folder = zero.fp32_partitioned_groups_flat[s], str(zero.optimizer_swapper.swap_folder)
            new = [k for k in kept(s) if not os.path.exists(os.path.join(folder, f"{k}-{flat.ds_id}.tensor.swp"))]
            needed += len(new) * (length(zero, s) * flat.element_size() + _ROUNDED_UP_BYTES)
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if needed and (free := shutil.disk_usage(folder).free) < needed:
        raise DestinationError(
            f"{folder}: the optimizer's states that are loaded into swap files need about {needed} bytes there, and "
            f"{free} are free; make room, or give offload_optimizer.nvme_path another disk; nothing was changed"
        )


def put(zero: Any, s: int, key: int, loaded: Loaded) -> None:
    """Give a subgroup what was loaded for it, and give the model the rounded weights."""
    if (key, "param") not in loaded.tensors and key not in loaded.scalars:
        return
    flat, inner, swapper = zero.fp32_partitioned_groups_flat[s], zero.optimizer, zero.optimizer_swapper
    swapper.swap_in_optimizer_state(parameter=flat, async_parameter=None)
    if (key, "param") in loaded.tensors:
        loaded.tensors.fill(key, "param", flat.data)
    if key in loaded.scalars:
        _put_states(zero, s, key, loaded)
    if (key, "param") in loaded.tensors:
        zero._reassign_or_swap_out_partitioned_parameters(s)
    swapper.swap_out_optimizer_state(parameter=flat, async_swap=False)
    flat.grad = None
    if flat in inner.state and not inner.state[flat]:
        del inner.state[flat]


def _put_states(zero: Any, s: int, key: int, loaded: Loaded) -> None:
    """Set the states. Existing ones are filled in place, since the swapper holds on to their tensors. It finds new ones
    by itself."""
    flat, inner = zero.fp32_partitioned_groups_flat[s], zero.optimizer
    group = inner.param_groups[zero.sub_group_to_group_id[s]]
    names = loaded.tensors.states(key)
    state = inner.state[flat]
    if set(names) != {k for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim()}:
        found = zero.optimizer_swapper.swap_params_info[flat.ds_id]
        found.tensors, found.has_state_tensors = found.tensors[:1], False
        state.clear()
    for name in names:
        if name in state:
            loaded.tensors.fill(key, name, state[name].data)
        else:
            state[name] = loaded.tensors.own(key, name)
    for name, value in loaded.scalars[key].items():
        state[name] = scalar_like(state.get(name), inner, flat, group, value)
