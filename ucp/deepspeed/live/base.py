"""What the adapters of DeepSpeed's optimizers share: states in place, the type of 'step', tensors held whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ucp.errors import Unsupported
from ucp.geometry import Blocks, box, empty, numel
from ucp.loading.host_memory import Memory
from ucp.loading.target import Group, Loaded, Member, Slot, Weights
from ucp.parallel.zero import own_ceil_partition
from ucp.storage.dtypes import from_torch, itemsize, to_torch


class Optimizer(Protocol):
    """An adapter: one class of DeepSpeed optimizer as slots."""

    def make_slots(self, keys: Iterator[int]) -> list[Slot]: ...

    def groups(self) -> Sequence[Group]: ...

    def live(self, key: int) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """A slot's masters, and the optimizer's state of them. These are what it steps itself, and no copies."""
        ...

    def is_in_memory(self, key: int) -> bool:
        """Whether a slot's masters and states lie in memory, so that they can be filled in place."""
        ...

    def weights(self) -> Iterator[Weights]:
        """The model's weights, together with the masters that they are rounded from."""
        ...

    def begin(self) -> None: ...

    def put(self, loaded: Loaded) -> None: ...

    def finish(self) -> None: ...

    def set_options(self, options: Mapping[int, Mapping[str, Any]]) -> None: ...


def everyone() -> tuple[int, ...]:
    """All ranks. Under data parallelism alone they all hold what is not cut."""
    return tuple(range(torch.distributed.get_world_size()))


@dataclass(frozen=True)
class HeldTensor:
    """A tensor outside the optimizer: whole, or at stage 3 this rank's ceil-sized piece of it.

    holders: the ranks that hold the same elements; () for this one alone.
    """

    tensor: torch.Tensor
    shape: tuple[int, ...]
    blocks: Blocks
    holders: tuple[int, ...] = ()

    @classmethod
    def of_tensor(cls, tensor: torch.Tensor) -> HeldTensor:
        shape = tuple(tensor.shape)
        blocks = box([0] * len(shape), shape) if numel(shape) else empty(len(shape))
        return cls(tensor, shape, blocks, everyone())

    @classmethod
    def of_parameter(cls, param: Any) -> HeldTensor:
        """A parameter of the module. At stage 3 DeepSpeed has given it ``ds_tensor`` and what describes that."""
        if not hasattr(param, "ds_tensor"):
            return cls.of_tensor(param.data)
        group = param.ds_process_group
        rank, count = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        shape = tuple(param.ds_shape)
        return cls(param.ds_tensor, shape, own_ceil_partition(shape, 0, count, rank))

    def put(self, key: int, loaded: Loaded) -> None:
        """Take what was loaded. It is rounded if the tensor's element type is narrower."""
        loaded.tensors.fill(key, "param", self.tensor.data)


def drop_secondary_copies(params: Iterable[Any]) -> None:
    """Have ZeRO++'s second copies (``zero_hpz_partition_size``) made anew from the pieces on the next use. DeepSpeed
    itself forgets those of trained parameters after a step, and those of frozen ones never."""
    for param in params:
        if getattr(param, "ds_secondary_tensor", None) is not None:
            param.ds_secondary_tensor = None


def wait_for_gathers(params: Iterable[Any]) -> None:
    """Wait until what stage 3 gathers of these parameters is there. Collective.

    Before 0.19 DeepSpeed waits for the last of several gathers alone, and gloo finishes them in any order. Gloo's
    barrier waits for all that its group has begun. Elsewhere gathers of a group end in their order.
    """
    for group in dict.fromkeys(p.ds_process_group for p in params if p.data.device.type == "cpu"):
        torch.distributed.barrier(group)


def held_slot(key: int, kind: str, name: str, held: HeldTensor) -> Slot:
    member = Member(name, held.shape, held.blocks)
    return Slot(key, kind, held.tensor.numel(), from_torch(held.tensor.dtype), (member,), holders=held.holders)


def state_dtypes(state: Mapping[str, Any], length: int) -> dict[str, str]:
    """Names and element types of the states that exist now as tensors of the buffer's length."""
    return {
        k: from_torch(v.dtype)
        for k, v in state.items()
        if isinstance(v, torch.Tensor) and v.dim() and v.numel() == length
    }


