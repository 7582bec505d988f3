"""What the proof after a load costs: digesting a state on the host or a device, and its share of a load's time.

One process, no engine: a state dict of fp32 weights and Adam's two states. It needs torch, no DeepSpeed, so where there
is no environment of the project's own it runs as well: PYTHONPATH=. python scripts/bench_run.py prove --device cuda
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_tools


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gb", type=float, default=2.0, help="bytes of the state, in GB (default: 2)")
    parser.add_argument(
        "--hidden", type=int, default=4096, help="weights are hidden x hidden, and rows (default: 4096)"
    )
    parser.add_argument("--device", default="cpu", help="where the state lives: cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="threads for digests on the host (default: 1)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every work (default: 3)")
    parser.add_argument("--only-digest", action="store_true", help="no files: the digest alone, in every way")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import ucp
    from ucp.geometry import whole
    from ucp.job.live_digest import LiveElements, digests, on_device

    state = _state(args)
    tensors = [t for entry in (state["model"], *state["optim"]["state"].values()) for t in entry.values() if t.dim()]
    nbytes = sum(t.nbytes for t in tensors)
    lives = [LiveElements(t, tuple(t.shape), whole(t.shape)) for t in tensors]
    first = _first(args, lives)
    before = _allocated(args)
    turns = _timed(args, lambda: digests(lives, threads=args.threads))
    memory = _allocated(args, peak=True) - before
    rows = [_row(f"digest of {nbytes / 1e9:.1f} GB on {args.device}", turns, nbytes)]
    equal = None
    if args.device != "cpu":
        hosts = [LiveElements(live.tensor.cpu(), live.shape, live.blocks) for live in lives[: len(lives) // 8]]
        equal = digests(hosts) == digests(lives[: len(hosts)])
        if not equal:
            raise SystemExit("the device's digests are not the host's")
    else:
        small = lives[:2]
        equal = on_device(small) == digests(small)
    if args.only_digest:
        rows[0] |= {"first use ms": round(1e3 * first), "kernels": _kernels(args, lambda: digests(lives))}
        if args.device != "cpu":
            rows += _ways(args, lives, nbytes)
        return _result(args, tensors, nbytes, rows, memory, equal)
    path = args.data / "prove"
    shutil.rmtree(path, ignore_errors=True)
    args.data.mkdir(parents=True, exist_ok=True)
    ucp.save(state, path)
    stages = {}
    for prove in (True, "full", False):
        loads, processor = [], []
        for _ in range(args.repeats + 1):
            for tensor in tensors:
                tensor.zero_()
            began = time.perf_counter(), time.process_time()
            report = ucp.load(state, path, prove=prove)
            loads.append(time.perf_counter() - began[0])
            processor.append(time.process_time() - began[1])
        stages[str(prove)] = {**report.seconds, "proof": str(report.proof)}
        seconds = report.seconds["prove"]
        more = {"prove s": round(seconds, 3), "share %": round(100 * seconds / loads[-1], 2)}
        more["processor s"] = round(min(processor[1:]), 3)
        rows.append(_row(f"ucp.load, prove={prove}", loads[1:], nbytes, **more))
    rows += _plain_reads(args, path)
    shutil.rmtree(path)
    return {**_result(args, tensors, nbytes, rows, memory, equal), "stages": stages}


def _plain_reads(args: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    """What reading those files from the page cache takes when nothing else is done: into pinned memory for a device."""
    import torch

    rows = []
    for threads in (8, 16):
        pinned = torch.ones((threads, 8 << 20), dtype=torch.uint8, pin_memory=args.device != "cpu").numpy()
        turns = []
        for _ in range(args.repeats):
            began = time.perf_counter()
            nbytes = bench_tools.read_plainly(path, (0, 1), direct=False, threads=threads, buffers=list(pinned))
            turns.append(time.perf_counter() - began)
        rows.append(_row(f"plain reads by {threads} threads", turns, nbytes))
    return rows


def _result(
    args: argparse.Namespace, tensors: list[Any], nbytes: int, rows: list[Any], memory: int, equal: bool
) -> dict[str, Any]:
    import torch

    return {
        "title": f"prove: {nbytes / 1e9:.2f} GB in {len(tensors)} tensors on {args.device}, warm page cache",
        "rows": rows,
        "notes": [
            f"{torch.__version__}; memory beside the tensors: {memory / (1 << 20):.0f} MiB of the device's",
            f"device's and host's ways equal: {equal}",
            "prove=True is a sample in host memory, and of a device's memory everything",
        ],
    }


def _first(args: argparse.Namespace, lives: list[Any]) -> float:
    """What a process's first digest takes, in seconds: a load lets that pass while it reads."""
    from ucp.job.live_digest import digest_every_way

    began = time.perf_counter()
    digest_every_way(lives[0].tensor.device)
    _settled(args)
    return time.perf_counter() - began


