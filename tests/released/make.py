"""Makes this release's checkpoints in this folder: one of each form of our own format, each with its truth.

    python -m tests.released.make tests/released/0.1.0

It is run once for each release, and what it made is never changed: `test_released` reads all of it for ever. The truth
(``truth/NAME.safetensors`` and ``.json``) comes from the live buffers of DeepSpeed's engines, from FSDP2's shards and
from torch's own state dicts, never from this project's reader. ``index.json`` says which checkpoint has which truth.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

CLIENT_STATE = {"note": "released", "pair": (1, 2.5), "deep": {"ü": [None, True, b"\x00\xff"]}}
CLIENT_TENSOR = torch.arange(5, dtype=torch.int32)
# Of the files that the virtual checkpoint points at, since a clone does not keep modification times.
MTIME = 1_700_000_000

# name: (ranks, what to run, its arguments)
RUNS = {
    "zero1-bf16": (2, "deepspeed", {"stage": 1, "bf16": True}),
    "zero3-fp32": (3, "deepspeed", {"stage": 3, "bf16": False}),
    "native-zero2": (2, "deepspeed", {"stage": 2, "bf16": False, "native": True}),
    "fsdp2": (2, "fsdp2", {}),
    "dtensors": (2, "dtensors", {}),
    "llama": (2, "llama", {}),
}
# name: (source, options of convert)
CONVERTED: dict[str, tuple[str, dict[str, Any]]] = {
    "consolidated": ("zero1-bf16", {}),
    "consolidated-fsdp2": ("fsdp2", {}),
    "virtual": ("native-zero2", {"virtual": True, "digests": True}),
    "virtual-fragmented": ("zero3-fp32", {"virtual": True}),
}


class Model(nn.Module):
    """Tied, frozen, one-element and prime-sized parameters, and a buffer: about 300 elements."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.up = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.down = nn.Linear(13, 7, bias=False)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.randn(5, 3), requires_grad=False)
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.down(self.norm(self.up(self.embed(tokens))))
        return (self.head(hidden) * self.gain).float().logsumexp(-1).mean()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def tokens(step: int) -> Tensor:
    return (torch.arange(6).reshape(2, 3) + step + dist.get_rank()) % 11


def everyones(value: Any) -> list[Any]:
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def write_truth(
    folder: Path,
    name: str,
    parameters: dict[str, dict[str, Tensor]],
    others: dict[str, dict[str, Tensor]],
    said: dict[str, Any],
) -> None:
    """parameters: of trained ones every state. others: kind -> name -> tensor. said: of the training state."""
    generators = everyones(torch.get_rng_state())
    if dist.get_rank():
        return
    tensors = {f"{n}|{s}": t for n, states in parameters.items() for s, t in states.items() if t.dim() or s == "param"}
    tensors |= {f"{n}|param": t for kind in others.values() for n, t in kind.items()}
    tensors |= {f"generator|{rank}": t for rank, t in enumerate(generators)} if said.get("generators") else {}
    if said.get("client_state"):
        tensors["client_state|tensor"] = CLIENT_TENSOR
    kinds = dict.fromkeys(parameters, "parameter") | {n: kind for kind, found in others.items() for n in found}
    (folder / "truth").mkdir(exist_ok=True)
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, folder / f"truth/{name}.safetensors")
    text = json.dumps({"kinds": kinds, **said}, indent=1, default=float)
    (folder / f"truth/{name}.json").write_text(text + "\n", encoding="utf-8")


def run_deepspeed(folder: Path, name: str, stage: int, bf16: bool, native: bool = False) -> None:
    import deepspeed

    import ucp.deepspeed
    from tests.engines import truth

    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 7}},
        "bf16": {"enabled": bf16},
        "ucp": {"enabled": True, "save": {"format": "deepspeed" if native else "universal"}},
    }
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2)
    engine, *_ = ucp.deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(3):
        engine.backward(engine(tokens(step)))
        engine.step()
    torch.manual_seed(100 + dist.get_rank())
    engine.save_checkpoint(str(folder / name), client_state={**CLIENT_STATE, "tensor": CLIENT_TENSOR})
    engine.ucp.wait()
    found = truth.gather(engine)
    frozen = {} if found is None else dict(found.frozen)
    said: dict[str, Any] = {"client_state": True, "generators": not native}
    if found is not None:
        said |= {
            "aliases": {"embed.weight": ["head.weight"]},
            "groups": [{k: v for k, v in g.items() if k in KEYS} for g in found.groups],
            "lr_scheduler": found.lr_scheduler,
            "counters": found.counters,
            "step": 3,
        }
    params = {} if found is None else {n: dict(s) for n, s in found.params.items()}
    write_truth(folder, name, params, {"frozen": frozen, "buffer": {"seen": model.seen}}, said)


KEYS = ("names", "lr", "weight_decay", "betas", "eps")


