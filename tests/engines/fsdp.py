"""Real FSDP2 (and tensor-parallel, and HSDP) training on ranks, and the truth about it without this project's library.

The truth is what the module and the optimizer hold: each rank's shards, put in their places by how FSDP2 and tensor
parallelism cut (``torch.chunk``, tensor parallelism first), not by what their DTensors say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from tests.engines import models
from tests.engines.configs import OPTIMIZERS, Case, parameter_groups
from tests.engines.runs import FURTHER, STEPS


@dataclass(frozen=True)
class Mesh:
    """A layout. replicas: HSDP's, outside dp; the module's ``up`` and ``middle`` are cut over tp. groups: param groups,
    as a DeepSpeed case has them."""

    dp: int = 1
    tp: int = 1
    replicas: int = 1
    groups: int = 2
    seed: int = 0
    tied: bool = False
    frozen: bool = False

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.replicas


@dataclass(frozen=True, eq=False)
class State:
    """The whole state of a run: parameter -> state -> tensor, buffers, and each group's names and hyperparameters."""

    params: Mapping[str, Mapping[str, Tensor]]
    buffers: Mapping[str, Tensor]
    groups: tuple[Mapping[str, Any], ...]


class Live:
    """A model under FSDP2 and its optimizer."""

    def __init__(self, mesh: Mesh) -> None:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        self.mesh = mesh
        self.device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        model = models.build("odd", seed=mesh.seed, tied=mesh.tied, frozen=mesh.frozen)
        self.model: nn.Module = model.to(self.device)
        names, sizes = self._dimensions()
        self.whole = init_device_mesh(self.device, sizes, mesh_dim_names=names)
        if mesh.tp > 1:
            # Uneven lengths are known to DTensors only.
            plan = {"up": ColwiseParallel(use_local_output=False), "middle": RowwiseParallel()}
            parallelize_module(self.model, self.whole["tp"], plan)
        data: DeviceMesh = self.whole["replicas", "dp"] if mesh.replicas > 1 else self.whole["dp"]
        for module in (self.model.up, self.model.middle):
            fully_shard(module, mesh=data)
        fully_shard(self.model, mesh=data)
        _, options = OPTIMIZERS["adamw"]
        options = {k: v for k, v in options.items() if k != "torch_adam"} | {"betas": (0.9, 0.98)}
        self.optimizer = torch.optim.AdamW(
            parameter_groups(Case(groups=mesh.groups), self.model), **options, foreach=False
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)

    def _dimensions(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        mesh = self.mesh
        both = [("replicas", mesh.replicas), ("dp", mesh.dp), ("tp", mesh.tp)]
        kept = [(name, size) for name, size in both if size > 1 or name == "dp"]
        return tuple(n for n, _ in kept), tuple(s for _, s in kept)

    def train(self, first: int, count: int = STEPS, scheduler: bool = False) -> list[float]:
        """Steps on the batches of these numbers; the losses, averaged over the ranks."""
        data = self.mesh.dp * self.mesh.replicas
        losses = []
        for step in range(first, first + count):
            tokens, labels = models.batch("odd", step, dist.get_rank() // self.mesh.tp, data)
            loss = models.loss("odd", self.model, tokens.to(self.device), labels.to(self.device))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if scheduler:
                self.scheduler.step()
            total = loss.detach().double().clone()
            dist.all_reduce(total)
            losses.append(total.item() / dist.get_world_size())
        return losses

    def state(self) -> State:
        """The truth. Collective; whole on every rank."""
        return state_of(self.model, self.optimizer, self.full)

    def full(self, name: str, tensor: Tensor) -> Tensor:
        """The whole tensor: all ranks' shards, joined where FSDP2 and tensor parallelism have cut."""
        if not isinstance(tensor, DTensor):
            return tensor.detach().cpu().clone()
        shards, mesh = shards_of(tensor), self.mesh
        of_tp = [torch.cat([shards[d * mesh.tp + t] for d in range(mesh.dp)]) for t in range(mesh.tp)]
        if mesh.tp == 1 or not name.startswith(("up.", "middle.weight")):
            return of_tp[0]
        return torch.cat(of_tp, dim=1 if name == "middle.weight" else 0)


def shards_of(tensor: DTensor) -> list[Tensor]:
    """Every rank's shard. Collective."""
    shards: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shards, tensor.to_local().detach().cpu().clone())
    return shards


def joined(name: str, tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 alone has cut, over all ranks. Collective."""
    return torch.cat(shards_of(tensor)) if isinstance(tensor, DTensor) else tensor.detach().cpu().clone()


def state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, full: Callable[[str, Tensor], Tensor] = joined
) -> State:
    """The truth about a model and its optimizer. Collective; whole on every rank.

    full: makes a parameter, or a state of it, whole.
    """
    params: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        found = optimizer.state.get(parameter, {})
        params[name] = {"param": full(name, parameter)} | {k: full(name, v) for k, v in found.items()}
    names = {id(p): n for n, p in model.named_parameters()}
    groups = tuple(
        {k: v for k, v in group.items() if k != "params"} | {"names": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    )
    return State(params, {k: v.cpu().clone() for k, v in model.named_buffers() if k != "positions"}, groups)


def differences(a: State, b: State, groups: bool = True) -> list[str]:
    """What differs between two states, bit by bit."""
    lines = []
    for kind in ("params", "buffers"):
        ours, theirs = getattr(a, kind), getattr(b, kind)
        if ours.keys() != theirs.keys():
            lines.append(f"{kind}: {sorted(ours.keys() ^ theirs.keys())} are in one only")
        for name in ours.keys() & theirs.keys():
            pairs = [("", ours[name], theirs[name])] if kind == "buffers" else []
            if kind == "params":
                if ours[name].keys() != theirs[name].keys():
                    lines.append(f"{name}: states {sorted(ours[name])} and {sorted(theirs[name])}")
                pairs = [(s, ours[name][s], theirs[name][s]) for s in ours[name].keys() & theirs[name].keys()]
            for state, x, y in pairs:
                if x.dtype != y.dtype or not torch.equal(x, y):
                    lines.append(f"{name} {state}: {x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)} differ")
    if groups and a.groups != b.groups:
        lines.append(f"groups: {a.groups} and {b.groups}")
    return lines


__all__ = ["FURTHER", "STEPS", "Live", "Mesh", "State", "differences", "state_of"]
