"""``ucp plan``: what a resume on another layout, or a conversion, would read and write."""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import TYPE_CHECKING

from ucp import limits
from ucp.cli import run, source
from ucp.cli.output import Output
from ucp.units import bytes_text, counted, each_text

if TYPE_CHECKING:
    from ucp.inspection.planning import ResumePlan

UNKNOWN_TIME = "not known: say how fast the storage is, as --storage-bandwidth 2GB, or a rank, as --rank-bandwidth 1GB"
HELP = "say what a resume on another layout would read: bytes, files, memory and time, rank by rank"
EXAMPLES = """\
  ucp plan runs/llama --layout dp=64,zero=3
  ucp plan runs/llama --layout dp=8,zero=1 --rank-bandwidth 2GB --storage-bandwidth 20GB
  ucp plan runs/llama --layout dp=4,tp=2,zero=1 --spec llama --model-config config.json
  ucp plan runs/gpt --layout dp=4,pp=4,zero=1 --ds-config ds.json
                                     with "pipeline": {"partition": [0, 7, 12, 19, 26], "tied": {"embed": [0, 25]}};
                                     without a partition layers are divided by their parameters, DeepSpeed's default
  ucp plan runs/moe --layout dp=8,ep=4,zero=1
  ucp convert runs/llama out --dry-run        what a conversion would write
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="SOURCE", help=source.CHECKPOINT)
    parser.add_argument(
        "--layout", required=True, metavar="L", help="ranks (dp, tp, pp, ep) and ZeRO stage, as dp=64,zero=3"
    )
    source.add_division(parser)
    parser.add_argument("--rank-bandwidth", type=run.size, metavar="SIZE", help="bytes per second that a rank reads")
    parser.add_argument("--storage-bandwidth", type=run.size, metavar="SIZE", help="bytes per second of all together")
    parser.add_argument("--ranks-per-node", type=run.count, default=8, metavar="N", help="for the memory (default 8)")
    parser.add_argument("--matrix", action="store_true", help="with --json: bytes from every source to every rank")
    source.add_arguments(parser)


def command(args: argparse.Namespace) -> int:
    from ucp.parallel.mesh import parse_layout

    layout = parse_layout(args.layout)
    from ucp.inspection.planning import plan

    out = Output(args)
    with source.open_checkpoint(args, args.checkpoint) as checkpoint:
        found = plan(
            checkpoint,
            layout,
            spec=args.spec,
            model_config=args.model_config,
            sizes=run.sizes(args.set),
            rank_bandwidth=args.rank_bandwidth,
            storage_bandwidth=args.storage_bandwidth,
            ranks_per_node=args.ranks_per_node,
            **source.division(args),
        )
    if not out.result(lambda: found.as_json(args.matrix)):
        _print(out, found, args.ranks_per_node)
    return run.DONE


def _print(out: Output, found: ResumePlan, per_node: int) -> None:
    from ucp.inspection import display
    from ucp.inspection.planning import balance

    spread = balance(found.ranks)
    count = min(per_node, len(found.ranks))
    hosted = counted(count, "rank")
    facts = [
        ("from", f"{found.path} ({found.source_layout}), {bytes_text(found.stored)} of tensors"),
        ("to", f"{found.layout}, {counted(len(found.ranks), 'rank')}"),
        ("read", f"{bytes_text(found.bytes)} in all, from {counted(found.files, 'file')}"),
        (
            "by a rank",
            each_text(spread["smallest"], spread["largest"])
            if len(set(map(bytes_text, spread.values()))) == 1
            else f"{bytes_text(spread['smallest'])} to {bytes_text(spread['largest'])}, "
            f"{bytes_text(spread['mean'])} on average; most by rank {found.largest}",
        ),
        ("memory", f"{bytes_text(found.node_memory)} on the host of {hosted} until all have read"),
    ]
    if found.stages is not None:
        spans = [display.span_text(a, b) for a, b in pairwise(found.stages)]
        facts.insert(2, ("stages", f"layers {', '.join(spans)} of {found.stages[-1]}"))
    if found.seconds is not None:
        limit = "the largest rank's reading" if found.bound_by == "rank" else "the storage's bandwidth"
        facts.append(("time", f"{display.seconds_text(found.seconds)}, limited by {limit}"))
    else:
        facts.append(("time", UNKNOWN_TIME))
    out.title(f"a resume on {found.layout}")
    out.facts(facts)
    shown = found.ranks[: limits.PLAN_LINES_COUNT] if out.people else found.ranks
    rows = [(f"rank {r.rank}", bytes_text(r.bytes), str(r.files), str(r.pieces)) for r in shown]
    if not out.people:
        rows = [(f"rank {r.rank}", str(r.bytes), str(r.files), str(r.pieces)) for r in shown]
    out.table(("rank", "reads", "files", "pieces"), rows, right=(1, 2, 3))
    if len(shown) < len(found.ranks):
        out.note(f"  and {counted(len(found.ranks) - len(shown), 'more rank')} (in a pipe, or with --json, all)")
