"""Ranks whose optimizer lies on an NVMe disk, as a program of its own: DeepSpeed's operator is linked with libaio.

``torchrun nvme_jobs.py FOLDER`` trains, saves with DeepSpeed and with this project, loads into engines of other kinds
and prints a line of JSON for each load: what differs, and the losses of the next steps. With the folder of a run on
another number of ranks as a second argument, it loads what that run saved. With ``memory`` in its place one rank prints
what each save and load takes of anonymous memory at the most.
"""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

import ucp
import ucp.deepspeed
from tests.loading.memory_program import peak
from ucp.errors import UcpError

STATES = ("exp_avg", "exp_avg_sq")
SMALL, LARGE = 700_000, 10**9
WIDTHS = (700, 701)
SHARES = 2  # of each batch, which one rank has together


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
        "train_micro_batch_size_per_gpu": 2 * SHARES // dist.get_world_size(),
        "zero_optimization": zero,
        "bf16": {"enabled": True},
        "aio": {"block_size": 1 << 20, "queue_depth": 8, "single_submit": False, "overlap_events": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "ucp": {"enabled": True, "save": {"async": False}, "load": {"prove": "always"}},
    }
    parameters = [{"params": params, "weight_decay": 0.1 / (1 + g)} for g, params in enumerate(of_group)]
    return ucp.deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]


def train(live: Any, steps: int) -> list[float]:
    """The losses, the mean over the ranks."""
    ranks, losses = dist.get_world_size(), []
    for step in range(live.global_steps, live.global_steps + steps):
        shares = range(dist.get_rank(), SHARES, ranks)
        generators = (torch.Generator().manual_seed(10 * step + share) for share in shares)
        x = torch.cat([torch.randn(2, WIDTHS[0], generator=g) for g in generators]).bfloat16()
        loss = (live(x) - x).float().pow(2).mean()
        live.backward(loss)
        live.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / ranks)
    return losses


def truth(live: Any) -> dict[str, torch.Tensor]:
    """The live engine's own buffers, by DeepSpeed's own functions."""
    out = {}
    for name, param in live.module.named_parameters():
        out[f"{name} param"] = safe_get_full_fp32_param(param).clone()
        out.update({f"{name} {key}": safe_get_full_optimizer_state(param, key).clone() for key in STATES})
    return out


def compare(what: str, live: Any, folder: str, wanted: dict[str, torch.Tensor], then: list[float]) -> None:
    live.load_checkpoint(folder)
    found = truth(live)
    wrong = [name for name in wanted if not torch.equal(wanted[name], found[name])]
    steps = {float(state["step"]) for state in live.optimizer.optimizer.state.values()}
    proved = live.ucp.last_load.proof is not None and live.ucp.last_load.proof.complete
    result = {"what": what, "count": len(found), "wrong": wrong, "steps": sorted(steps), "proved": proved}
    result["losses"] = train(live, 3)
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
    then = train(source, 3)
    if dist.get_rank() == 0:
        torch.save((wanted, then), f"{folder}/truth.pt")
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
    if dist.get_rank() == 0:
        ucp.convert(f"{folder}/native", f"{folder}/universal")
    dist.barrier()
    again = engine(folder, "", 7, stage=2, groups=2)
    compare("native, as universal, to stage 2", again, f"{folder}/universal", wanted, then)
    compare("universal to NVMe", engine(folder, "states", 8, size=SMALL, groups=2), f"{folder}/universal", wanted, then)
    fsdp(f"{folder}/native", wanted)


def fsdp(folder: str, wanted: dict[str, torch.Tensor]) -> None:
    """FSDP2 on the same ranks, in the masters' element type."""
    from torch.distributed.fsdp import fully_shard

    model = Model()
    fully_shard(model)
    groups: list[list[torch.nn.Parameter]] = [[], []]
    for name, param in model.named_parameters():
        groups[int(name.split(".")[1]) % 2].append(param)
    optimizer = torch.optim.AdamW([{"params": params} for params in groups], lr=1e-3)
    report = ucp.load_training(folder, model=model, optimizer=optimizer, rng=False, prove="always").tensors
    found: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        found[f"{name} param"] = param.full_tensor()  # type: ignore[operator]
        found.update({f"{name} {key}": optimizer.state[param][key].full_tensor() for key in STATES})
    wrong = [name for name in wanted if not torch.equal(wanted[name], found[name].detach())]
    steps = {float(state["step"]) for state in optimizer.state.values()}
    result = {"what": "native to FSDP2", "count": len(found), "wrong": wrong, "steps": sorted(steps)}
    result["proved"] = report.proof is not None and report.proof.complete
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps({**result, "losses": [], "then": []}), flush=True)


