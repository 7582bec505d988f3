"""One rank of a measurement: started by torch.distributed.run anew for every checkpoint made and every load."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bench_tools
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)
    report = ROLES[args.role](args)
    if dist.get_rank() == 0:
        args.report.write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("role", choices=list(ROLES))
    for name in ("data", "report", "to", "source"):
        parser.add_argument(f"--{name}", type=Path)
    for name in ("hidden", "layers"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cache", choices=["warm", "cold"])
    parser.add_argument("--by", default="ours", help="whose load")
    parser.add_argument("--into", choices=["live", "new"], help="FSDP2: live states, or an optimizer without any")
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
    with torch.device(args.device):
        return LlamaForCausalLM(config)


def one_step(model: Any, backward: Callable[[Any], None], step: Callable[[], Any]) -> None:
    tokens = torch.randint(0, 1000, (1, 8), device=next(model.parameters()).device)
    backward(model(input_ids=tokens, labels=tokens).loss)
    step()


def engine(args: argparse.Namespace, stage: int, **extra: Any) -> Any:
    import deepspeed

    # DeepSpeed would look for a compiler and build a kernel for inference, which takes a minute and is not used here.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(BACKENDS[args.device])
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
    """One engine of ZeRO-3, filled once: by DeepSpeed from its own layout, or by us from any."""
    import deepspeed

    live = engine(args, stage=3, ucp={"enabled": True, "save": {"format": "deepspeed"}})
    if args.by == "ours":
        return _timed(args, lambda: _told(live, live.load_checkpoint(str(args.source))))
    return _timed(args, lambda: deepspeed.DeepSpeedEngine.load_checkpoint(live, str(args.source)) and None)


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The least that a load of masters and two states does here, by two threads a rank: its part of the files' first
    third is compared with a CRC-32, and then read again and rounded; the rest is read once into fresh memory, with its
    CRC-32. Nothing is planned, opened or agreed upon."""
    from ucp.storage.crc32 import crc32

    dist.init_process_group(BACKENDS[args.device])
    step, pool = 1 << 20, ThreadPoolExecutor(2)
    paths = sorted(args.source.glob("*.safetensors"))
    every = [(path, at) for path in paths for at in range(0, path.stat().st_size, step)]
    own = every[dist.get_rank() :: dist.get_world_size()]
    masters = torch.ones(len(own) // 3 * step // 4)
    weights = masters.to(torch.bfloat16)
    files = {path: os.open(path, os.O_RDONLY) for path, _ in every}

    def read(blocks: list[tuple[Path, int]], into: Any, check: bool) -> None:
        for k, (path, at) in enumerate(blocks):
            piece = into[k * step % len(into) :][:step]
            count = os.preadv(files[path], [piece], at)
            if check:
                crc32(piece[:count])

    def both(blocks: list[tuple[Path, int]], into: Any, check: bool) -> None:
        half = len(blocks) // 2
        second = into[half * step :] if len(into) > step else bytearray(step)
        found = [pool.submit(read, blocks[:half], into, check), pool.submit(read, blocks[half:], second, check)]
        for one in found:
            one.result()

    def work() -> None:
        checked, rest = own[: len(own) // 3], own[len(own) // 3 :]
        both(checked, memoryview(bytearray(step)), True)
        dist.barrier()
        fresh = mmap.mmap(-1, len(rest) * step, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        fresh.madvise(mmap.MADV_HUGEPAGE)
        both(rest, memoryview(fresh), True)
        both(checked, memoryview(masters.view(torch.uint8).numpy()), False)
        weights.copy_(masters)

    return _timed(args, work)


def _told(live: Any, loaded: Any) -> Any:
    return live.ucp.last_load if loaded else None


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
    """FSDP2, filled once: a state dict of live tensors in place, or a resume, whose optimizer has no states yet."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    import ucp

    model, optimizer = _sharded(args)
    if args.into == "new":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def work() -> Any:
        if args.by == "ours" and args.into == "new":
            return ucp.load_training(args.source, model=model, optimizer=optimizer, rng=False).tensors
        state = _state(model, optimizer)
        if args.by == "ours":
            return ucp.load(state, args.source)
        dcp.load(state, checkpoint_id=str(args.source))
        if args.into == "new":
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return None

    return _timed(args, work)


def _sharded(args: argparse.Namespace) -> tuple[Any, Any]:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group(BACKENDS[args.device])
    model = build_model(args).to(args.device)
    mesh = torch.distributed.device_mesh.init_device_mesh(args.device, (dist.get_world_size(),))
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


def _timed(args: argparse.Namespace, work: Callable[[], Any]) -> dict[str, Any]:
    """One call from start to return. Of the slowest or largest rank: seconds, anonymous host memory and memory of the
    device at their peaks beyond what was there before. processor: seconds of all ranks together."""
    if dist.get_rank() == 0:
        (bench_tools.drop_cache if args.cache == "cold" else bench_tools.warm_cache)(args.source)
    dist.barrier()
    bench_tools.warm_memory(bench_tools.nbytes(args.source) // dist.get_world_size())
    _settle(args)
    dist.barrier()
    before = _device_memory(args, anew=True)
    proving = _processor_of_proofs()
    began = time.perf_counter(), time.process_time()
    with bench_tools.HostMemory() as host:
        told = work()
        returned = time.perf_counter()
        _settle(args)
        seconds = time.perf_counter() - began[0]
        settling = time.perf_counter() - returned
    processor = time.process_time() - began[1]
    most = _reduced(args, [seconds, host.growth, _device_memory(args) - before], dist.ReduceOp.MAX)
    found = {"seconds": most[0], "host": most[1], "device": most[2], "processor": _reduced(args, [processor])[0]}
    if told is not None:
        needed, read = _reduced(args, [told.nbytes, told.bytes_read])
        found |= {"nbytes": needed, "bytes_read": read, "proof": str(told.proof), "stages": dict(told.seconds)}
        found |= {"within": dict(told.overlapping), "settle": settling}
        found |= {"strategy": told.strategy}
        # Of the slowest rank, and of all ranks together.
        found |= {"prove": _reduced(args, [told.seconds["prove"]], dist.ReduceOp.MAX)[0]}
        found |= {"prove_processor": _reduced(args, [proving[0]])[0]}
    return found


def _processor_of_proofs() -> list[float]:
    """The processor seconds of this process's proofs from now on, counted as they pass."""
    from ucp.loading import proof

    real, spent = proof.prove, [0.0]

    def prove(*given: Any, **named: Any) -> Any:
        began = time.process_time()
        try:
            return real(*given, **named)
        finally:
            spent[0] += time.process_time() - began

    proof.prove = prove
    return spent


def _settle(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def _device_memory(args: argparse.Namespace, anew: bool = False) -> int:
    if args.device == "cpu":
        return 0
    if anew:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def _reduced(args: argparse.Namespace, values: list[float], how: Any = dist.ReduceOp.SUM) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=args.device)
    dist.all_reduce(total, how)
    return total.tolist()


def limits(args: argparse.Namespace) -> dict[str, Any]:
    """GB/s of all ranks together, at the same time: files of `source` read plainly by 8 threads a rank into one buffer,
    from the page cache and past it; and copies of pinned memory to the devices."""
    dist.init_process_group(BACKENDS[args.device])
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        bench_tools.warm_cache(args.source)
    found = {}
    for name, direct in (("page cache", False), ("disk", True)):
        dist.barrier()
        _reduced(args, [0.0])
        began = time.perf_counter()
        nbytes = bench_tools.read_plainly(args.source, part=(rank, size), direct=direct)
        seconds = _reduced(args, [time.perf_counter() - began], dist.ReduceOp.MAX)[0]
        found[name] = _reduced(args, [nbytes])[0] / seconds / 1e9
    if args.device == "cuda":
        held = torch.empty(1 << 30, dtype=torch.uint8).pin_memory()
        there = torch.empty_like(held, device="cuda")
        for _ in range(3):
            _settle(args)
            dist.barrier()
            began = time.perf_counter()
            there.copy_(held, non_blocking=True)
            _settle(args)
            seconds = _reduced(args, [time.perf_counter() - began], dist.ReduceOp.MAX)[0]
            found["host to device"] = size * held.nbytes / seconds / 1e9
    return found


ROLES = {
    "make": make,
    "make-target": make_target,
    "load": load,
    "plain": plain,
    "dcp-make": dcp_make,
    "fsdp-make": fsdp_make,
    "fsdp-load": fsdp_load,
    "limits": limits,
}
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}

if __name__ == "__main__":
    main()
