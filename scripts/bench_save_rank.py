"""One rank of `bench save`: trains a Llama, and saves it in turns by every way there is, under a clock."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_tools
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from ucp.formats.universal import manifest

WARM = 5  # steps before anything is measured
BEFORE = 5  # steps before the save, of those around it


@dataclass(frozen=True)
class Way:
    """A way to save. save: begin, in the training loop; wait: until it is durable; the report that it returns, if any,
    has memory and seconds."""

    save: Callable[[str], Any]
    wait: Callable[[], Any]


def main() -> None:
    args = parse_arguments()
    if args.device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(0 if torch.cuda.device_count() == 1 else _local_rank())
    torch.manual_seed(0)
    model = build_model(args)
    count = sum(p.numel() for p in model.parameters())
    step, ways = fsdp(args, model) if args.role == "fsdp" else zero(args, model, int(args.role[-1]))
    chosen = {name: way for name, way in ways.items() if not args.ways or name in args.ways.split("|")}
    measure(args, step, chosen, count)
    dist.barrier()
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("role")
    parser.add_argument("--device")
    parser.add_argument("--ways", default="", help="names of the ways to save, with | between them; all without")
    for name in ("data", "report"):
        parser.add_argument(f"--{name}", type=Path)
    for name in ("hidden", "layers", "vocabulary", "batch", "length", "steps", "repeats"):
        parser.add_argument(f"--{name}", type=int)
    return parser.parse_args()


def _local_rank() -> int:
    return int(os.environ["LOCAL_RANK"])


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    heads = max(args.hidden // 128, 1)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 11 // 4,
            num_hidden_layers=args.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=args.vocabulary,
            max_position_embeddings=args.length,
            tie_word_embeddings=True,
        )
    )


def zero(args: argparse.Namespace, model: Any, stage: int) -> tuple[Callable[[], None], dict[str, Way]]:
    """DeepSpeed at this stage, saved by us and by itself."""
    import deepspeed

    import ucp.deepspeed
    from ucp.deepspeed.saves import save_checkpoint

    if args.device == "cpu":
        # DeepSpeed would look for a compiler and build a kernel, which takes a minute and is not used here.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed("gloo" if args.device == "cpu" else "nccl")
    config = {
        "train_micro_batch_size_per_gpu": args.batch,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": args.device == "cpu"}},
        "zero_optimization": {"stage": stage},
        "ucp": {"enabled": True},
    }
    began = time.perf_counter()
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    plain = time.perf_counter() - began
    ucp.deepspeed.attach(engine)
    bench_tools.progress(f"initialize: {plain:.1f} s, the pool {time.perf_counter() - began - plain:.1f} s")
    tokens = torch.randint(0, args.vocabulary, (args.batch, args.length), device=engine.device)

    def step() -> None:
        engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
        engine.step()

    saver = engine.ucp.saver
    bench_tools.progress(f"the pool has {saver.memory / 2**20:.0f} MiB")

    def synchronously(folder: str) -> None:
        engine.ucp.saver = None
        save_checkpoint(engine, folder)
        engine.ucp.saver = saver

    def waited() -> Any:
        engine.ucp.wait()
        return engine.ucp.last_save

    return step, {
        "ours": Way(engine.save_checkpoint, waited),
        "ours, synchronous": Way(synchronously, lambda: None),
        "DeepSpeed's": Way(lambda folder: type(engine).save_checkpoint(engine, folder), lambda: None),
    }


def fsdp(args: argparse.Namespace, model: Any) -> tuple[Callable[[], None], dict[str, Way]]:
    """FSDP2, saved in the background by us and by torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    import ucp

    dist.init_process_group("gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl")
    mesh = torch.distributed.device_mesh.init_device_mesh(args.device, (dist.get_world_size(),))
    model = model.to(args.device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=args.device == "cuda")
    tokens = torch.randint(0, args.vocabulary, (args.batch, args.length), device=args.device)
    alone = dist.new_group(backend="gloo")  # the save's own: it talks while training does
    under_way: list[Any] = []
    ours: list[ucp.torchdist.save.PendingSave] = []

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        for pending in ours:
            pending.hold()
        optimizer.step()
        optimizer.zero_grad()

    def state() -> dict[str, Any]:
        weights, states = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": states}

    def save(folder: str) -> None:
        ours.append(ucp.async_save(state(), folder, lazy=True))

    def save_by_dcp(folder: str) -> None:
        under_way.append(dcp.async_save(state(), checkpoint_id=folder, process_group=alone))

    def wait_for_dcp() -> None:
        under_way.pop().result()

    return step, {
        "ours": Way(save, lambda: ours.pop().result()),
        "dcp.async_save": Way(save_by_dcp, wait_for_dcp),
    }


