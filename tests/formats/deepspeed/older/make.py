"""Makes the checkpoints in this folder with an older DeepSpeed, each with the truth from its engine's own buffers.

In an environment of its own that has that DeepSpeed (and any torch that runs it):

    DS_ACCELERATOR=cpu LOCAL_SIZE=2 torchrun --nproc_per_node 2 make.py FOLDER STAGE DTYPE [tiny] [mics]

FOLDER gets the checkpoint and ``truth.safetensors``, whose names are ``parameter|state``. tiny: a param group of one
element, too, of which most ranks hold padding alone. mics: MiCS over groups of two ranks, which must hold the same.
Nothing here uses this project's library; offsets are those that the optimizer itself steps with.
"""

import json
import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file

STATES = ("exp_avg", "exp_avg_sq")


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 7)
        self.up = torch.nn.Linear(7, 13)
        self.norm = torch.nn.LayerNorm(13)
        self.head = torch.nn.Linear(13, 11, bias=False)
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.frozen = torch.nn.Parameter(torch.randn(5, 3), requires_grad=False)
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, tokens):
        hidden = self.norm(self.up(self.embed(tokens)))
        return (self.head(hidden) * self.gain).float().logsumexp(-1).mean()


def pieces(engine, stage):
    """(name, state, first element, values) of all that this rank holds of the trained parameters."""
    optimizer, names, rank = engine.optimizer, engine.param_names, dist.get_rank()
    inner = optimizer.optimizer
    if hasattr(optimizer, "bf16_groups"):
        flats, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
    elif stage in (1, 2):
        flats, groups = optimizer.single_partition_of_fp32_groups, optimizer.round_robin_bit16_groups
    if stage == 0 and not hasattr(optimizer, "bf16_groups"):
        for masters, params in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, param in zip(masters, params, strict=True):
                for state, found in (("param", master), *((s, inner.state[master][s]) for s in STATES)):
                    yield names[param], state, 0, found.reshape(-1)
    elif stage == 3:
        rank = dist.get_rank(optimizer.dp_process_group)  # under MiCS among the ranks that share one copy
        for flat, params in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            at = 0
            for param in params:
                piece = param.partition_numel()
                held = min(piece, max(param.ds_numel - rank * piece, 0))
                for state, found in (("param", flat), *((s, inner.state[flat][s]) for s in STATES)):
                    yield names[param], state, rank * piece, found[at : at + held]
                at += piece
    else:
        for flat, params in zip(flats, groups, strict=True):
            first, at = rank * flat.numel(), 0
            for param in params:
                lo, hi = max(at, first), min(at + param.numel(), first + flat.numel())
                if hi > lo:
                    for state, found in (("param", flat), *((s, inner.state[flat][s]) for s in STATES)):
                        yield names[param], state, lo - at, found[lo - first : hi - first]
                at += param.numel()


def optimizer_of(model, tiny=False):
    """Two param groups; tiny: the gain is a third one."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for _, p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    if tiny:
        groups[1]["params"] = [p for n, p in trained if p.dim() < 2 and n != "gain"]
        groups.append({"params": [model.gain], "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=1e-2)


def config_of(stage, dtype, mics=False):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if mics:
        config["zero_optimization"]["mics_shard_size"] = 2
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
        # torch computes it on every processor; DeepSpeed asks for instructions that few have
        type(get_accelerator()).is_fp16_supported = lambda self: True
    return config


def gather_one_by_one(outputs, inputs, group=None, async_op=False):
    """The all-gathers that MiCS has NCCL do at once, which gloo cannot ("does not implement startCoalescing")."""
    works = [
        dist.all_gather_into_tensor(there, here, group=group, async_op=True)
        for there, here in zip(outputs, inputs, strict=True)
    ]
    for work in works:
        work.wait()
    return works[-1]


def main() -> None:
    folder, stage, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first, and is not needed
    if "mics" in sys.argv:
        dist.distributed_c10d._all_gather_base_coalesced = gather_one_by_one  # which DeepSpeed takes where there is one
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model = Model()
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    frozen = model.frozen.detach().clone()
    optimizer = optimizer_of(model, tiny="tiny" in sys.argv[4:])
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config_of(stage, dtype, "mics" in sys.argv)
    )
    for step in range(3):
        loss = engine((torch.arange(6).reshape(2, 3) + step + dist.get_rank()) % 11)
        engine.backward(loss)
        with torch.no_grad():  # 0.18 flattens without detaching, which torch refuses since 2.13
            engine.step()
    engine.save_checkpoint(folder, client_state={"note": "older"})
    mine = [(n, s, at, v.detach().clone()) for n, s, at, v in pieces(engine, stage)]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
        truth = {"frozen|param": frozen.to(low)}
        for found in everyone:
            for name, state, at, values in found:
                whole = truth.setdefault(f"{name}|{state}", torch.full(shapes[name], float("nan")))
                place = whole.view(-1)[at : at + values.numel()]
                assert place.isnan().all() or torch.equal(place, values), "two ranks hold it, and differ"
                place.copy_(values)
        assert not any(t.isnan().any() for t in truth.values())
        save_file({k: v.contiguous() for k, v in truth.items()}, f"{folder}/truth.safetensors")
        with open(f"{folder}/made_with.json", "w") as f:
            json.dump({"deepspeed": deepspeed.__version__, "torch": torch.__version__, "ranks": len(everyone)}, f)


if __name__ == "__main__":
    main()
