"""``ucp digest``: one digest for every tensor, and one for all, whatever the layout."""

from __future__ import annotations

import argparse

from ucp.cli import run, source
from ucp.cli.output import Output
from ucp.progress import ProgressBar

HELP = "print the digest of every tensor, the same in every format and layout, and one of all"
EXAMPLES = """\
  ucp digest runs/llama                      one line a tensor, and one for all; reads nothing where they are recorded
  ucp digest runs/llama --compute            of the elements in its files, whatever is recorded; 1: they contradict it
  ucp verify copy --against "$(ucp digest runs/llama | tail -1 | cut -f2)"   whether a copy holds the same
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=source.CHECKPOINT)
    parser.add_argument("--compute", action="store_true", help="read all tensors, also where digests are recorded")
    source.add_arguments(parser)


def command(args: argparse.Namespace) -> int:
    from ucp.inspection.digests import contradictions, digests_of

    out = Output(args)
    with source.open_checkpoint(args, args.checkpoint) as opened, ProgressBar(args.quiet, "digesting") as bar:
        found = digests_of(opened, compute=args.compute, progress=bar)
        wrong = contradictions(opened, found)
    code = run.NO if wrong else run.DONE
    if out.result(lambda: {**found.as_json(), "contradicts": wrong}):
        return code
    rows = [
        (
            f"{t.name}:{t.state}",
            str(t.digest),
            t.dtype,
            "x".join(map(str, t.shape)),
            "recorded" if t.recorded else "computed",
        )
        for t in found.tensors
    ]
    out.table(("tensor", "digest", "type", "shape", ""), rows)
    for name in wrong:
        out.bad(f"{name} has another digest than is recorded: the checkpoint is damaged, or was written wrongly")
    out.facts([("all", found.all)])
    return code
