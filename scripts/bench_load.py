"""Resuming on another layout: ours straight from ZeRO-1 files, DeepSpeed's native load, DCP's load with FSDP2."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import bench_data
import bench_tools

add_arguments = bench_data.add_arguments


def run(args: argparse.Namespace) -> dict[str, Any]:
    source, target, dcp = bench_data.native(args), bench_data.native_target(args), bench_data.dcp(args)
    sharded = bench_data.fsdp(args)
    universal = args.data / f"{source.name}-universal"
    if not universal.is_dir():
        bench_tools.timed([sys.executable, "-m", "ucp.cli.convert", source, universal, "--quiet"])
    options = {**bench_data.model_options(args), "repeats": args.repeats, "cache": args.cache}
    found = bench_tools.launch("load", 2, native=target, works=f"{source.name},{universal.name}", **options)
    turns, stages = found["turns"], found["stages"]
    fsdp = bench_tools.launch("fsdp-load", 2, source=dcp, works=sharded.name, **options)["turns"]
    rows = [_row("DeepSpeed's native load, ZeRO-3 on 2 ranks to the same", turns["native"], turns["native"])]
    for name, label in {
        source.name: "ours, ZeRO-1 on 4 ranks to ZeRO-3 on 2",
        universal.name: "ours, universal to ZeRO-3 on 2",
    }.items():
        needed, read = stages[name]["nbytes"], stages[name]["bytes_read"]
        more = {"GB": round(needed / 1e9, 2), "read/needed": round(read / needed, 3)}
        more["prove s"] = round(stages[name]["prove"], 3)
        rows.append(_row(label, turns[name], turns["native"], **more))
    for work, one in fsdp.items():
        for name, label in {
            "dcp": "DCP from its own",
            "ours from dcp": "ours from DCP's",
            "ours": "ours from ours",
        }.items():
            more = {"GB": round(bench_tools.nbytes(dcp) / 1e9, 2)}
            rows.append(_row(f"FSDP2 on 4 ranks to 2, {work}: {label}", one[name], one["dcp"], **more))
    return {
        "title": f"load: weights and Adam's states, {args.cache} page cache, from call to return, slowest rank",
        "rows": rows,
        "notes": [
            "ratio: to DeepSpeed's native load, with FSDP2 to DCP's; minimum to minimum",
            "in place: a state dict of live tensors; resume: model and optimizer, which has no states yet",
        ],
        "turns": {**turns, "fsdp": fsdp},
        "stages": stages,
    }


def _row(label: str, turns: list[list[float]], reference: list[list[float]], **more: Any) -> dict[str, Any]:
    """turns: (seconds, processor seconds of all ranks) of each."""
    seconds, processor = zip(*turns, strict=True)
    more = {"processor s": round(min(processor), 2), **more}
    return bench_tools.row(label, seconds, [turn[0] for turn in reference], **more)