def measure(args: argparse.Namespace, step: Callable[[], None], ways: dict[str, Way], parameters: int) -> None:
    """Writes the report after every turn."""
    device = "ranks on the CPU" if args.device == "cpu" else f"{torch.cuda.get_device_name(0)}"
    for _ in range(WARM):
        step()
    # What lives on need not be looked at by every collection of rubbish, which would fall on some steps and not others.
    gc.collect()
    gc.freeze()
    root = args.data / f"save-{args.role}"
    plain: list[float] = []
    out: dict[str, dict[str, Any]] = {}
    for turn in range(args.repeats + 1):  # the first one is apart
        _reset_peak()
        plain.append(_steps(args, step))
        peak = _peak()
        for name, way in ways.items():
            folder = root / name.replace(" ", "-").replace(",", "").replace("'", "")
            if dist.get_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
            _reset_peak()
            seconds, call, durable, each, report = _around(args, step, way, str(folder))
            one = out.setdefault(
                name, {"seconds": [], "call": [], "durable": [], "stages": [], "growth": 0, "writer": 0, "pool": 0}
            )
            one["stages"].append({**report.seconds, "wall": report.wall} if report else {})
            one["steps"] = [round(took, 4) for took in each]  # of this rank, the last turn's, for a closer look
            one["pool"] = report.memory if report else 0
            if one["pool"]:
                one["writer"] = max([one["writer"], *(_status("RssAnon", writer) for writer in _writers())])
            stages = ", ".join(f"{stage} {took:.3f}" for stage, took in one["stages"][-1].items())
            around = " ".join(f"{took * 1000:.0f}" for took in each[BEFORE - 2 : BEFORE + 8])
            bench_tools.progress(
                f"rank {dist.get_rank()}, {name}: {seconds:.2f} s beside {plain[-1]:.2f}, call {call:.3f}, durable "
                f"{durable:.2f}; {stages}; ms of the steps around it: {around}"
            )
            if turn == 0:
                one["first"] = seconds
                continue
            one["growth"] = max(one["growth"], _peak() - peak)
            one["seconds"].append(seconds)
            one["call"].append(call)
            one["durable"].append(durable)
            if turn == args.repeats and dist.get_rank() == 0:
                one |= {"nbytes": bench_tools.nbytes(folder), "state": 12 * parameters}
                one["cp"] = bench_tools.copy_and_sync(folder, root / "copy")
                shutil.rmtree(root / "copy")
        if turn and dist.get_rank() == 0:
            found = {"plain": plain[1:], "saves": out, "parameters": parameters, "device": device}
            args.report.write_text(json.dumps(found))
    if dist.get_rank() == 0:
        shutil.rmtree(root)


def _steps(args: argparse.Namespace, step: Callable[[], None]) -> float:
    _settle()
    began = time.perf_counter()
    for _ in range(args.steps):
        step()
    _synchronize()
    return _slowest(time.perf_counter() - began)


def _around(
    args: argparse.Namespace, step: Callable[[], None], way: Way, folder: str
) -> tuple[float, float, float, list[float], Any]:
    """Seconds of the steps with a save among them, of the save's call, from that until it is durable, and of each step
    on this rank without the call; and the way's report."""
    _settle()
    each: list[float] = []
    durable: list[float] = []
    began = time.perf_counter()
    for k in range(args.steps):
        if k == BEFORE:
            called = time.perf_counter()
            way.save(folder)
            call = time.perf_counter() - called
        stepped = time.perf_counter()
        step()
        each.append(time.perf_counter() - stepped)
        if k >= BEFORE and not durable and _is_durable(folder):
            durable.append(time.perf_counter() - called)
    _synchronize()
    seconds = time.perf_counter() - began
    report = way.wait()
    durable.append(time.perf_counter() - called)
    return _slowest(seconds), _slowest(call), _slowest(durable[0]), each, report


def _is_durable(folder: str) -> bool:
    """What every way writes last: the file `latest`, DCP's metadata, or our manifest."""
    return any(Path(folder, name).exists() for name in ("latest", ".metadata", manifest.NAME))


def _settle() -> None:
    """Nothing is left to be done of what was before, such as writing what a peer's save has left in the page cache."""
    _synchronize()
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _slowest(seconds: float) -> float:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def _reset_peak() -> None:
    """The peak counts from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Of resident memory, bytes."""
    return _status("VmHWM")


def _writers() -> Iterator[int]:
    """The processes that write for this one."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ucp.saving.writer" in path.read_bytes() and _status("PPid", int(path.parent.name), 1) == os.getpid():
                yield int(path.parent.name)
        except OSError:
            continue  # it has ended


def _status(key: str, process: int | str = "self", unit: int = 1024) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * unit
    return 0


if __name__ == "__main__":
    main()
