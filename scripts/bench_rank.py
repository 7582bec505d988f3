"""One rank of a measurement: started by torch.distributed.run, once for every checkpoint made or loaded."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_tools
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

Turn = tuple[float, float]  # seconds, processor seconds


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = ROLES[args.role](args)
    if dist.get_rank() == 0:
        args.report.write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("role", choices=list(ROLES))
    for name in ("data", "report", "to", "source", "native"):
        parser.add_argument(f"--{name}", type=Path)
    for name in ("hidden", "layers", "repeats"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--cache", choices=["warm", "cold"])
    parser.add_argument("--works", default="")
    return parser.parse_args()


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    heads = max(args.hidden // 64, 1)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def one_step(model: Any, backward: Callable[[Any], None], step: Callable[[], Any]) -> None:
    tokens = torch.randint(0, 1000, (1, 8))
    backward(model(input_ids=tokens, labels=tokens).loss)
    step()


def engine(args: argparse.Namespace, stage: int, **extra: Any) -> Any:
    import deepspeed

    # DeepSpeed would look for a compiler and build a kernel for inference, which takes a minute and is not used here.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        **extra,
    }
    if extra:
        import ucp.deepspeed

        return ucp.deepspeed.initialize(model=build_model(args), config=config)[0]
    return deepspeed.initialize(model=build_model(args), config=config)[0]


def make(args: argparse.Namespace) -> dict[str, Any]:
    made = engine(args, stage=1)
    one_step(made, made.backward, made.step)
    made.save_checkpoint(str(args.to))
    return {}


def make_target(args: argparse.Namespace) -> dict[str, Any]:
    """A real checkpoint of the target layout: our load brings the state in, DeepSpeed writes it."""
    made = engine(args, stage=3, ucp={"enabled": True, "save": {"format": "deepspeed"}})
    made.load_checkpoint(str(args.source))
    made.save_checkpoint(str(args.to))
    return {}


def load(args: argparse.Namespace) -> dict[str, Any]:
    """One engine of ZeRO-3, filled in turns by DeepSpeed from its own layout, and by us from every source."""
    import deepspeed

    live = engine(args, stage=3, ucp={"enabled": True, "save": {"format": "deepspeed"}})
    works: dict[str, tuple[Path, Callable[[], Any]]] = {
        "native": (args.native, lambda: deepspeed.DeepSpeedEngine.load_checkpoint(live, str(args.native)))
    }
    for name in args.works.split(","):
        folder = args.data / name
        works[name] = (folder, lambda folder=folder: live.load_checkpoint(str(folder)))
    turns: dict[str, list[Turn]] = {name: [] for name in works}
    stages: dict[str, Any] = {}
    for _ in range(args.repeats + 1):  # the first turn allocates what the later ones fill
        for name, (folder, work) in works.items():
            turns[name].append(_timed(args, folder, work))
            if name != "native":
                stages[name] = {
                    "nbytes": _sum(live.ucp.last_load.nbytes),
                    "bytes_read": _sum(live.ucp.last_load.bytes_read),
                    **live.ucp.last_load.seconds,
                }
    return {"turns": {name: found[1:] for name, found in turns.items()}, "stages": stages}


def dcp_make(args: argparse.Namespace) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp

    model, optimizer = _sharded(args)
    dcp.save(_state(model, optimizer), checkpoint_id=str(args.to))
    return {}


def fsdp_make(args: argparse.Namespace) -> dict[str, Any]:
    import ucp

    model, optimizer = _sharded(args)
    ucp.save(_state(model, optimizer), args.to)
    return {}


def fsdp_load(args: argparse.Namespace) -> dict[str, Any]:
    """FSDP2, filled in turns by DCP from its own checkpoint, and by us from that and from ours (--works): a state dict
    of live tensors in place; and a resume, whose optimizer has no states yet."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    import ucp

    model, optimizer = _sharded(args)
    ours = args.data / args.works
    sources = {"dcp": args.source, "ours from dcp": args.source, "ours": ours}
    fresh: list[torch.optim.Optimizer] = []

    def in_place(name: str) -> None:
        state = _state(model, optimizer)
        _fill(name, state)

    def resume(name: str) -> None:
        if name == "dcp":
            state = _state(model, fresh[0])
            _fill(name, state)
            set_state_dict(model, fresh[0], model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        else:
            ucp.load_training(sources[name], model=model, optimizer=fresh[0], rng=False)

    def _fill(name: str, state: dict[str, Any]) -> None:
        if name == "dcp":
            dcp.load(state, checkpoint_id=str(args.source))
        else:
            ucp.load(state, sources[name])

    works = {"in place": in_place, "resume": resume}
    turns: dict[str, dict[str, list[Turn]]] = {work: {name: [] for name in sources} for work in works}
    for _ in range(args.repeats + 1):  # the first turn allocates what the later ones fill
        for work, do in works.items():
            for name, folder in sources.items():
                fresh[:] = [torch.optim.AdamW(model.parameters(), lr=1e-4)]
                turns[work][name].append(_timed(args, folder, lambda do=do, name=name: do(name)))
    return {"turns": {work: {name: t[1:] for name, t in found.items()} for work, found in turns.items()}}


def _sharded(args: argparse.Namespace) -> tuple[Any, Any]:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model = build_model(args)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    one_step(model, lambda loss: loss.backward(), optimizer.step)
    optimizer.zero_grad()  # where there are gradients, torch does not make a new optimizer's states
    return model, optimizer


def _state(model: Any, optimizer: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": states}


def _timed(args: argparse.Namespace, folder: Path, work: Callable[[], Any]) -> Turn:
    """One call from start to return: seconds of the slowest rank, and processor seconds of all ranks together."""
    if dist.get_rank() == 0:
        (bench_tools.drop_cache if args.cache == "cold" else bench_tools.warm_cache)(folder)
    dist.barrier()
    bench_tools.warm_memory(bench_tools.nbytes(folder) // dist.get_world_size())
    dist.barrier()
    began = time.perf_counter(), time.process_time()
    work()
    seconds = torch.tensor([time.perf_counter() - began[0]])
    processor = torch.tensor([time.process_time() - began[1]])
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.all_reduce(processor)
    return float(seconds), float(processor)


def _sum(value: int) -> int:
    total = torch.tensor([value])
    dist.all_reduce(total)
    return int(total)


ROLES = {
    "make": make,
    "make-target": make_target,
    "load": load,
    "dcp-make": dcp_make,
    "fsdp-make": fsdp_make,
    "fsdp-load": fsdp_load,
}

if __name__ == "__main__":
    main()
