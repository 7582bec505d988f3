"""``ucp COMMAND``: look at checkpoints, check, compare, plan, convert and report.

Also ``python -m ucp.cli.main``. Each command is a module with ``HELP``, ``EXAMPLES``, ``add_arguments(parser)`` and
``command(args) -> exit code``; nothing heavy is imported before the arguments are known to be right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from ucp.cli import (
    convert,
    diff,
    digest,
    doctor,
    elastic,
    keeper,
    ls,
    merge,
    output,
    plan,
    repair,
    report,
    run,
    show,
    spec,
    verify,
)

PROGRAM = "ucp"

COMMANDS: dict[str, ModuleType] = {
    "inspect": show,
    "ls": ls,
    "verify": verify,
    "diff": diff,
    "digest": digest,
    "plan": plan,
    "report": report,
    "merge": merge,
    "repair": repair,
    "keeper": keeper,
    "elastic": elastic,
    "doctor": doctor,
}
# Commands that are programs of their own, too.
PROGRAMS = {"convert": convert, "spec": spec}

_EPILOG = """\
examples:
  ucp ls runs/llama                            which checkpoints there are, and which are whole
  ucp inspect runs/llama                       what is in the newest
  ucp verify runs/llama --finite               every element there once, no bit flipped, no NaN
  ucp diff runs/llama universal                whether two hold the same, to the bit
  ucp digest runs/llama                        a digest of every tensor, the same in every layout
  ucp plan runs/llama --layout dp=64,zero=3    what a resume there reads, rank by rank
  ucp report runs/llama -o report.html         all that as a page to look at
  ucp convert runs/llama universal             the same as ucp-convert
  ucp merge a b mean                           two checkpoints' weights into one
  ucp repair runs/llama fixed                  a checkpoint that lost a pipeline stage, filled from its neighbours
  ucp keeper status                            snapshots that are held in memory here
  ucp doctor                                   versions and the like, for an issue report

exit codes: 0 done, 1 the answer is no (damaged; they differ), 2 the input or the arguments are at fault (one line on
stderr says how), 3 an internal error
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    p = run.Parser(
        prog=PROGRAM,
        description="Look at training checkpoints of any layout: show, check, compare, plan, convert, report.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--version", action=run.Version)
    commands = p.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=run.Parser)
    for name, module in COMMANDS.items():
        one = commands.add_parser(
            name,
            help=module.HELP,
            description=f"{module.HELP[0].upper()}{module.HELP[1:]}.",
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(one)
        output.add_arguments(one)
    commands.add_parser("convert", help="convert into another form, layout or format (ucp-convert)", add_help=False)
    commands.add_parser("spec", help="check and show specs of parallel cuts (ucp-spec)", add_help=False)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in PROGRAMS:
        return int(PROGRAMS[given[0]].main(given[1:]))
    args, unknown = parser().parse_known_args(given)
    if unknown:
        # argparse itself would point at the help of all commands.
        one = run.Parser(prog=f"{PROGRAM} {args.command}")
        one.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.given = given
    program = f"{PROGRAM} {args.command}"
    run.start_logging(program, args.quiet, args.debug)
    return run.guarded(program, lambda: int(COMMANDS[args.command].command(args)), args.debug)


if __name__ == "__main__":
    sys.exit(main())