def put_states(
    optimizer: torch.optim.Optimizer, param: torch.Tensor, key: int, loaded: Loaded, group: Mapping[str, Any]
) -> None:
    """Give one optimizer parameter exactly the states that were loaded for it, or none at all if none were saved."""
    if key not in loaded.scalars:
        return
    names = loaded.tensors.states(key)
    if not names and not loaded.scalars[key]:
        optimizer.state.pop(param, None)
        return
    state = optimizer.state[param]
    for name in names:
        values, live = loaded.tensors[key, name], state.get(name)
        shape = state_shape(param, values.numel())
        if isinstance(live, torch.Tensor) and live.shape == shape and not _is_replaceable(live, values):
            loaded.tensors.fill(key, name, live.data)
        else:
            state[name] = values.view(shape).to(param.device)
    for name, value in loaded.scalars[key].items():
        state[name] = scalar_like(state.get(name), optimizer, param, group, value)


def state_shape(param: torch.Tensor, length: int) -> torch.Size:
    """The shape of a state with so many elements: its parameter's, or flat if it is arranged in another way."""
    return param.shape if length == param.numel() else torch.Size((length,))


def home_of(found: Any, param: torch.Tensor, dtype: str, length: int) -> torch.Tensor | None:
    """A state's memory, flat, to be filled in place. None if there is none that could be filled so."""
    fits = isinstance(found, torch.Tensor) and found.shape == state_shape(param, length)
    if fits and found.is_contiguous() and from_torch(found.dtype) == dtype:
        flat: torch.Tensor = found.detach().view(-1)
        return flat
    return None


def new_home(param: torch.Tensor, dtype: str, length: int) -> torch.Tensor:
    """New memory on the parameter's device, flat and zero, which becomes the state."""
    if param.device.type == "cpu":
        return Memory().take(length * itemsize(dtype)).view(to_torch(dtype))
    return torch.zeros(length, dtype=to_torch(dtype), device=param.device)


def put_masters(flat: torch.Tensor, key: int, loaded: Loaded) -> None:
    """Give a flat buffer the loaded values. Nobody keeps views of it; it stays the same object."""
    values = loaded.tensors[key, "param"]
    if _is_replaceable(flat, values):
        flat.data = values
    else:
        loaded.tensors.fill(key, "param", flat.data)


def _is_replaceable(live: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the loaded tensor's memory can take the place of the live one's, which saves a copy. Both have to be
    ordinary host memory of their own, and different. torch's ``load_state_dict``, with which DeepSpeed loads, also
    replaces states."""
    alone = live.untyped_storage().nbytes() == live.nbytes
    same = live.data_ptr() == values.data_ptr()
    return live.device == values.device and live.dtype == values.dtype and alone and not same and not live.is_pinned()


def scalar_like(
    live: Any, optimizer: torch.optim.Optimizer, param: torch.Tensor, group: Mapping[str, Any], value: Any
) -> Any:
    """A value in the type in which this optimizer keeps it: a 0-d tensor in torch's own, a plain number in others."""
    if isinstance(live, torch.Tensor):
        return torch.full_like(live, value)
    # In DeepSpeed's Muon another optimizer, which shares its states, steps what Muon does not orthogonalise.
    stepping = getattr(optimizer, "aux_optimizer", None) or optimizer
    if live is None and type(stepping).__module__.startswith("torch.optim"):
        device = param.device if group.get("capturable") or group.get("fused") else torch.device("cpu")
        return torch.tensor(float(value), dtype=torch.float32, device=device)
    number = value.item() if isinstance(value, torch.Tensor) else value
    return int(number) if isinstance(number, float) and number.is_integer() else number


def set_group_options(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        live = group.get(name)
        if isinstance(live, torch.Tensor) and not isinstance(value, torch.Tensor):
            live.fill_(value)
        else:
            group[name] = value


def check_groups(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Raise Unsupported unless the inner optimizer has one param group for each of DeepSpeed's.

    DeepSpeed makes torch's Adagrad anew with a single group, and then cannot train it if there were several.
    """
    if len(optimizer.param_groups) != count:
        raise Unsupported(
            f"{type(optimizer).__name__} has {len(optimizer.param_groups)} param groups where the engine has {count}: "
            "DeepSpeed lost them; use one param group with this optimizer"
        )


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().reshape(-1).clone()
