"""Resuming on another layout: ours straight from ZeRO-1 files, DeepSpeed's native load, DCP's load with FSDP2.

Every load is in ranks of its own, as a resume is: nothing is allocated, mapped or compiled before it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_data
import bench_tools


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_data.add_arguments(parser)
    parser.add_argument("--only", default="", help="works to run, with commas between: zero, in-place, resume")


@dataclass(frozen=True)
class Work:
    """One load. peer: the label of the one that it is compared with."""

    label: str
    peer: str
    role: str
    source: Path
    by: str = "ours"
    into: str = "live"


def run(args: argparse.Namespace) -> dict[str, Any]:
    works = _works(args)
    turns: dict[str, list[dict[str, Any]]] = {work.label: [] for work in works}
    for turn in range(args.repeats):
        for work in works:
            one = bench_tools.launch(
                work.role,
                args.ranks,
                source=work.source,
                by=work.by,
                into=work.into,
                cache=args.cache,
                **bench_data.model_options(args),
            )
            turns[work.label].append(one)
            bench_tools.progress(f"{work.label}, turn {turn + 1} of {args.repeats}: {one['seconds']:.2f} s")
    limits = bench_tools.launch("limits", args.ranks, source=works[0].source, **bench_data.model_options(args))
    return {
        "title": f"load: weights and Adam's states on {args.ranks} ranks ({args.device}), {args.cache} page cache, "
        "each load in ranks of its own, from call to return, slowest rank",
        "rows": [_row(work, turns[work.label], turns[work.peer]) for work in works],
        "notes": [
            "ratio: to DeepSpeed's native load, with FSDP2 to DCP's; the median of the turns' own ratios",
            "host MiB: a rank's anonymous memory at its peak, device MiB: allocated there, both over those before",
            "the plain reader plans, opens and agrees upon nothing: what a load on these processors takes at least",
            "in place: a state dict of live tensors; resume: model and optimizer, which has no states yet",
            *(f"{work.label}: {_phases(turns[work.label])}" for work in works if "stages" in turns[work.label][0]),
            "limits, all ranks together: " + ", ".join(f"{name} {found:.1f} GB/s" for name, found in limits.items()),
        ],
        "turns": turns,
        "limits": limits,
    }


def _works(args: argparse.Namespace) -> list[Work]:
    chosen = args.only.split(",") if args.only else ["zero", "in-place", "resume"]
    works = []
    if "zero" in chosen:
        source, target, saved, here = (
            bench_data.native(args),
            bench_data.native_target(args),
            bench_data.savers(args),
            args.ranks,
        )
        universal = args.data / f"{source.name}-universal"
        if not universal.is_dir():
            bench_tools.timed([sys.executable, "-m", "ucp.cli.convert", source, universal, "--quiet"])
        native = f"DeepSpeed's native load, ZeRO-3 on {here} to the same"
        works += [
            Work(native, native, "load", target, by="deepspeed"),
            Work(f"ours, ZeRO-3 on {here} to the same", native, "load", target),
            Work(f"ours, ZeRO-1 on {saved} to ZeRO-3 on {here}", native, "load", source),
            Work(f"ours, universal to ZeRO-3 on {here}", native, "load", universal),
        ]
        if args.device == "cpu":
            works.append(Work("a plain reader of the same bytes, checked, rounded", native, "plain", universal))
    for kind, into in (("in-place", "live"), ("resume", "new")):
        if kind in chosen:
            dcp, ours = bench_data.dcp(args), bench_data.fsdp(args)
            title = f"FSDP2 on {bench_data.savers(args)} to {args.ranks}, {kind}"
            peer = f"{title}: DCP from its own"
            works += [
                Work(peer, peer, "fsdp-load", dcp, by="dcp", into=into),
                Work(f"{title}: ours from DCP's", peer, "fsdp-load", dcp, into=into),
                Work(f"{title}: ours from ours", peer, "fsdp-load", ours, into=into),
            ]
    return works


def _phases(turns: list[dict[str, Any]]) -> str:
    """The best turn on rank 0: its stages, what is outside of them, and what goes on within them in all threads."""
    best = min(turns, key=lambda turn: turn["seconds"])
    stages = {**best["stages"], "settle": best["settle"]}
    stages["outside"] = best["seconds"] - sum(stages.values())
    texts = [", ".join(f"{name} {value:.3f}" for name, value in one.items()) for one in (stages, best["within"])]
    return f"{texts[0]} s; within, all threads added: {texts[1]} s"


def _row(work: Work, turns: list[dict[str, Any]], peer: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [turn["seconds"] for turn in turns]
    ratios = [turn["seconds"] / other["seconds"] for turn, other in zip(turns, peer, strict=True)]
    best = min(turns, key=lambda turn: turn["seconds"])
    nbytes = best.get("nbytes") or bench_tools.nbytes(work.source)
    row = {
        "what": work.label,
        "min s": round(min(seconds), 2),
        "median s": round(statistics.median(seconds), 2),
        "ratio": round(statistics.median(ratios), 2),
        "processor s": round(min(turn["processor"] for turn in turns), 2),
        "GB": round(nbytes / 1e9, 2),
        "GB/s": round(nbytes / min(seconds) / 1e9, 2),
        "host MiB": round(max(turn["host"] for turn in turns) / 2**20),
        "device MiB": round(max(turn["device"] for turn in turns) / 2**20),
    }
    if "stages" in best:
        row |= {
            "strategy": best["strategy"],
            "read/needed": round(best["bytes_read"] / best["nbytes"], 3),
            "prove s": round(best["prove"], 3),
            "prove %": round(100 * statistics.median(turn["prove"] / turn["seconds"] for turn in turns), 1),
            "prove processor s": round(best["prove_processor"], 3),
            "of processor %": round(
                100 * statistics.median(turn["prove_processor"] / turn["processor"] for turn in turns), 1
            ),
        }
    return row
