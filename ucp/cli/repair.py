"""``ucp repair``: a checkpoint that lost the files of some layers becomes loadable."""

from __future__ import annotations

import argparse
from typing import Any

from ucp.cli import run, source
from ucp.cli.output import Output
from ucp.errors import BadArgument
from ucp.progress import ProgressBar

HELP = "fill the layers that a damaged checkpoint lost from their neighbours (CheckFree)"
EXAMPLES = """\
  ucp repair runs/llama fixed --dry-run             what is lost, and what it would be filled with
  ucp repair runs/llama fixed                       the mean of the neighbours, by their gradients' norms
  ucp repair runs/llama fixed --norms norms.json --norm-power 1 --moments average
"""
SCHEMA = "ucp.repair/1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("damaged", metavar="DAMAGED", help="a checkpoint that lost files, or a folder of them")
    parser.add_argument("dest", metavar="OUT", help="a folder that does not exist yet")
    source.add_tag(parser)
    parser.add_argument(
        "--method",
        default="checkfree",
        metavar="M",
        help="checkfree (default); to compare with it: copy-left, copy-right, uniform, random",
    )
    parser.add_argument("--norm-power", type=run.count, default=2, metavar="P", help="of the norms: 2 (default) or 1")
    parser.add_argument("--norms", metavar="FILE", help="JSON: the norm of each layer's gradient, by its name")
    parser.add_argument("--moments", default="zero", metavar="HOW", help="optimizer states: zero (default), average")
    parser.add_argument(
        "--lr-scale", type=float, metavar="X", help="the filled layers' learning rate, in a param group of their own"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (random)")
    parser.add_argument("--spec", metavar="SPEC", help="how tensor parallelism cuts it: a name or a file")
    source.add_reading(parser)
    parser.add_argument("--workers", type=run.count, metavar="N", help="threads (default: processors, at most 8)")
    parser.add_argument("--max-memory", type=run.size, metavar="SIZE", help="limit of buffers")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")


def command(args: argparse.Namespace) -> int:
    from ucp.repair import repair
    from ucp.storage import configs

    norms: Any = None if args.norms is None else configs.given(args.norms, BadArgument)
    with ProgressBar(args.quiet or args.dry_run, "repairing") as bar:
        report = repair(
            args.damaged,
            args.dest,
            args.method,
            args.tag,
            spec=args.spec,
            norm_power=args.norm_power,
            norms=norms,
            moments=args.moments,
            lr_scale=args.lr_scale,
            seed=args.seed,
            workers=args.workers,
            max_memory=args.max_memory,
            overwrite=args.overwrite,
            dry_run=args.dry_run,
            progress=bar,
            **source.reading(args),
        )
    out = Output(args)
    if out.report(SCHEMA, report):
        return run.DONE
    out.table(("lost or damaged", ""), list(report.files.items()))
    out.table(("layer", "filled with"), list(report.layers.items()))
    if report.own_group:
        out.note("the filled parameters are a param group of their own, which the program that resumes has to make")
    return run.DONE
