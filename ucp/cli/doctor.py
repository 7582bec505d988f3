"""``ucp doctor``: what an issue report needs of the environment."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ucp.cli import run
from ucp.cli.output import Output

HELP = "versions and what of them is tested, accelerator, compilers, free space: what an issue report needs"
EXAMPLES = """\
  ucp doctor                     of this environment and the current folder
  ucp doctor /scratch/runs       of the folder that checkpoints go to
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", nargs="?", default=".", help="a folder (default: the current one)")


def command(args: argparse.Namespace) -> int:
    from ucp.inspection.doctor import examine

    out = Output(args)
    found = examine(args.folder)
    if out.result(lambda: {"schema": "ucp.doctor/1", "findings": [asdict(finding) for finding in found]}):
        return run.DONE
    out.table(("what", "found", ""), [(finding.name, finding.found, finding.remark) for finding in found])
    return run.DONE
