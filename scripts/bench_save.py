"""Saving during training: the time it costs, beside DeepSpeed's own save on the same engine, and DCP's with FSDP2."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import bench_tools


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", default="1,3", help="ZeRO stages (default: 1,3)")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the Llama (default: 512)")
    parser.add_argument("--layers", type=int, default=8, help="its layers (default: 8)")
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=1, help="sequences of a rank's batch (default: 1)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (default: 128)")
    parser.add_argument("--steps", type=int, default=50, help="steps around a save (default: 50)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every work (default: 3)")
    parser.add_argument("--ways", default="", help="ways to save, with | between them, such as ours|DeepSpeed's")
    parser.add_argument("--without-dcp", action="store_true", help="leave out torch.distributed.checkpoint")


def run(args: argparse.Namespace) -> dict[str, Any]:
    args.data.mkdir(parents=True, exist_ok=True)
    roles = [f"zero{stage}" for stage in args.stages.split(",") if stage] + ([] if args.without_dcp else ["fsdp"])
    found = {role: _launch(args, role) for role in roles}
    rows = [row for role in roles for row in _rows(role, found[role], args.steps)]
    some = found[roles[0]]
    notes = [
        f"lost: the time of {args.steps} steps around a save less that of {args.steps} steps without, least of "
        f"{args.repeats} turns each; first: that of a program's first save, once",
        "durable: from the call until everything is on disk; cp: that of `cp -r` and fsync of the same files",
        "written/state: bytes of all files over those of all weights and optimizer states; pool: for copies; of an "
        "engine it is allocated when that is made, and pinned where there are GPUs",
        "growth: of a rank's resident memory at its peak, over its peak in steps without a save",
        "writer: anonymous memory of the process that writes beside each rank, at most",
    ]
    return {
        "title": f"save: Llama of {some['parameters'] / 1e6:.0f}M parameters in bf16 on {args.ranks} {some['device']}",
        "rows": rows,
        "notes": notes,
        "found": found,
    }


def _rows(role: str, found: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    plain = min(found["plain"])
    rows = []
    for name, one in found["saves"].items():
        lost = min(one["seconds"]) - plain
        rows.append(
            {
                "what": f"{role}, {name}",
                "lost s": round(lost, 3),
                "in steps": round(lost / (plain / steps), 2),
                "first s": round(one["first"] - statistics.median(found["plain"]), 2),
                "call s": round(min(one["call"]), 3),
                "durable s": round(min(one["durable"]), 2),
                "cp s": round(one["cp"], 2),
                "GB": round(one["nbytes"] / 1e9, 2),
                "written/state": round(one["nbytes"] / one["state"], 3),
                "pool MiB": round(one["pool"] / 2**20),
                "growth MiB": round(one["growth"] / 2**20),
                "writer MiB": round(one["writer"] / 2**20),
                "step s": round(plain / steps, 4),
            }
        )
    return rows


def _launch(args: argparse.Namespace, role: str) -> dict[str, Any]:
    report = args.data / f"report-save-{role}.json"
    report.unlink(missing_ok=True)
    names = ("device", "hidden", "layers", "vocabulary", "batch", "length", "steps", "repeats", "ways", "data")
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if args.device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu"}
    bench_tools.timed(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"),
            *(Path(__file__).with_name("bench_save_rank.py"), role, f"--report={report}"),
            *(f"--{name}={getattr(args, name)}" for name in names),
        ],
        env=environment,
    )
    bench_tools.progress(f"{role}: measured")
    return json.loads(report.read_text())
