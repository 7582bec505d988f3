"""A job for the ranks: FSDP2 with torchao's optimizers of few bits, saved and resumed on another number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def build(kind: str, seed: int, world: int, outputs: int = 64) -> tuple[nn.Module, torch.optim.Optimizer]:
    import torchao.optim
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, outputs))
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    return model, getattr(torchao.optim, kind)(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        inputs = torch.randn(8, 128, generator=torch.Generator().manual_seed(step))
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All that the ranks hold of weights and states, as it lies in them: their pieces end to end."""
    out = {}
    for name, p in model.named_parameters():
        for state, value in {"param": p, **optimizer.state[p]}.items():
            local: Any = value.to_local() if hasattr(value, "to_local") else value
            names = local.__tensor_flatten__()[0] if hasattr(local, "codes") else [""]
            for part in names:
                own = getattr(local, part) if part else local
                own = own.view(torch.uint8) if own.dtype == torch.float8_e4m3fn else own  # which pickle does not carry
                pieces: list[Any] = [None] * torch.distributed.get_world_size()
                torch.distributed.all_gather_object(pieces, own.detach().clone())
                alone = own.dim() == 0 or part == "qmap"
                out[f"{name}:{state}:{part}"] = pieces[0] if alone else torch.cat(pieces)
    return out


def saved(kind: str, folder: str, world: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    import ucp

    model, optimizer = build(kind, 1, world)
    train(model, optimizer, range(3))
    ucp.save_training(folder, model=model, optimizer=optimizer, step=3)
    return whole(model, optimizer), train(model, optimizer, range(3, 6))


def resumed(kind: str, folder: str, world: int, outputs: int = 64) -> tuple[Any, list[float]]:
    import ucp
    from ucp.errors import UcpError

    model, optimizer = build(kind, 2, world, outputs)
    try:
        ucp.load_training(folder, model=model, optimizer=optimizer, rng=False)
    except UcpError as error:
        return error.whole, []
    return whole(model, optimizer), train(model, optimizer, range(3, 6))


def dequantised(folder: str, world: int) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """A plain AdamW that goes on from it."""
    import ucp

    model, _ = build("AdamW8bit", 2, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    changes = {"states": "dequantised"}
    report = ucp.load_training(folder, model=model, optimizer=optimizer, rng=False, changes=changes)
    found = whole(model, optimizer)
    train(model, optimizer, range(3, 4))
    return found, report.tensors.changes


def requantised(kind: str, folder: str, world: int) -> tuple[list[Any], tuple[str, ...], list[float]]:
    """Each rank's quantised states beside torchao's own quantisation of the same rows of what the checkpoint says."""
    import ucp

    model, optimizer = build(kind, 2, world)
    changes = {"states": "requantised"}
    report = ucp.load_training(folder, model=model, optimizer=optimizer, rng=False, changes=changes)
    pairs: list[Any] = []
    with torch.no_grad():
        for name, p in model.named_parameters():
            for state in ("exp_avg", "exp_avg_sq"):
                own = optimizer.state[p][state].to_local()
                pairs.append((name, state, own.dequantize() if hasattr(own, "codes") else own, hasattr(own, "codes")))
    pairs = [(name, state, own.detach().clone(), quantised) for name, state, own, quantised in pairs]
    return pairs, report.tensors.changes, train(model, optimizer, range(3, 6))
