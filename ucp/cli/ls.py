"""``ucp ls``: the checkpoints in a run's folder."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ucp.cli import run
from ucp.cli.output import Output
from ucp.units import bytes_text

if TYPE_CHECKING:
    from ucp.inspection.listing import ListedCheckpoint, Listing

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
    rows = [
        (
            entry.tag,
            "" if entry.step is None else str(entry.step),
            entry.format,
            entry.layout or "",
            display.age_text(entry.written),
            bytes_text(entry.bytes),
            {True: "whole", False: "damaged", None: "not understood"}[entry.whole],
            _mark(found, entry),
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


def _mark(found: Listing, entry: ListedCheckpoint) -> str:
    """Whether it is the latest or newest. A file ``latest`` beside one checkpoint, as each of a Trainer's has, says
    nothing."""
    run, slash, _ = entry.tag.rpartition("/")
    beside = [one for one in found.checkpoints if one.tag.rpartition("/")[0] == run]
    if entry.latest and (not slash or len(beside) > 1 or len(found.checkpoints) == 1):
        return "latest"
    return "newest" if len(found.checkpoints) > 1 and entry.path == found.taken else ""
