"""The checkpoints that are measured, made once by real engines and kept in the data folder."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_tools


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size of the Llama (default: 1024)")
    parser.add_argument("--layers", type=int, default=24, help="its layers (default: 24, 317M parameters)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every work (default: 3)")
    parser.add_argument("--cache", choices=["warm", "cold"], default="warm", help="the sources' page cache before each")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"data": args.data, "hidden": args.hidden, "layers": args.layers}


def native(args: argparse.Namespace) -> Path:
    """DeepSpeed's own checkpoint of ZeRO-1 on 4 ranks, in bf16 with Adam, after one step."""
    return _made(args, "zero1-dp4", lambda to: bench_tools.launch("make", 4, to=to, **model_options(args)))


def native_target(args: argparse.Namespace) -> Path:
    """The same state in DeepSpeed's own checkpoint of ZeRO-3 on 2 ranks, saved by DeepSpeed itself."""
    source = native(args)
    return _made(
        args, "zero3-dp2", lambda to: bench_tools.launch("make-target", 2, source=source, to=to, **model_options(args))
    )


def dcp(args: argparse.Namespace) -> Path:
    """A torch.distributed.checkpoint of the same model with FSDP2 on 4 ranks: fp32 weights and Adam's states."""
    return _made(args, "dcp-dp4", lambda to: bench_tools.launch("dcp-make", 4, to=to, **model_options(args)))


def fsdp(args: argparse.Namespace) -> Path:
    """The same state in our own form, saved by the same ranks."""
    return _made(args, "fsdp-dp4", lambda to: bench_tools.launch("fsdp-make", 4, to=to, **model_options(args)))


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Bring the folder's page cache into the state that was asked for."""
    if args.cache == "cold":
        bench_tools.drop_cache(folder)
    else:
        bench_tools.warm_cache(folder)


def _made(args: argparse.Namespace, name: str, make: Callable[[Path], Any]) -> Path:
    folder = args.data / f"{name}-h{args.hidden}-l{args.layers}"
    if not folder.is_dir():
        args.data.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        make(partial)
        partial.rename(folder)
    return folder
