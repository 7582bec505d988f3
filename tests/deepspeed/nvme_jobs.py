"""Jobs for the ranks: engines whose optimizer lies on an NVMe disk (ZeRO-Infinity), with real swap files."""

from __future__ import annotations

import shutil
from typing import Any

import torch
import torch.distributed as dist

from tests.engines import operators
from tests.loading.memory_program import peak

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


def engine(folder: str, nvme: str, seed: int, stage: int = 3, size: int = LARGE, groups: int = 2) -> Any:
    """nvme: what is offloaded: '' nothing, 'states', 'all' parameters, too."""
    import ucp.deepspeed

    torch.manual_seed(seed)
    model = Model()
    zero: dict[str, Any] = {"stage": stage, "sub_group_size": size}
    disk = {"device": "nvme", "nvme_path": f"{folder}/nvme{seed}", "pin_memory": False}
    if nvme:
        operators.async_io.use(operators.folder())
        zero["offload_optimizer"] = {**disk, "buffer_count": 4}
    if nvme == "all":
        zero["offload_param"] = {**disk, "buffer_count": 20, "buffer_size": 600_000}
    config = {
        "train_micro_batch_size_per_gpu": 2 * SHARES // dist.get_world_size(),
        "zero_optimization": zero,
        "bf16": {"enabled": True},
        "aio": {"block_size": 1 << 20, "queue_depth": 8, "single_submit": False, "overlap_events": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "ucp": {"enabled": True, "save": {"async": False}, "load": {"prove": "always"}},
    }
    parameters = [{"params": params, "weight_decay": 0.1 / (1 + g)} for g, params in enumerate(by_group(model, groups))]
    return ucp.deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]


def by_group(model: torch.nn.Module, groups: int) -> list[list[torch.nn.Parameter]]:
    of_group: list[list[torch.nn.Parameter]] = [[] for _ in range(groups)]
    for name, param in model.named_parameters():
        of_group[int(name.split(".")[1]) % groups].append(param)
    return of_group


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
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    out = {}
    for name, param in live.module.named_parameters():
        out[f"{name} param"] = safe_get_full_fp32_param(param).clone()
        out.update({f"{name} {key}": safe_get_full_optimizer_state(param, key).clone() for key in STATES})
    return out


def save(folder: str) -> list[float]:
    """Train, and save with DeepSpeed and with this project; the next losses."""
    source = engine(folder, "states", 1, size=SMALL)
    train(source, 3)
    type(source).save_checkpoint(source, f"{folder}/native")
    source.save_checkpoint(f"{folder}/ours")
    wanted = truth(source)
    then = train(source, 3)
    if dist.get_rank() == 0:
        torch.save(wanted, f"{folder}/truth.pt")
    dist.barrier()
    return then


def load(earlier: str, form: str, folder: str, target: dict[str, Any], trained: int = 0, keep: str = "") -> Any:
    """Load what a run saved into another engine, and train on.

    earlier: the run's folder. form: which checkpoint in it. trained: steps that the engine has done already. keep: how
    it is saved after the load: 'native' or 'ours'; '' for not.

    Returns how many tensors were compared, which of them differ, the step counts, whether all was proved, and the next
    losses.
    """
    live = engine(folder, **target)
    train(live, trained)
    live.load_checkpoint(f"{earlier}/{form}")
    found, wanted = truth(live), torch.load(f"{earlier}/truth.pt")
    if keep == "native":
        type(live).save_checkpoint(live, f"{folder}/native")
    elif keep:
        live.save_checkpoint(f"{folder}/{keep}")
    steps = {float(state["step"]) for state in live.optimizer.optimizer.state.values()}
    proof = live.ucp.last_load.proof
    wrong = [name for name in wanted if not torch.equal(wanted[name], found[name])]
    return len(found), wrong, steps, proof is not None and proof.complete, train(live, 3)


def fsdp(folder: str, form: str) -> Any:
    """FSDP2 on the same ranks, in the masters' element type; as `load` returns, without losses."""
    from torch.distributed.fsdp import fully_shard

    import ucp

    model = Model()
    fully_shard(model)
    optimizer = torch.optim.AdamW([{"params": params} for params in by_group(model, 2)], lr=1e-3)
    proof = ucp.load_training(
        f"{folder}/{form}", model=model, optimizer=optimizer, rng=False, prove="always"
    ).tensors.proof
    wanted: dict[str, torch.Tensor] = torch.load(f"{folder}/truth.pt")
    found: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        found[f"{name} param"] = param.full_tensor()  # type: ignore[operator]
        found.update({f"{name} {key}": optimizer.state[param][key].full_tensor() for key in STATES})
    wrong = [name for name in wanted if not torch.equal(wanted[name], found[name].detach())]
    steps = {float(state["step"]) for state in optimizer.state.values()}
    return len(found), wrong, steps, proof is not None and proof.complete


def refused(earlier: str, form: str, folder: str) -> tuple[str, list[str]]:
    """What a load says whose swap folder's disk is said to be full, and which masters it changed."""
    from ucp.errors import UcpError

    live = engine(folder, "states", 1, size=SMALL)
    usage = shutil.disk_usage
    masters = masters_of(live)
    shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 20)
    try:
        live.load_checkpoint(f"{earlier}/{form}")
        said = ""
    except UcpError as error:
        said = error.whole
    now = masters_of(live)
    return said, [name for name, master in masters.items() if not torch.equal(master, now[name])]


def masters_of(live: Any) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(param).clone() for name, param in live.module.named_parameters()}


# --- memory ----------------------------------------------------------------------------------------------------------

WIDTH, LAYERS, OF_SUBGROUP = 1536, 12, 2
SUBGROUP = 3 * 4 * OF_SUBGROUP * WIDTH**2
"""Bytes of a subgroup's masters and states. There are six."""
MEMORY = 64 << 20


def large(folder: str, seed: int) -> Any:
    import ucp.deepspeed

    operators.async_io.use(operators.folder())
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    disk = {"device": "nvme", "nvme_path": f"{folder}/nvme{seed}", "pin_memory": False, "buffer_count": 4}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "sub_group_size": OF_SUBGROUP * WIDTH**2, "offload_optimizer": disk},
        "bf16": {"enabled": True},
        "aio": {"block_size": 1 << 20, "queue_depth": 8, "single_submit": False, "overlap_events": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "ucp": {"enabled": True, "load": {"memory": MEMORY}},
    }
    return ucp.deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def step(live: Any) -> None:
    live.backward(live(torch.ones(1, WIDTH, dtype=torch.bfloat16)).float().pow(2).mean())
    live.step()


def measure(folder: str) -> dict[str, int]:
    """What a save and loads take of anonymous memory at the most, and what the saver's copies may take, in bytes."""
    source = large(folder, 1)
    step(source)
    type(source).save_checkpoint(source, f"{folder}/native")
    took = {"staged": source.ucp.saver.memory}
    with peak() as growth:
        source.save_checkpoint(f"{folder}/ours")
        source.ucp.wait()
    took["save"] = growth[0]
    for name, trained in (("ours", False), ("native", True)):
        target = large(folder, 2 + len(took))
        if trained:
            step(target)
        with peak() as growth:
            target.load_checkpoint(f"{folder}/{name}")
        took[f"{name} into {'used' if trained else 'new'}"] = growth[0]
    return took
