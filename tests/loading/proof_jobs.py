"""Jobs for ranks: plain tensors and DTensors, saved, loaded, spoiled; and digested in every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import ucp
import ucp.dcp
from ucp.errors import UcpError
from ucp.loading import proof
from ucp.torchdist.dtensors import local_tensor
from ucp.torchdist.target import StateDictTarget

SHAPES = {"w": (64, 48), "odd": (7, 5, 3), "bias": (50,), "one": (), "half": (33, 9)}


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    found["half"] = found["half"].to(torch.bfloat16)
    found["w"][3, 3] = 0.0
    found["w"][5, 5] = float("nan")
    return found


def laid_out(layout: str, whole: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The values on this job's ranks."""
    n = dist.get_world_size() if dist.is_initialized() else 1
    if layout == "plain":
        return {"model": {name: value.clone() for name, value in whole.items()}}
    meshes = {
        "rows": ((n,), [Shard(0)]),
        "columns": ((n,), [Shard(1)]),
        "replicas": ((n,), [Replicate()]),
        "hybrid": ((2, n // 2), [Replicate(), Shard(0)]),
        "both": ((2, n // 2), [Shard(0), Shard(1)]),
    }
    shape, placements = meshes[layout]
    mesh = init_device_mesh("cpu", shape)

    def placed(value: torch.Tensor) -> DTensor:
        fitting = [p if not isinstance(p, Shard) or p.dim < value.ndim else Replicate() for p in placements]
        return distribute_tensor(value, mesh, fitting)

    return {"model": {name: placed(value) for name, value in whole.items()}}


def digest(layout: str) -> tuple[str, int]:
    found = ucp.digest(laid_out(layout, values()))
    return found.all, len(found.tensors)


def save(layout: str, path: str) -> str:
    state = laid_out(layout, values())
    ucp.save(state, path)
    return ucp.digest(state).all


def load(layout: str, path: str, spoil: Callable[[dict[str, torch.Tensor]], None] | None, only: int = 0) -> Any:
    """What the load says; spoil: called with this rank's memory after everything is in place, on rank ``only``."""
    state = laid_out(layout, {name: torch.zeros_like(value) for name, value in values().items()})
    apply = StateDictTarget.apply

    def spoiled(self: StateDictTarget, loaded: Any) -> None:
        apply(self, loaded)
        if spoil is not None and (dist.get_rank() if dist.is_initialized() else 0) == only:
            spoil({name: local_tensor(value) for name, value in state["model"].items()})

    StateDictTarget.apply = spoiled  # type: ignore[method-assign]
    try:
        report = ucp.load(state, path, prove=proof.FULL)
    except UcpError as error:
        return type(error).__name__, error.whole
    finally:
        StateDictTarget.apply = apply  # type: ignore[method-assign]
    return str(report.proof), None if report.proof is None else report.proof.tensors


def dcp_load(
    layout: str, path: str, spoil: Callable[[dict[str, torch.Tensor]], None] | None, members: list[int] | None = None
) -> Any:
    """What stock ``dcp.load`` proves, or raises on this rank. spoil: as of `load`, on rank 1. members: load in a
    process group of these ranks alone."""
    group = None if members is None else dist.new_group(members)
    if members is not None and dist.get_rank() not in members:
        return None
    layout_of = laid_out if members is None else lambda _, whole: {"model": rows_of(whole, members)}
    state = layout_of(layout, {name: torch.zeros_like(value) for name, value in values().items()})
    reader = ucp.dcp.StorageReader(path)
    apply = StateDictTarget.apply

    def spoiled(self: StateDictTarget, loaded: Any) -> None:
        apply(self, loaded)
        if spoil is not None and dist.get_rank() == 1:
            spoil({name: local_tensor(value) for name, value in state["model"].items()})

    StateDictTarget.apply = spoiled  # type: ignore[method-assign]
    try:
        dcp.load(state, storage_reader=reader, process_group=group)
    except CheckpointException as error:
        return sorted(type(found[0]).__name__ for found in error.failures.values())
    finally:
        StateDictTarget.apply = apply  # type: ignore[method-assign]
    assert reader.last_load is not None
    assert reader.last_load.proof is not None
    return reader.last_load.proof


def rows_of(whole: dict[str, torch.Tensor], members: list[int]) -> dict[str, Any]:
    """The values by rows on some of the ranks; a scalar on each."""
    mesh = DeviceMesh("cpu", members)
    placed = {n: [Shard(0)] if value.ndim else [Replicate()] for n, value in whole.items()}
    return {n: distribute_tensor(value, mesh, placed[n]) for n, value in whole.items()}


def differing_replicas(layout: str) -> str:
    """The error of a digest where one rank's replica has another value."""
    state = laid_out(layout, values())
    if dist.get_rank() == 1:
        local_tensor(state["model"]["bias"])[4] += 1
    try:
        return ucp.digest(state).all
    except UcpError as error:
        return f"{type(error).__name__}: {error}"


# --- faults, of what is live -----------------------------------------------------------------------------------------


def one_off(live: dict[str, torch.Tensor]) -> None:
    live["w"].view(torch.int32)[1, 1] += 1


def elements_swapped(live: dict[str, torch.Tensor]) -> None:
    live["w"][0, [0, 7]] = live["w"][0, [7, 0]]


def rows_swapped(live: dict[str, torch.Tensor]) -> None:
    live["w"][[0, 2]] = live["w"][[2, 0]]


def zero_negated(live: dict[str, torch.Tensor]) -> None:
    where = live["w"] == 0
    assert where.sum() == 1
    live["w"][where] = -0.0


def payload_changed(live: dict[str, torch.Tensor]) -> None:
    bits, where = live["w"].view(torch.int32), live["w"].isnan()
    assert where.sum() == 1
    bits[where] ^= 1


def replica_changed(live: dict[str, torch.Tensor]) -> None:
    live["half"][0, 0] += 1


def tensors_swapped(live: dict[str, torch.Tensor]) -> None:
    live["bias"].copy_(live["w"].reshape(-1)[: live["bias"].numel()].clone())


def bytes_zeroed(live: dict[str, torch.Tensor]) -> None:
    live["odd"].zero_()
