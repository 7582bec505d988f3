"""``ucp ls``: the checkpoints in a run's folder."""

from __future__ import annotations

import argparse

from ucp.cli import run
from ucp.cli.output import Output
from ucp.units import bytes_text

HELP = "list the checkpoints in a folder: step, age, size, whole or not, and which one 'latest' means"
EXAMPLES = """\
  ucp ls runs/llama
  ucp ls runs/llama --json | jq -r '.checkpoints[] | select(.whole) | .tag'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a folder of checkpoints, or one checkpoint")


def command(args: argparse.Namespace) -> int:
    from ucp.inspection import display
    from ucp.inspection.listing import listing

    out = Output(args)
    found = listing(args.folder)
    if out.result(found.as_json):
        return run.DONE
    several = len(found.checkpoints) > 1
    rows = [
        (
            entry.tag,
            "" if entry.step is None else str(entry.step),
            entry.format,
            entry.layout or "",
            display.age_text(entry.written),
            bytes_text(entry.bytes),
            {True: "whole", False: "damaged", None: "not understood"}[entry.whole],
            "latest" if entry.latest else "newest" if several and entry.path == found.taken else "",
        )
        for entry in found.checkpoints
    ]
    out.table(("tag", "step", "format", "layout", "written", "size", "state", ""), rows, right=(1, 5))
    for entry in found.checkpoints:
        if entry.problem:
            run.say(f"ucp ls: {entry.problem}")
    if found.refused is not None:
        run.say(f"ucp ls: {found.refused}")
    for name in found.unfinished:
        run.say(f"ucp ls: {name} is what a save or a conversion under way has written, or left when it died")
    return run.DONE
