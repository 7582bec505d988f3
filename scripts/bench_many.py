"""Many small things: loading 10,000 tensors of 4 KiB, and opening what 1,024 ranks of ZeRO-3 have saved.

Each load and each opening is in a process of its own, with what it imports. Processor seconds are what to compare where
other programs run: they are of all threads. No engine is needed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_tools

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 3},
}
LAYERS = 24
SHAPES = {"q": (128, 128), "k": (128, 128), "v": (128, 128), "o": (128, 128), "gate": (256, 128), "up": (256, 128)}
SHAPES |= {"down": (128, 256), "norm_in": (128,), "norm_out": (128,)}
WAYS = {
    "small, ours": ("ours", "small"),
    "small, DCP from its own": ("dcp", "small-dcp"),
    "small, torch.load and copies": ("torch", "small.pt"),
    "the same bytes in ten tensors, ours": ("ours", "ten"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tensors", type=int, default=10_000, help="tensors of 4 KiB (default: 10,000)")
    parser.add_argument("--ranks", type=int, default=1024, help="ranks whose files are opened; 0: none (default: 1024)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every work (default: 3)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    data = args.data / f"many-{args.tensors}"
    if not data.is_dir():
        partial = data.with_name(f"{data.name}.partial")
        bench_tools.remove(partial)
        partial.mkdir(parents=True)
        _child("make", args.tensors, partial)
        partial.rename(data)
    works = {label: (by, args.tensors, data / name) for label, (by, name) in WAYS.items()}
    if args.ranks:
        works[f"opening ZeRO-3 on {args.ranks:,} ranks"] = "open", args.tensors, _of_ranks(args)
    turns: dict[str, list[dict[str, Any]]] = {label: [] for label in works}
    for turn in range(args.repeats):
        for label, (by, count, source) in works.items():
            bench_tools.warm_cache(source) if source.is_dir() else source.read_bytes()
            turns[label].append(_child(by, count, source))
            bench_tools.progress(f"{label}, turn {turn + 1} of {args.repeats}: {turns[label][-1]}")
    return {
        "title": f"many: {args.tensors:,} tensors of 4 KiB, and the files of {args.ranks:,} ranks; warm page cache",
        "rows": [_row(label, found) for label, found in turns.items()],
        "notes": ["each in a process of its own, its imports of the library (not torch's) within the time"],
        "turns": turns,
    }


def _row(label: str, turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "what": label,
        "processor s": round(statistics.median(turn["processor"] for turn in turns), 3),
        "min s": round(min(turn["seconds"] for turn in turns), 3),
        "median s": round(statistics.median(turn["seconds"] for turn in turns), 3),
        **({"files": turns[0]["files"]} if "files" in turns[0] else {}),
    }


def _of_ranks(args: argparse.Namespace) -> Path:
    """A checkpoint as that many ranks save it: two files of each."""
    folder: Path = args.data / f"many-zero3-dp{args.ranks}"
    if not folder.is_dir():
        _child("make-ranks", args.ranks, folder)
    return folder


def _child(by: str, count: int, path: Path) -> dict[str, Any]:
    # Modules are kept compiled, as those of an installed package are, whatever the caller's environment says.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, __file__, by, str(count), path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=kept)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


# --- in a process of its own -----------------------------------------------------------------------------------------


def _tensors(count: int, size: int) -> dict[str, dict[str, Any]]:
    import torch

    return {"model": {f"layers.{k}.weight": torch.randn(size) for k in range(count)}}


def _make(count: int, folder: Path) -> None:
    import torch
    import torch.distributed.checkpoint as dcp

    import ucp

    small = _tensors(count, 1024)
    ucp.save(small, folder / "small")
    dcp.save(small, checkpoint_id=folder / "small-dcp")
    torch.save(small, folder / "small.pt")
    ucp.save(_tensors(10, count * 1024 // 10), folder / "ten")


def _make_ranks(count: int, folder: Path) -> None:
    import torch

    import ucp

    model = torch.nn.ModuleList()
    for _ in range(LAYERS):
        model.append(torch.nn.ParameterDict({name: torch.randn(shape) for name, shape in SHAPES.items()}))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    source, two = (folder.with_name(f"{folder.name}-{what}") for what in ("source", "two"))
    bench_tools.remove(source, two, config := folder.with_name(f"{folder.name}.json"))
    config.write_text(json.dumps(DS_CONFIG))
    ucp.save_training(source, model=model, optimizer=optimizer)
    ucp.convert(source, two, to="deepspeed", layout="dp=2,zero=3", ds_config=str(config))
    _spread(two, folder.with_name(f"{folder.name}.partial"), count, [p.numel() for p in model.parameters()])
    folder.with_name(f"{folder.name}.partial").rename(folder)


def _spread(two: Path, folder: Path, count: int, sizes: Sequence[int]) -> None:
    """The files of two ranks of ZeRO-3 as so many ranks would write them, by ``torch.save``: names, numbers and
    lengths are theirs, and all values are zero."""
    import torch

    bench_tools.remove(folder)
    (step,) = two.glob("global_step*")
    (folder / step.name).mkdir(parents=True)
    (folder / "latest").write_text(step.name)
    length = sum(-(-size // count) for size in sizes)
    for path in sorted(step.glob("*zero_pp_rank_0_*.pt")):
        saved = torch.load(path, weights_only=False)
        if "optimizer_state_dict" in saved:
            zero = saved["optimizer_state_dict"]
            zero["partition_count"], zero["fp32_flat_groups"] = count, [torch.zeros(length)]
            states = zero["optimizer_state_dict"]["state"][0]
            states.update({name: torch.zeros(length) for name, kept in states.items() if kept.dim()})
        else:
            saved["dp_world_size"] = count
        for rank in range(count):
            torch.save(saved, folder / step.name / path.name.replace("rank_0_", f"rank_{rank}_", 1))


def _work(by: str, count: int, path: Path) -> Callable[[], Any]:
    """What is timed. Whatever it is loaded into is there before."""
    if by == "open":
        return lambda: _opened(path)
    import torch

    state = _tensors(10, count * 1024 // 10) if path.name == "ten" else _tensors(count, 1024)

    def ours() -> None:
        import ucp

        ucp.load(state, path)

    def dcp() -> None:
        import torch.distributed.checkpoint

        torch.distributed.checkpoint.load(state, checkpoint_id=path)

    def plain() -> None:
        for name, tensor in torch.load(path)["model"].items():
            state["model"][name].copy_(tensor)

    return {"ours": ours, "dcp": dcp, "torch": plain}[by]


def _opened(path: Path) -> dict[str, Any]:
    import ucp

    with ucp.open(path) as checkpoint:
        return {"files": sum(1 for file in checkpoint.path.iterdir() if file.suffix == ".pt")}


def main(by: str, count: str, path: str) -> None:
    if by in ("make", "make-ranks"):
        {"make": _make, "make-ranks": _make_ranks}[by](int(count), Path(path))
        print("{}")
        return
    work = _work(by, int(count), Path(path))
    gc.collect()  # of what is there before, which would else come due within the time
    began = time.perf_counter(), time.process_time()
    told = work()
    found = {"seconds": time.perf_counter() - began[0], "processor": time.process_time() - began[1]}
    print(json.dumps(found | (told or {})))


if __name__ == "__main__":
    main(*sys.argv[1:])
