"""Jobs for ranks: tensors cut by their rows, loaded from a checkpoint whose chunks lie across the cuts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import ucp
from ucp.errors import UcpError
from ucp.loading import strategy

SHAPES = {"wide": (1024, 1030), "odd": (777, 999), "tall": (9000, 70), "small": (10, 30)}


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def _rows(whole: dict[str, torch.Tensor]) -> dict[str, DTensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in whole.items()}


def load(folder: str, way: str) -> tuple[bool, int, int, int]:
    """Whether everything is there; the bytes wanted, read for it, and compared with a digest, by this rank."""
    truth = values()
    live = _rows({name: torch.zeros_like(value) for name, value in truth.items()})
    report = _by(way, lambda: ucp.load({"model": live}, folder))
    wanted = _rows(truth)
    fine = all(torch.equal(live[name].to_local(), wanted[name].to_local()) for name in truth)
    return fine, report.nbytes, report.bytes_read, report.verified_bytes


def refused(folder: str, way: str) -> tuple[str, str, bool]:
    """The error of a load, and whether everything is still what it was before."""
    live = _rows({name: torch.full(shape, 7.0) for name, shape in SHAPES.items()})
    try:
        _by(way, lambda: ucp.load({"model": live}, folder))
    except UcpError as error:
        same = all(bool((tensor.to_local() == 7.0).all()) for tensor in live.values())
        return type(error).__name__, str(error), same
    return "", "", False


def _by(way: str, work: Callable[[], ucp.LoadReport]) -> ucp.LoadReport:
    chosen, strategy.choose = strategy.choose, lambda every: way
    try:
        return work()
    finally:
        strategy.choose = chosen
