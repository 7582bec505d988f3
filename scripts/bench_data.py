"""The checkpoints that are measured, made once by real engines and kept in the data folder."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import bench_tools


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size of the Llama (default: 1024)")
    parser.add_argument("--layers", type=int, default=24, help="its layers (default: 24, 317M parameters)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where engines live (default: cpu)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks that load (default: 2)")
    parser.add_argument("--from-ranks", type=int, help="ranks that saved (default: twice as many; on GPUs, as many)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every work (default: 3)")
    parser.add_argument("--cache", choices=["warm", "cold"], default="warm", help="the sources' page cache before each")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"data": args.data, "hidden": args.hidden, "layers": args.layers, "device": args.device}


def savers(args: argparse.Namespace) -> int:
    """How many ranks save what is loaded: a GPU has no room for two."""
    return args.from_ranks or (args.ranks if args.device == "cuda" else 2 * args.ranks)


def native(args: argparse.Namespace) -> Path:
    """DeepSpeed's own checkpoint of ZeRO-1, in bf16 with Adam, after one step."""
    return _made(args, f"zero1-dp{savers(args)}", "make", savers(args))


def native_target(args: argparse.Namespace) -> Path:
    """The same state in DeepSpeed's own checkpoint of ZeRO-3 on the ranks that load, saved by DeepSpeed itself."""
    return _made(args, f"zero3-dp{args.ranks}", "make-target", args.ranks, source=native(args))


def dcp(args: argparse.Namespace) -> Path:
    """A torch.distributed.checkpoint of the same model with FSDP2: fp32 weights and Adam's states."""
    return _made(args, f"dcp-dp{savers(args)}", "dcp-make", savers(args))


def fsdp(args: argparse.Namespace) -> Path:
    """The same state in our own form, saved by the same ranks."""
    return _made(args, f"fsdp-dp{savers(args)}", "fsdp-make", savers(args))


def megatron(args: argparse.Namespace) -> Path:
    """Megatron-Core's own checkpoint (torch_dist) of tp=2 in bf16, with its distributed optimizer's states."""
    folder = args.data / f"megatron-tp2-h{args.hidden}-l{args.layers}"
    if not folder.is_dir():
        from tests.engines.megatron.cases import Case
        from tests.engines.megatron.launch import launch

        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        case = vars(Case(tp=2, bf16=True))
        job = {"do": "large", "case": case, "hidden": args.hidden, "layers": args.layers, "save": str(partial)}
        launch([job], partial, timeout=3000)
        for name in ("log", "jobs.json"):
            (partial / name).unlink()
        partial.rename(folder)
    return folder


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Bring the folder's page cache into the state that was asked for."""
    if args.cache == "cold":
        bench_tools.drop_cache(folder)
    else:
        bench_tools.warm_cache(folder)


def _made(args: argparse.Namespace, name: str, role: str, ranks: int, **options: Any) -> Path:
    folder = args.data / f"{name}-h{args.hidden}-l{args.layers}"
    if not folder.is_dir():
        args.data.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        bench_tools.launch(role, ranks, to=partial, **options, **model_options(args))
        partial.rename(folder)
    return folder
