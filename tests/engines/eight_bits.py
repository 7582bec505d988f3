"""An Adam whose states are codes of 8 bits, laid out as bitsandbytes' AdamW8bit lays them out.

For each state one code an element, in the parameter's shape, a map of 256 values, and the largest value of each 256
elements. bitsandbytes itself is no requirement of the tests.
"""

from __future__ import annotations

from typing import Any

import torch

BLOCK = 256
STATES = {"1": -1.0, "2": 0.0}
"""Each state's number, and the least value of its map."""


class EightBits(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                moments = []
                for (number, least), beta, new in zip(
                    STATES.items(), group["betas"], (p.grad, p.grad.square()), strict=True
                ):
                    old = dequantised(state, number) if f"state{number}" in state else torch.zeros_like(p)
                    quantise(state, number, beta * old + (1 - beta) * new, least)
                    moments.append(dequantised(state, number))
                p.add_(moments[0] / (moments[1].sqrt() + 1e-6), alpha=-group["lr"])


def dequantised(state: dict[str, Any], number: str) -> torch.Tensor:
    """What the codes stand for."""
    codes = state[f"state{number}"]
    scales = state[f"absmax{number}"].repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
    values: torch.Tensor = state[f"qmap{number}"][codes.int()] * scales
    return values


def quantise(state: dict[str, Any], number: str, values: torch.Tensor, least: float) -> None:
    """Keep the codes of the nearest values of the map."""
    qmap = torch.linspace(least, 1, 256)
    blocks = values.flatten().split(BLOCK)
    absmax = torch.stack([block.abs().max() for block in blocks])
    scaled = torch.cat([block / top.clamp(min=1e-30) for block, top in zip(blocks, absmax, strict=True)])
    codes = (scaled[:, None] - qmap).abs().argmin(-1).to(torch.uint8).view(values.shape)
    state |= {f"state{number}": codes, f"qmap{number}": qmap, f"absmax{number}": absmax}
