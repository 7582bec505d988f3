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
    universal = args.data / f"{source.name}-universal"
    if not universal.is_dir():
        bench_tools.timed([sys.executable, "-m", "ucp.cli.convert", source, universal, "--quiet"])
    options = {**bench_data.model_options(args), "repeats": args.repeats, "cache": args.cache}
    ours = (source.name, universal.name)
    found = bench_tools.launch("load", 2, native=target, works=",".join(ours), **options)
    fsdp = bench_tools.launch("fsdp-load", 2, source=dcp, works=bench_data.fsdp(args).name, **options)["seconds"]
    seconds, stages = found["seconds"], found["stages"]
    native = seconds["native"]
    brought = stages[source.name]["nbytes"]
    rows = [
        bench_tools.row("DeepSpeed's native load, ZeRO-3 on 2 ranks to the same", native, native),
    ]
    for name, label in zip(
        ours, ("ours, ZeRO-1 on 4 ranks to ZeRO-3 on 2", "ours, universal to ZeRO-3 on 2"), strict=True
    ):
        stage = stages[name]
        rows.append(
            bench_tools.row(
                label,
                seconds[name],
                native,
                GB=round(stage["nbytes"] / 1e9, 2),
                **{"read/needed": round(stage["bytes_read"] / stage["nbytes"], 3)},
            )
        )
    for name, label in {
        "dcp": "FSDP2 on 4 ranks to 2: DCP from its own",
        "ours from dcp": "FSDP2 on 4 ranks to 2: ours from DCP's",
        "ours": "FSDP2 on 4 ranks to 2: ours from ours",
    }.items():
        rows.append(bench_tools.row(label, fsdp[name], fsdp["dcp"], GB=round(bench_tools.nbytes(dcp) / 1e9, 2)))
    return {
        "title": f"load: {brought / 1e9:.2f} GB of weights and Adam's states, {args.cache} page cache, slowest rank",
        "rows": rows,
        "notes": ["ratio: to DeepSpeed's native load, with FSDP2 to DCP's; minimum to minimum"],
        "seconds": {**seconds, "fsdp": fsdp},
        "stages": stages,
    }