def _ways(args: argparse.Namespace, lives: list[Any], nbytes: int) -> list[dict[str, Any]]:
    """The ways to digest on a device, and what torch's are made of, so that it shows what to improve."""
    import torch

    from ucp.job.device_kernel import launch_of
    from ucp.job.device_products import has_byte_products
    from ucp.job.live_digest import on_device

    device = lives[0].tensor.device
    rows = []
    is_kernel = launch_of(device) is not None
    if is_kernel:
        rows.append(_row("the kernel", _timed(args, lambda: on_device(lives)), nbytes, chosen=True))
    for by_bytes in (True, False):
        on_device(lives[:4], by_bytes=by_bytes)
        turns = _timed(args, lambda by=by_bytes: on_device(lives, by_bytes=by))
        rows.append(
            _row(
                "with bytes" if by_bytes else "with doubles",
                turns,
                nbytes,
                chosen=not is_kernel and has_byte_products(device) == by_bytes,
            )
        )
    many = [torch.zeros((24 << 10, 1024), dtype=torch.int8, device=device) for _ in range(2)]
    out = torch.empty((24 << 10, 16), dtype=torch.int32, device=device)
    narrow = torch.ones((16, 1024), dtype=torch.int8, device=device)
    other = narrow.t().contiguous()
    for label, work in {
        "24 MiB: bytes times a table by columns": lambda: torch._int_mm(many[0], narrow.t(), out=out),
        "24 MiB: bytes times a table by rows": lambda: torch._int_mm(many[0], other, out=out),
        "24 MiB: bits turned": lambda: torch.bitwise_xor(many[0].view(torch.int32), 1, out=many[1].view(torch.int32)),
    }.items():
        turns = []
        for _ in range(args.repeats + 1):
            _settled(args)
            began = time.perf_counter()
            for _ in range(100):
                work()
            _settled(args)
            turns.append((time.perf_counter() - began) / 100)
        rows.append(_row(label, turns[1:], many[0].nbytes))
    return rows


def _kernels(args: argparse.Namespace, work: Callable[[], Any]) -> int:
    """How many kernels a device runs for this."""
    from torch.profiler import ProfilerActivity, profile

    if args.device == "cpu":
        return 0
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
    return sum(1 for event in found.events() if "LaunchKernel" in event.name)


def _settled(args: argparse.Namespace) -> None:
    import torch

    if args.device != "cpu":
        torch.cuda.synchronize()


def _state(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    generator = torch.Generator(args.device).manual_seed(0)
    model: dict[str, torch.Tensor] = {}
    states: dict[str, dict[str, torch.Tensor]] = {}
    size = 0
    while size < args.gb * 1e9:
        layer = len(model) // 2
        for name, shape in ((f"{layer}.weight", (args.hidden, args.hidden)), (f"{layer}.norm", (args.hidden,))):
            made = [torch.randn(shape, device=args.device, generator=generator) for _ in range(3)]
            model[name] = made[0]
            states[name] = {"exp_avg": made[1], "exp_avg_sq": made[2], "step": torch.tensor(1.0)}
            size += 3 * made[0].nbytes
    group = {"params": list(model), "lr": 1e-3}
    return {"model": model, "optim": {"state": states, "param_groups": [group]}}


def _timed(args: argparse.Namespace, work: Callable[[], Any]) -> list[float]:
    turns = []
    for _ in range(args.repeats):
        began = time.perf_counter()
        work()  # ends with a copy to the host, so the device has done all of it
        turns.append(time.perf_counter() - began)
    return turns


def _allocated(args: argparse.Namespace, peak: bool = False) -> int:
    import torch

    if args.device == "cpu":
        return 0
    if not peak:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def _row(label: str, seconds: list[float], nbytes: int, **more: Any) -> dict[str, Any]:
    return bench_tools.row(
        label,
        seconds,
        seconds,
        **{"ms": round(1e3 * min(seconds), 2), "GB/s": round(nbytes / min(seconds) / 1e9, 2), **more},
    )