def llama() -> nn.Module:
    """A Llama of about 1,500 elements, which the READMEs' commands are run with, too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def run_llama(folder: Path, name: str) -> None:
    """Two checkpoints of a run: the older one by stock DeepSpeed, the newer one by us. Beside them the model folder."""
    import deepspeed

    import ucp.deepspeed
    from tests.engines import truth

    deepspeed.init_distributed("gloo")
    model = llama()
    if not dist.get_rank():
        model.save_pretrained(folder / f"{name}-base")
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "ucp": {"enabled": True},
    }
    engine, *_ = ucp.deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for step in range(4):
        engine.backward(engine(input_ids=tokens(step), use_cache=False).logits.logsumexp(-1).mean())
        engine.step()
        if step == 1:
            deepspeed.DeepSpeedEngine.save_checkpoint(engine, str(folder / name))
    torch.manual_seed(100 + dist.get_rank())
    engine.save_checkpoint(str(folder / name))
    engine.ucp.wait()
    found = truth.gather(engine)
    said: dict[str, Any] = {"generators": True}
    if found is not None:
        groups = [{k: v for k, v in g.items() if k in KEYS} for g in found.groups]
        said |= {"aliases": {}, "groups": groups, "counters": found.counters, "step": 4}
    write_truth(folder, name, {} if found is None else {n: dict(s) for n, s in found.params.items()}, {}, said)


class Loader:
    """A data loader's state: each rank's own."""

    def state_dict(self) -> dict[str, Any]:
        return {"at": 10 + dist.get_rank(), "left": list(range(dist.get_rank(), 4))}


def run_fsdp2(folder: Path, name: str) -> None:
    from torch.distributed.fsdp import fully_shard

    import ucp
    from tests.engines.fsdp import state_of

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Model()
    fully_shard(model.up)
    fully_shard(model)
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for step in range(3):
        model(tokens(step)).backward()
        optimizer.step()
        scheduler.step()
    torch.manual_seed(100 + dist.get_rank())
    ucp.save_training(
        folder / name,
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        dataloader=Loader(),
        step=3,
        samples=12,
        extra={**CLIENT_STATE, "tensor": CLIENT_TENSOR},
    )
    state = state_of(model, optimizer)
    params = {n: dict(s) for n, s in state.params.items() if n != "frozen"}
    write_truth(
        folder,
        name,
        params,
        {"frozen": {"frozen": state.params["frozen"]["param"]}, "buffer": dict(state.buffers)},
        {
            "client_state": True,
            "generators": True,
            "aliases": {"embed.weight": ["head.weight"]},
            "groups": [{k: v for k, v in g.items() if k in KEYS} for g in state.groups],
            "lr_scheduler": scheduler.state_dict(),
            "counters": {"global_steps": 3, "global_samples": 12},
            "loaders": everyones(Loader().state_dict()),
            "step": 3,
        },
    )


def run_dtensors(folder: Path, name: str) -> None:
    """A bare state dict: DTensors cut along either dimension and unevenly, bf16, and a tensor of each rank's own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    import ucp

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = {
        "rows.weight": torch.randn(5, 4),
        "columns.weight": torch.randn(3, 7, dtype=torch.bfloat16),
        "deep.weight": torch.randn(2, 3, 5),
        "copied.bias": torch.randn(4, dtype=torch.float16),
        "one": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    cuts = [Shard(0), Shard(1), Shard(2), Replicate(), Replicate(), Shard(0)]
    model = {n: distribute_tensor(t, mesh, [cut]) for (n, t), cut in zip(whole.items(), cuts, strict=True)}
    own = torch.arange(4) + 10 * dist.get_rank()
    ucp.save({"model": model, "mine": own, "numbers": {"epoch": 4, "rate": float("inf")}}, folder / name)
    write_truth(
        folder,
        name,
        {n: {"param": t} for n, t in whole.items()},
        {},
        {"aliases": {}, "groups": [], "counters": {}, "own": [t.tolist() for t in everyones(own)]},
    )


def main(folder: Path) -> None:
    from ucp import convert

    folder.mkdir(parents=True)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for name, (ranks, _, _) in RUNS.items():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        subprocess.run([*command, "-m", "tests.released.make", str(folder), name], env=environment, check=True)
        for script in (folder / name).glob("*.py"):
            script.unlink()  # DeepSpeed's own, beside its checkpoints
        for file in (folder / name).rglob("*"):
            os.utime(file, (MTIME, MTIME))
    index = {name: {"truth": name} for name in RUNS}
    for name, (source, options) in CONVERTED.items():
        convert(folder / source, folder / name, **options)
        index[name] = {"truth": source}
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        folder, name = Path(sys.argv[1]), sys.argv[2]
        _, job, arguments = RUNS[name]
        jobs = {"deepspeed": run_deepspeed, "fsdp2": run_fsdp2, "dtensors": run_dtensors, "llama": run_llama}
        jobs[job](folder, name, **arguments)
        dist.barrier()
        dist.destroy_process_group()
