"""Snapshots in memory: what they cost a step, how quickly they come back, what they take, how fast coding is."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bench_tools

PROGRAM = Path(__file__).resolve().parents[1] / "tests/elastic/program.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--hidden", type=int, default=768, help="hidden size of the Llama (default: 768)")
    parser.add_argument("--layers", type=int, default=12, help="its layers (default: 12)")
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (default: 256)")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step (default: 8)")
    parser.add_argument("--steps", type=int, default=4, help="steps of each turn, with and without (default: 4)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each kind (default: 3)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: by autocast, states in fp32")
    parser.add_argument("--restarts", type=int, default=3, help="restarts by torchrun of each kind (default: 3)")
    parser.add_argument("--policy", choices=["wait", "skip"], default="wait", help="where one snapshot meets the next")


def run(args: argparse.Namespace) -> dict[str, Any]:
    keepers = tempfile.mkdtemp(prefix="ucpk-", dir="/tmp")
    os.environ["UCP_KEEPER_DIR"] = keepers
    args.data.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=args.data))
    from ucp.memory import control
    from ucp.storage.kept import places

    try:
        rows = [*_training(args, folder), *_coding(), *_restarts(args, folder)]
    finally:
        for run in {note.run for note in places.notes()}:  # of what broke off
            control.drop(run)
        for place in (folder, keepers):
            shutil.rmtree(place, ignore_errors=True)
    return {"title": "survive: snapshots in memory, one rank; restarts by torchrun, two", "rows": rows}


def _restarts(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """From the death of a rank to the next finished step of the tests' tiny program, which resumes from memory, or
    loads nothing and begins anew."""
    found: dict[str, list[float]] = {"plain": [], "memory": []}
    for turn in range(args.restarts):
        for mode, seconds in found.items():
            place = folder / f"{mode}-{turn}"
            place.mkdir()
            agent = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
            program = ["--monitor-interval=0.1", "-m", "ucp.elastic", PROGRAM, place, mode]
            environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            bench_tools.timed([sys.executable, "-m", *agent, *program], env=environment)
            told = [json.loads(line) for line in (place / "told").read_text().splitlines()]
            killed = next((one["at"] for one in told if "kill" in one), None)
            if killed is None:  # it was started again for another reason, before a rank was to be killed
                bench_tools.progress(f"restart, {mode}: left out, since no rank was killed")
                continue
            again = next(one["at"] for one in told if one.get("start") and one["at"] > killed)
            seconds.append(min(one["at"] for one in told if "step" in one and one["at"] > again) - killed)
            bench_tools.progress(f"restart, {mode}: {seconds[-1]:.2f} s")
    plain = min(found["plain"], default=0.0)
    return [
        {
            "what": f"kill to the next step, {'from memory' if mode == 'memory' else 'nothing loaded'}",
            "seconds": round(min(seconds), 2),
            "ratio": round(min(seconds) / plain, 2),
        }
        for mode, seconds in found.items()
        if seconds
    ]


def _training(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import ucp.torchdist.training as training
    from ucp.memory import control
    from ucp.saving.save import SaveReport
    from ucp.torchdist.memory import MemorySnapshots

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        vocab_size=args.vocabulary,
    )
    model = LlamaForCausalLM(config).to(args.device)
    halved = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bf16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=args.device == "cuda")
    tokens = torch.randint(args.vocabulary, (args.batch, args.length), device=args.device)
    reports: list[SaveReport] = []
    memory = MemorySnapshots(folder, reports.append, redundancy=0, policy=args.policy)
    parameters = sum(p.numel() for p in model.parameters())
    done = 0

    def steps(snapshots: bool) -> tuple[float, float]:
        """The median step, and the processor seconds of one, of all processes."""
        nonlocal done
        times, worked = [], _processor_seconds()
        for _ in range(args.steps):
            began = time.perf_counter()
            with halved:
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            memory.hold()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if snapshots:
                memory.snapshot(done, model=model, optimizer=optimizer)
            if args.device == "cuda":  # as a program that looks at its loss; the copies have a stream of their own
                torch.cuda.current_stream().synchronize()
            times.append(time.perf_counter() - began)
        memory.hold()
        memory.wait()
        return statistics.median(times), (_processor_seconds() - worked) / args.steps

    steps(False)
    steps(True)
    pairs = [(steps(False), steps(True)) for _ in range(args.turns)]
    (plain, plain_worked), (snapped, worked) = (
        tuple(min(one) for one in zip(*(pair[k] for pair in pairs), strict=True)) for k in (0, 1)
    )
    copied = _copy_seconds(args.device, reports[-1].written)
    held = control.statuses(str(folder))[0]
    size = held["generations"][0]["bytes"]
    began = time.perf_counter()
    told = memory.load_training(model=model, optimizer=optimizer)
    from_memory = time.perf_counter() - began
    training.save_training(folder / "disk", model=model, optimizer=optimizer, step=done)
    for path in (folder / "disk").iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    training.load_training(folder / "disk", model=model, optimizer=optimizer)
    from_disk = time.perf_counter() - began
    memory.tier.end()  # as at the end of a program: its keeper ends
    last = reports[-1]
    return [
        {
            "what": f"step, {parameters / 1e6:.0f}M parameters, {args.device}, {args.dtype}",
            "seconds": round(plain, 3),
            "ratio": 1.0,
            "processor s": round(plain_worked, 2),
        },
        {
            "what": f"step, snapshot every step ({args.policy}: {memory.tier.skipped} left out)",
            "seconds": round(snapped, 3),
            "ratio": round(snapped / plain, 3),
            "processor s": round(worked, 2),
        },
        {"what": "plain copy of a snapshot's bytes", "seconds": round(copied, 3), "GB": round(last.written / 1e9, 3)},
        {"what": f"snapshot, from call to commit: {_stages(last.seconds)}", "seconds": round(last.wall, 3)},
        {"what": "load from a cold disk", "seconds": round(from_disk, 3), "ratio": 1.0},
        {
            "what": f"load from memory: {_stages(told.tensors.seconds)}",
            "seconds": round(from_memory, 3),
            "ratio": round(from_memory / from_disk, 3),
        },
        {
            "what": "kept memory, of 2 S",
            "GB": round(held["bytes"] / 1e9, 3),
            "ratio": round(held["bytes"] / 2 / size, 4),
        },
    ]


def _stages(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {taken:.2f}" for stage, taken in seconds.items())


def _processor_seconds() -> float:
    """Of this process, those that it has started, and all keepers."""
    import psutil

    from ucp.storage.kept import places

    own = psutil.Process()
    found = [own, *own.children(recursive=True), *(psutil.Process(note.pid) for note in places.notes())]
    return sum(sum(one.cpu_times()[:2]) for one in found)


def _copy_seconds(device: str, nbytes: int) -> float:
    """A plain copy of so many bytes into memory that is there, pinned for a device; the least of three."""
    import torch

    window = min(nbytes, 256 << 20)
    source = torch.ones(window, dtype=torch.uint8, device=device)
    target = torch.ones(window if device == "cuda" else nbytes, dtype=torch.uint8, pin_memory=device == "cuda")
    took = []
    for _ in range(3):
        began = time.perf_counter()
        for at in range(0, nbytes, window):
            count = min(window, nbytes - at)
            place = 0 if device == "cuda" else at
            target[place : place + count].copy_(source[:count], non_blocking=True)
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return min(took)


def _coding() -> list[dict[str, Any]]:
    import numpy as np

    from ucp.memory import coding

    rows = []
    for k, m in ((3, 1), (2, 2)):
        pieces = [np.random.default_rng(i).integers(0, 256, 8 << 20, dtype=np.uint8) for i in range(k)]
        out = np.empty_like(pieces[0])
        took = []
        for _ in range(6):
            began = time.process_time()
            coding.parity(k, m, 0, pieces, out)
            took.append(time.process_time() - began)
        name = "XOR" if m == 1 else "Reed-Solomon"
        rows.append(
            {"what": f"{name}, one parity of {k} pieces", "GB/s a core": round(k * 8 * 2**20 / min(took) / 1e9, 1)}
        )
    return rows
