"""``ucp elastic``: which nodes the next restart of a run leaves out."""

from __future__ import annotations

import argparse
from pathlib import Path

from ucp.cli import run
from ucp.cli.output import Output

HELP = "have the next restart of a run leave a node out, or take it in again"
EXAMPLES = """\
  ucp elastic drain node7 runs/llama      the next restart goes on without it
  ucp elastic undrain node7 runs/llama    it may come back
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("drain", "undrain"))
    parser.add_argument("host", metavar="HOST", help="a node, as it calls itself (UCP_NODE, or the host's name)")
    parser.add_argument("folder", metavar="DIR", help="the run's folder, as given to python -m ucp.elastic --folder")


def command(args: argparse.Namespace) -> int:
    from ucp.elastic import running
    from ucp.errors import BadArgument

    folder = Path(args.folder)
    if not folder.is_dir():
        raise BadArgument(f"{folder}: is no folder; give the run's")
    names = running.drain(folder, args.host, back=args.action == "undrain")
    out = Output(args)
    if not out.result(lambda: {"schema": "ucp.elastic/1", "left_out": names}):
        out.good(f"the next restart leaves out: {', '.join(names) or 'none'}")
    return run.DONE
