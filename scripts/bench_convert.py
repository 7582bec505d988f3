"""Converting ZeRO-1 on 4 ranks: ours in all forms, `cp -r` of the same bytes, DeepSpeed's ds_to_universal.

With ``--megatron`` it is a folder that Megatron-Core has written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import bench_data
import bench_tools

PLAIN = "a plain writer of the same bytes"
_PLAIN = Path(__file__).with_name("copy_plain.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_data.add_arguments(parser)
    parser.add_argument("--megatron", action="store_true", help="convert a folder of Megatron-Core's instead")
    parser.add_argument(
        "--ds-workers",
        default="2,2",
        metavar="LIST",
        help="settings of ds_to_universal to try, as EXTRACT,MERGE[;EXTRACT,MERGE…]; empty: leave it out",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.megatron:
        return _run_megatron(args)
    source = bench_data.native(args)
    universal = args.data / f"{source.name}-universal"
    if not universal.is_dir():
        _ours(source, universal)
    (tag,) = (path for path in source.iterdir() if path.is_dir())
    out = args.data / "out"
    reports: dict[str, Any] = {}

    def ours(name: str, origin: Path, *flags: str) -> Any:
        def work() -> float:
            seconds, reports[name] = _ours(origin, out, *flags)
            return seconds

        return work

    copy, copy_universal = "cp -r of the checkpoint, and sync", "cp -r of the universal one, and sync"
    sources = {
        copy: source,
        "ours, to universal, with digests": source,
        "ours, to universal --virtual": source,
        "ours, to deepspeed dp=2,zero=3": source,
        copy_universal: universal,
        "ours, universal to universal, digests checked": universal,
        "ours, universal to deepspeed dp=2,zero=3, digests checked": universal,
    }
    flags = {
        "ours, to universal --virtual": ("--virtual",),
        "ours, to deepspeed dp=2,zero=3": ("--to", "deepspeed", "--layout", "dp=2,zero=3"),
        "ours, universal to deepspeed dp=2,zero=3, digests checked": ("--to", "deepspeed", "--layout", "dp=2,zero=3"),
    }
    works = {
        name: (lambda origin=origin: bench_tools.copy_and_sync(origin, out))
        if name.startswith("cp")
        else ours(name, origin, *flags.get(name, ()))
        for name, origin in sources.items()
    }
    sources[PLAIN] = source
    works[PLAIN] = lambda: bench_tools.timed([sys.executable, _PLAIN, source, out])
    for setting in filter(None, args.ds_workers.split(";")):
        extract, merge = setting.split(",")
        name = f"ds_to_universal, {extract} extract and {merge} merge workers"
        sources[name] = source
        works[name] = lambda extract=extract, merge=merge: bench_tools.timed(
            [
                *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"),
                *("--input_folder", tag, "--output_folder", out),
                *("--num_extract_workers", extract, "--num_merge_workers", merge),
            ],
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )

    def before(name: str) -> None:
        bench_tools.remove(out)
        os.sync()
        bench_data.prepare(args, sources[name])

    seconds, processor = bench_tools.interleaved(works, args.repeats, before)
    bench_tools.remove(out)
    rows = []
    for name, found in seconds.items():
        reference = copy_universal if sources[name] == universal else copy
        more = {"read GB": round(reports[name]["bytes_read"] / 1e9, 3)} if name in reports else {}
        rows.append(bench_tools.row(name, found, seconds[reference], **{"processor s": processor[name]}, **more))
    return {
        "title": f"convert: {bench_tools.nbytes(source) / 1e9:.2f} GB ({source.name}), {args.cache} page cache",
        "rows": rows,
        "notes": ["whole commands, from start to exit; ratio: to cp -r of the same source, minimum to minimum"],
        "seconds": seconds,
    }


def _run_megatron(args: argparse.Namespace) -> dict[str, Any]:
    source, out = bench_data.megatron(args), args.data / "out"
    reports: dict[str, Any] = {}
    config = args.data / "ds_config.json"
    zero = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, **zero}))
    to_deepspeed = ("--to", "deepspeed", "--layout", "dp=2,zero=3")
    copy = "cp -r of Megatron's checkpoint, and sync"
    flags = {
        "ours, megatron to universal, with digests": (),
        "ours, megatron to deepspeed dp=2,zero=3": (*to_deepspeed, "--ds-config", str(config)),
        "ours, megatron to megatron tp=4": ("--to", "megatron", "--layout", "tp=4"),
    }

    def ours(name: str) -> Any:
        def work() -> float:
            seconds, reports[name] = _ours(source, out, *flags[name])
            return seconds

        return work

    def before(name: str) -> None:
        bench_tools.remove(out)
        os.sync()
        bench_data.prepare(args, source)

    works = {
        copy: lambda: bench_tools.copy_and_sync(source, out),
        PLAIN: lambda: bench_tools.timed([sys.executable, _PLAIN, source, out]),
        **{name: ours(name) for name in flags},
    }
    seconds, processor = bench_tools.interleaved(works, args.repeats, before)
    bench_tools.remove(out)
    rows = []
    for name, found in seconds.items():
        more = {"read GB": round(reports[name]["bytes_read"] / 1e9, 3)} if name in reports else {}
        rows.append(bench_tools.row(name, found, seconds[copy], **{"processor s": processor[name]}, **more))
    return {
        "title": f"convert: {bench_tools.nbytes(source) / 1e9:.2f} GB ({source.name}), {args.cache} page cache",
        "rows": rows,
        "notes": ["whole commands, from start to exit; ratio: to cp -r of the same source, minimum to minimum"],
        "seconds": seconds,
    }


def _ours(source: Path, to: Path, *flags: str) -> tuple[float, dict[str, Any]]:
    report = to.with_suffix(".json")
    with open(report, "w") as stream:
        seconds = _run([sys.executable, "-m", "ucp.cli.convert", source, to, "--json", "--quiet", *flags], stream)
    found = json.loads(report.read_text())
    report.unlink()
    return seconds, found


def _run(command: list[Any], stream: Any) -> float:
    import subprocess
    import time

    began = time.perf_counter()
    done = subprocess.run(command, stdout=stream, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr[-2000:]}")
    return time.perf_counter() - began
