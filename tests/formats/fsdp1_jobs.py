"""Jobs for ranks: an FSDP1 run that saves what it keeps flat, in each of the ways that programs have for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

SAVED, FURTHER = 2, 3


class Block(nn.Module):
    """Sizes that divide by no number of ranks, and that need padding."""

    def __init__(self, filters: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)
        if filters:
            self.filter = nn.Parameter(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last))
        self.register_buffer("seen", torch.arange(2.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down(self.up(x).relu())
        return x + (hidden * self.filter.pow(3).sum() if hasattr(self, "filter") else hidden)


class Net(nn.Module):
    """Blocks that are units of their own, and a tied layer. filters: the blocks have one in channels_last, too."""

    def __init__(self, filters: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.zeta = nn.Linear(3, 5)
        self.blocks = nn.ModuleList([Block(filters), Block(filters)])
        self.alpha = nn.Linear(5, 3)
        self.tied = self.zeta

    def forward(self, x: Tensor) -> Tensor:
        x = self.zeta(x)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.alpha(x)
        return found


def shapes() -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in Net().named_parameters()}


@dataclass(frozen=True, eq=False)
class Wrote:
    """What the run held, whole, and the losses of its next steps."""

    truth: Mapping[str, Mapping[str, Tensor]]
    further: tuple[float, ...]


def saves_all(folder: str, kinds: tuple[str, ...]) -> dict[str, Wrote]:
    return {kind: saves(f"{folder}/{kind}", kind) for kind in kinds}


def saves(folder: str, kind: str) -> Wrote:
    """A run of two steps, saved. kind: ``orig`` for ``use_orig_params``, ``flat`` without, ``last`` with filters."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import FullyShardedDataParallel as Sharded
    from torch.distributed.fsdp import StateDictType
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({Block})
    orig, net = kind == "orig", Net(kind == "last")
    model = Sharded(net, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=orig)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    losses = train(model, optimizer, SAVED)
    truth = _truth(model, optimizer)
    raw = optimizer.state_dict()
    with Sharded.state_dict_type(model, StateDictType.LOCAL_STATE_DICT):
        local = model.state_dict()
        dcp.save({"model": local}, checkpoint_id=f"{folder}/weights")
        dcp.save({"model": local, "optimizer": raw}, checkpoint_id=f"{folder}/lost")
        units = {name: unit._handle.shard_metadata() for name, unit in _units(model).items()}
        _of_rank({"model": local, "optimizer": raw, "shard_metadata": units, "step": SAVED}, f"{folder}/told")
        _of_rank({"model": local, "optimizer": raw}, f"{folder}/bare")
        if kind != "last":  # of which FSDP1 itself refuses to name the states
            states = Sharded.optim_state_dict(model, optimizer)
            dcp.save({"model": local, "optimizer": states}, checkpoint_id=f"{folder}/named")
    with Sharded.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        if kind != "last":
            _of_rank({"model": model.state_dict(), "optimizer": states, "seed": dist.get_rank()}, f"{folder}/sharded")
    losses = train(model, optimizer, FURTHER)
    return Wrote(truth, tuple(losses))


def _of_rank(state: Any, folder: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.save(state, f"{folder}/run_rank{dist.get_rank()}.pt")
    dist.barrier()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(torch.ones(2, 3)).pow(2).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _units(model: nn.Module) -> dict[str, Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return {name: unit for name, unit in model.named_modules() if isinstance(unit, FullyShardedDataParallel)}


def _truth(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Whole weights and states, from what the ranks hold: each unit's vectors, cut as the live FSDP1 says."""
    whole: dict[str, dict[str, Tensor]] = {}
    for path, unit in _units(model).items():
        flat, start = unit._handle.flat_param, 0
        said = vars(flat)
        path = path.replace("_fsdp_wrapped_module", "").strip(".").replace("..", ".")
        mine = {"param": [flat.detach()]}
        if said["_params"] is None:
            mine.update({key: [value] for key, value in optimizer.state[flat].items()})
        else:
            for own in said["_params"]:
                for key, value in optimizer.state.get(own, {}).items():
                    mine.setdefault(key, []).append(value)
        vectors = {key: _gathered(torch.cat([t.reshape(-1) for t in found])) for key, found in mine.items()}
        padded = said["_params"] is not None
        numels = said["_numels_with_padding"]
        names = iter(zip(said["_fqns"], said["_shapes"], said["_strides"], strict=True))
        at = 0  # in the states, which have no padding under use_orig_params
        for numel, padding in zip(numels, said["_is_padding_mask"], strict=True):
            if not padding:
                name, shape, strides = next(names)
                name = f"{path}.{name}".strip(".")
                cut = {k: v[(at if padded and k != "param" else start) :][:numel] for k, v in vectors.items()}
                whole[name] = {k: v.as_strided(shape, strides).clone() for k, v in cut.items() if k != "step"}
                whole[name]["step"] = torch.tensor(float(SAVED))
                at += numel
            start += numel
    return whole


def _gathered(part: Tensor) -> Tensor:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part.clone())
    return torch.cat(parts)
