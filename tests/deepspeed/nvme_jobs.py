"""Ranks whose optimizer lies on an NVMe disk, as a program of its own: DeepSpeed's operator is linked with libaio.

``torchrun nvme_jobs.py FOLDER`` trains, saves with DeepSpeed and with this project, loads into engines of other kinds
and prints a line of JSON for each load: what differs, and the loss of the next step.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

import ucp.deepspeed

STATES = ("exp_avg", "exp_avg_sq")
SMALL, LARGE = 700_000, 10**9
WIDTHS = (700, 701)


class Model(torch.nn.Module):
    """Six layers, of which a subgroup of one rank has more than DeepSpeed's least size of a swapped tensor, 1 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTHS[i % 2], WIDTHS[1 - i % 2]) for i in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def engine(folder: str, nvme: str, seed: int, stage: int = 3, size: int = LARGE, groups: int = 1) -> Any:
    """nvme: what is offloaded: '' nothing, 'states', 'all' parameters, too."""
    torch.manual_seed(seed)
    model = Model()
    zero: dict[str, Any] = {"stage": stage, "sub_group_size": size}
    disk = {"device": "nvme", "nvme_path": f"{folder}/nvme{seed}", "pin_memory": False}
    if nvme:
        zero["offload_optimizer"] = {**disk, "buffer_count": 4}
    if nvme == "all":
        zero["offload_param"] = {**disk, "buffer_count": 20, "buffer_size": 600_000}
    named = list(model.named_parameters())
    of_group: list[list[torch.nn.Parameter]] = [[] for _ in range(groups)]
    for name, param in named:
        of_group[int(name.split(".")[1]) % groups].append(param)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "bf16": {"enabled": True},
        "aio": {"block_size": 1 << 20, "queue_depth": 8, "single_submit": False, "overlap_events": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "ucp": {"enabled": True, "save": {"async": False}},
    }
    parameters = [{"params": params, "weight_decay": 0.1 / (1 + g)} for g, params in enumerate(of_group)]
    return ucp.deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]


def train(live: Any, steps: int) -> float:
    """The last loss, the mean over the ranks."""
    loss = torch.zeros(1)
    for step in range(live.global_steps, live.global_steps + steps):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        x = torch.randn(2, WIDTHS[0], generator=generator).bfloat16()
        loss = (live(x) - x).float().pow(2).mean()
        live.backward(loss)
        live.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total)


def truth(live: Any) -> dict[str, torch.Tensor]:
    """The live engine's own buffers, by DeepSpeed's own functions."""
    out = {}
    for name, param in live.module.named_parameters():
        out[f"{name} param"] = safe_get_full_fp32_param(param).clone()
        out.update({f"{name} {key}": safe_get_full_optimizer_state(param, key).clone() for key in STATES})
    return out


def compare(what: str, live: Any, folder: str, wanted: dict[str, torch.Tensor], then: float) -> None:
    live.load_checkpoint(folder)
    found = truth(live)
    wrong = [name for name in wanted if not torch.equal(wanted[name], found[name])]
    steps = {float(state["step"]) for state in live.optimizer.optimizer.state.values()}
    result = {"what": what, "count": len(found), "wrong": wrong, "steps": sorted(steps), "loss": train(live, 1)}
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps({**result, "then": then}), flush=True)


def main(folder: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for minutes, and not needed
    deepspeed.init_distributed("gloo")
    source = engine(folder, "states", 1, size=SMALL, groups=2)
    train(source, 3)
    native = type(source).save_checkpoint
    native(source, f"{folder}/native")
    source.save_checkpoint(f"{folder}/ours")
    wanted = truth(source)
    then = train(source, 1)
    wide = engine(folder, "states", 2, size=SMALL, groups=2)
    compare("native to NVMe", wide, f"{folder}/native", wanted, then)
    compare("ours to NVMe that has trained", wide, f"{folder}/ours", wanted, then)
    compare("native to parameters on NVMe", engine(folder, "all", 3, groups=2), f"{folder}/native", wanted, then)
    compare("ours to stage 1", engine(folder, "", 4, stage=1, groups=2), f"{folder}/ours", wanted, then)
    plain = engine(folder, "", 5, groups=2)
    compare("native to stage 3", plain, f"{folder}/native", wanted, then)
    plain.load_checkpoint(f"{folder}/ours")
    plain.save_checkpoint(f"{folder}/plain")
    compare("stage 3 to NVMe", engine(folder, "states", 6, size=SMALL, groups=2), f"{folder}/plain", wanted, then)


if __name__ == "__main__":
    main(sys.argv[1])
