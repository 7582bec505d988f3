"""Merging two checkpoints: ours with and without the optimizer, beside cp of the same bytes and mergekit on folders."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import bench_tools

MERGEKIT = """\
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
a, b, out = sys.argv[1:]
config = {"merge_method": "linear", "dtype": "float32",
          "models": [{"model": a, "parameters": {"weight": 1.0}}, {"model": b, "parameters": {"weight": 2.0}}]}
options = MergeOptions(copy_tokenizer=False, lazy_unpickle=False, quiet=True)
run_merge(MergeConfiguration.model_validate(config), out, options)
"""

PLAIN = Path(__file__).with_name("merge_plain.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size of the Llama (default: 1024)")
    parser.add_argument("--layers", type=int, default=18, help="its layers (default: 18)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every work (default: 3)")
    parser.add_argument("--without-mergekit", action="store_true", help="leave mergekit out")


def run(args: argparse.Namespace) -> dict[str, Any]:
    sources = [_source(args, seed) for seed in (0, 1)]
    folders = [_folder(source) for source in sources]
    out = args.data / "out"
    ours = [sys.executable, "-m", "ucp.cli.main", "merge", "--quiet"]
    weights = ["--weights", "1,2", "--no-resume"]
    works = {
        "cp: both read, one written": lambda: _copy(sources, out),
        "ours, weights and optimizer": lambda: bench_tools.timed(
            [*ours, *sources, out, *weights, "--optimizer", "average"]
        ),
        "ours, one written as it is": lambda: bench_tools.timed(
            [sys.executable, "-m", "ucp.cli.convert", sources[1], out, "--quiet", "--no-resume"]
        ),
        "numpy alone, the same arithmetic": lambda: bench_tools.timed([sys.executable, PLAIN, *sources, out]),
        "cp: both folders read, one written": lambda: _copy(folders, out),
        "ours, folders": lambda: bench_tools.timed([*ours, *folders, out, *weights, "--to", "huggingface"]),
    }
    if not args.without_mergekit:
        works["mergekit, folders"] = lambda: bench_tools.timed([sys.executable, "-c", MERGEKIT, *folders, out])

    def before(name: str) -> None:
        bench_tools.remove(out)
        os.sync()
        for path in folders if "folders" in name else sources:
            bench_tools.warm_cache(path)

    seconds, processor = bench_tools.interleaved(works, args.repeats, before)
    bench_tools.remove(out)
    names = list(works)
    rows = [
        bench_tools.row(name, found, seconds[names[0 if k < 4 else 4]], **{"processor s": processor[name]})
        for k, (name, found) in enumerate(seconds.items())
    ]
    size = bench_tools.nbytes(sources[0]) / 1e9, bench_tools.nbytes(folders[0]) / 1e9
    return {
        "title": f"merge: two checkpoints of {size[0]:.2f} GB, two folders of {size[1]:.2f} GB, warm page cache",
        "rows": rows,
        "notes": [
            "whole commands; cp: `cat` of one, `cp -r` and sync of the other; ratio: to that, least to least",
            "numpy alone: both read, combined and written, with no digest at all",
            "as it is: one checkpoint read, verified, digested and written, by the same writer, without arithmetic",
        ],
        "seconds": seconds,
    }


def _copy(sources: list[Path], out: Path) -> float:
    """What the disk takes: one source read, the other read and written."""
    read = sum(bench_tools.timed(["cp", path, "/dev/null"]) for path in bench_tools.files(sources[0]))
    return read + bench_tools.copy_and_sync(sources[1], out)


def _source(args: argparse.Namespace, seed: int) -> Path:
    """A universal checkpoint of random fp32 weights with Adam's states, made once."""
    path = args.data / f"merge-{args.hidden}-{args.layers}-{seed}"
    if not path.is_dir():
        args.data.mkdir(parents=True, exist_ok=True)
        bench_tools.timed([sys.executable, __file__, path, json.dumps([args.hidden, args.layers, seed])])
    return path


def _folder(source: Path) -> Path:
    """The same weights as a folder that transformers loads."""
    path = source.with_name(f"{source.name}-hf")
    if not path.is_dir():
        like = source.with_name(f"{source.name}-like")
        command = ["ucp.cli.convert", source, path, "--to", "huggingface", "--like", like, "--quiet"]
        bench_tools.timed([sys.executable, "-m", *command])
    return path


def make(path: Path, hidden: int, layers: int, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import ucp

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=32000,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    model = LlamaForCausalLM(config)
    config.save_pretrained(path.with_name(f"{path.name}-like"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    ucp.save_training(path, model=model, optimizer=optimizer, step=1)


if __name__ == "__main__":
    make(Path(sys.argv[1]), *json.loads(sys.argv[2]))
