"""``ucp report``: a checkpoint as one page to look at."""

from __future__ import annotations

import argparse
import sys

from ucp import printable
from ucp.cli import run, source
from ucp.progress import ProgressBar

HELP = "write one self-contained HTML page about a checkpoint: sizes, cuts, balance, a planned resume, faults"
EXAMPLES = """\
  ucp report runs/llama -o report.html
  ucp report runs/llama -o report.html --plan-layout dp=64,zero=3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=source.CHECKPOINT)
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE", help="default: report.html")
    parser.add_argument("--plan-layout", metavar="L", help="show what a resume on this layout moves, as dp=64,zero=3")
    source.add_division(parser)
    parser.add_argument("--quick", action="store_true", help="do not read tensors to check digests")
    parser.add_argument("--finite", action="store_true", help="look for infinities and NaN, too")
    source.add_arguments(parser)


def command(args: argparse.Namespace) -> int:
    from ucp.parallel.mesh import parse_layout

    layout = None if args.plan_layout is None else parse_layout(args.plan_layout)
    from ucp.cli.output import Output
    from ucp.inspection.report import write_report

    out = Output(args)
    with ProgressBar(args.quiet, "verifying") as bar:
        written = write_report(
            args.checkpoint,
            args.output,
            tag=args.tag,
            layout=layout,
            spec=args.spec,
            model_config=args.model_config,
            sizes=run.sizes(args.set),
            trust_paths=args.trust_paths,
            quick=args.quick,
            finite=args.finite,
            progress=bar,
            **source.division(args),
        )
    if not out.result(written.as_json):
        sys.stdout.write(f"{printable.line(str(written))}\n")
    return run.DONE
