"""Jobs for the ranks: workers of local SGD with an outer optimizer, plain or sharded, saved and resumed by others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

INNER = 2
"""Inner steps between syncs."""


@dataclass
class Run:
    """A worker. copies: the global copy, by name; where torchft keeps it, the very tensors."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    mesh: Any
    outer: list[torch.optim.Optimizer]
    copies: dict[str, torch.Tensor]
    diloco: Any = None

    @property
    def worker(self) -> int:
        return int(self.mesh.get_local_rank("worker"))

    def parts(self) -> Any:
        from ucp.torchdist.local_sgd import LocalRun

        return LocalRun(self.model, self.optimizer, self.mesh, self.outer, self.copies)


class Manager:
    """As much of torchft's manager as its DiLoCo calls: an average over the workers, and every commit succeeds."""

    _use_async_quorum = False

    def __init__(self, group: Any) -> None:
        self._group, self._step = group, 0
        self.registered: dict[str, Any] = {}

    def register_state_dict_fn(self, key: str, load: Any, save: Any) -> None:
        self.registered[key] = (load, save)

    def allreduce(self, tensor: torch.Tensor, should_quantize: bool = False) -> Any:
        dist.all_reduce(tensor, group=self._group)
        tensor.div_(dist.get_world_size(self._group))
        return _Done()

    def current_step(self) -> int:
        return self._step

    def should_commit(self) -> bool:
        self._step += 1
        return True

    def start_quorum(self) -> None: ...

    def allow_state_dict_read(self) -> None: ...

    def disallow_state_dict_read(self) -> None: ...


class _Done:
    def wait(self) -> bool:
        return True


def build(seed: int, workers: int, kind: str = "plain") -> Run:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shards = dist.get_world_size() // workers
    mesh = init_device_mesh("cpu", (workers, shards), mesh_dim_names=("worker", "shard"))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    if kind == "sharded":
        fully_shard(model, mesh=mesh["shard"])
    elif shards == 1:
        mesh = mesh["worker"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if kind == "torchft":
        from torchft.local_sgd import DiLoCo

        from ucp.torchdist.local_sgd import of_diloco

        fragments = [model[0], model[2]]
        outer = [torch.optim.SGD(f.parameters(), lr=0.7, momentum=0.9, nesterov=True) for f in fragments]
        manager = Manager(mesh.get_group("worker"))
        diloco = DiLoCo(manager, fragments, optimizer, outer, 2 * INNER, pin_memory=False)  # type: ignore[arg-type]
        found = of_diloco(diloco, model, optimizer, mesh)
        diloco.__enter__()
        return Run(model, optimizer, mesh, list(found.outer), dict(found.copies or {}), diloco)
    outer = [torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)]
    copies = {name: _local(p).clone() for name, p in model.named_parameters()}
    return Run(model, optimizer, mesh, outer, copies)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def sync(run: Run) -> None:
    """An outer step: the workers' mean movement away from the global copy is its gradient."""
    group = run.mesh.get_group("worker")
    for name, p in run.model.named_parameters():
        moved = run.copies[name] - _local(p)
        dist.all_reduce(moved, group=group)
        moved /= dist.get_world_size(group)
        _local(p).copy_(run.copies[name])
        if not isinstance(p, DTensor):
            p.grad = moved
        else:
            p.grad = DTensor.from_local(moved, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
    run.outer[0].step()
    for name, p in run.model.named_parameters():
        run.copies[name].copy_(_local(p))
    run.model.zero_grad()


def train(run: Run, steps: range) -> list[float]:
    losses = []
    for step in steps:
        draw = torch.Generator().manual_seed(100 * run.worker + step)
        loss = run.model(torch.randn(4, 6, generator=draw)).square().mean()
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if run.diloco is None and (step + 1) % INNER == 0:
            sync(run)
    return losses


def held(run: Run) -> dict[str, torch.Tensor]:
    """Everything that this worker has, whole."""
    out: dict[str, torch.Tensor] = {}
    for name, p in run.model.named_parameters():
        out[name] = _whole(p)
        for key, value in run.optimizer.state[p].items():
            out[f"{name}:{key}"] = _whole(value)
        for outer in run.outer:
            for key, value in outer.state.get(p, {}).items():
                out[f"{name}:outer {key}"] = _whole(value)
        copy: torch.Tensor = run.copies[name]
        if isinstance(p, DTensor):
            copy = DTensor.from_local(copy, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
        out[f"{name}:copy"] = _whole(copy)
    return out


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def saved(folder: str, workers: int, kind: str) -> tuple[int, dict[str, torch.Tensor], list[float]]:
    """This worker's number, what it has, and the losses of further steps."""
    from ucp.torchdist.local_sgd import save_local_sgd

    run = build(1, workers, kind)
    steps = 2 * INNER if kind == "torchft" else 2 * INNER + 1  # torchft keeps how many steps there were since a sync
    train(run, range(steps))
    save_local_sgd(folder, run.parts(), step=steps)
    return run.worker, held(run), train(run, range(steps, steps + 4))


def refused(folder: str, workers: int, kind: str) -> list[str]:
    """What is said without a choice, and to 'kept', of more workers than there were. Nothing may change by it."""
    from ucp.errors import Mismatch
    from ucp.torchdist.local_sgd import load_local_sgd

    run, said = build(2, workers, kind), []
    before = held(run)
    for choice in (None, "kept"):
        try:
            load_local_sgd(folder, run.parts(), workers=choice)
        except Mismatch as error:
            said.append(str(error))
    assert all(torch.equal(value, before[key]) for key, value in held(run).items())
    return said


def resumed(folder: str, workers: int, kind: str, choice: str | None = None) -> Any:
    """This worker's number, what it has, the losses of further steps, and the report's changes."""
    from ucp.torchdist.local_sgd import load_local_sgd

    run = build(2, workers, kind)
    step, report = load_local_sgd(folder, run.parts(), workers=choice)
    assert report.proof is not None
    return run.worker, held(run), train(run, range(step, step + 4)), report.changes
