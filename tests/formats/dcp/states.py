"""State dicts for tests: a small trained model with its optimizer, and every element type there is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

# Whatever torch and safetensors both know.
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.uint16,
)  # fmt: skip


class Net(nn.Module):
    """Parameters of one, two and no dimensions, tied ones, and buffers."""

    seen: torch.Tensor

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.up = nn.Linear(5, 11)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(5, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.tensor(3))
        self.register_buffer("mean", torch.randn(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        return (self.up(hidden).sum() * self.gain + self.head(hidden).pow(2).sum()).float()


def trained(tied: bool = False, seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = Net(tied)
    groups = [
        {"params": [p for p in net.parameters() if p.dim() > 1]},
        {"params": [p for p in net.parameters() if p.dim() < 2], "lr": 0.5, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98))
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.tensor([0, 3, 6])).backward()
        optimizer.step()
    return net, optimizer


def nested(tied: bool = False, seed: int = 0) -> dict[str, Any]:
    model, optim = get_state_dict(*trained(tied, seed))
    return {"model": model, "optim": optim, "epoch": 3, "data": {"files": ["a", "b"], "position": torch.tensor([4, 5])}}


def flattened(seed: int = 0) -> dict[str, Any]:
    """torchtitan's layout."""
    model, optim = get_state_dict(*trained(False, seed), options=StateDictOptions(flatten_optimizer_state_dict=True))
    return {**model, "optimizer": optim, "train_state": {"step": torch.tensor(3, dtype=torch.int32)}}


def types() -> dict[str, Any]:
    """A tensor of every element type, with and without dimensions, empty, strided, and shared."""
    torch.manual_seed(5)
    out: dict[str, Any] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        raw = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 5))
        out[name] = {"matrix": raw.to(dtype), "number": raw[1, 2].to(dtype), "none": raw[:0].to(dtype)}
    out["strided"] = torch.arange(24.0).reshape(4, 6).t()[1:4]
    out["seven"] = torch.tensor(7.0)
    return out


def blank(state: Any) -> Any:
    """A copy with other values everywhere."""
    copied = copy.deepcopy(state)
    _clear(copied)
    return copied


def _clear(value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value.zero_()
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, (int, float)) and not isinstance(item, bool):
                value[key] = -1
            _clear(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _clear(item)