def again(folder: str, earlier: str) -> None:
    """What a run on another number of ranks saved, into NVMe on these; what comes of that is saved, too."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    wanted, then = torch.load(f"{earlier}/truth.pt")
    for seed, form in enumerate(("native", "ours"), 1):
        live = engine(folder, "states", seed, size=SMALL, groups=2)
        refuse(live, f"{earlier}/{form}")
        compare(f"{form} of other ranks to NVMe", live, f"{earlier}/{form}", wanted, then)
        live.load_checkpoint(f"{earlier}/{form}")
        if form == "ours":
            live.save_checkpoint(f"{folder}/ours")
        else:
            type(live).save_checkpoint(live, f"{folder}/native")
    if dist.get_rank() == 0:
        torch.save((wanted, then), f"{folder}/truth.pt")


def refuse(live: Any, folder: str) -> None:
    """A load into a swap folder whose disk is said to be full."""
    usage = shutil.disk_usage
    masters = {name: safe_get_full_fp32_param(param).clone() for name, param in live.module.named_parameters()}
    shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 20)
    try:
        live.load_checkpoint(folder)
        said = ""
    except UcpError as error:
        said = error.whole
    shutil.disk_usage = usage
    now = {name: safe_get_full_fp32_param(param) for name, param in live.module.named_parameters()}
    changed = [name for name, master in masters.items() if not torch.equal(master, now[name])]
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps({"refused": said, "changed": changed}), flush=True)


# --- memory ----------------------------------------------------------------------------------------------------------

WIDTH, LAYERS, OF_SUBGROUP = 1536, 12, 2
SUBGROUP = 3 * 4 * OF_SUBGROUP * WIDTH**2
"""Bytes of a subgroup's masters and states. There are six."""
MEMORY = 64 << 20


def large(folder: str, seed: int, offloaded: bool = True) -> Any:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    zero: dict[str, Any] = {"stage": 3, "sub_group_size": OF_SUBGROUP * WIDTH**2}
    disk = {"device": "nvme", "nvme_path": f"{folder}/nvme{seed}", "pin_memory": False, "buffer_count": 4}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero | ({"offload_optimizer": disk} if offloaded else {}),
        "bf16": {"enabled": True},
        "aio": {"block_size": 1 << 20, "queue_depth": 8, "single_submit": False, "overlap_events": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "ucp": {"enabled": True, "load": {"memory": MEMORY}},
    }
    return ucp.deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def step(live: Any) -> None:
    live.backward(live(torch.ones(1, WIDTH, dtype=torch.bfloat16)).float().pow(2).mean())
    live.step()


def measure(folder: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    source = large(folder, 1)
    step(source)
    type(source).save_checkpoint(source, f"{folder}/native")
    took = {"staged": source.ucp.saver.memory}
    with peak() as growth:
        source.save_checkpoint(f"{folder}/ours")
        source.ucp.wait()
    took["save"] = growth[0]
    for name, trained in (("ours", False), ("native", False), ("native", True)):
        target = large(folder, 2 + len(took))
        if trained:
            step(target)
        with peak() as growth:
            target.load_checkpoint(f"{folder}/{name}")
        took[f"{name} into {'used' if trained else 'new'}"] = growth[0]
    plain = large(folder, 9, offloaded=False)
    step(plain)
    with peak() as growth:
        plain.load_checkpoint(f"{folder}/native")
    took["native into stage 3 in memory"] = growth[0]
    print("RESULT " + json.dumps(took), flush=True)


if __name__ == "__main__":
    if sys.argv[2:] == ["memory"]:
        measure(sys.argv[1])
    elif sys.argv[2:]:
        again(sys.argv[1], sys.argv[2])
    else:
        main(sys.argv[1])
