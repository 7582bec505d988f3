"""``ucp keeper``: the processes on this machine that hold runs' snapshots in memory."""

from __future__ import annotations

import argparse

from ucp.cli import run
from ucp.cli.output import Output
from ucp.units import bytes_text

HELP = "look at the keepers on this machine, which hold runs' snapshots in memory, and let them go"
EXAMPLES = """\
  ucp keeper status                       what is held, for which runs, and whether it is protected
  ucp keeper ls runs/llama                a run's generations, as ucp ls memory://... does
  ucp keeper dump runs/llama saved        the newest generation as a checkpoint on disk
  ucp keeper drop runs/llama              let go of a run's snapshots on this machine
  ucp keeper metrics                      the same in Prometheus' text format
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("start", "status", "ls", "drop", "dump", "metrics"))
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run's name, or the folder that it saves to")
    parser.add_argument("destination", metavar="DIR", nargs="?", help="dump: where the checkpoint goes")


def command(args: argparse.Namespace) -> int:
    from ucp.errors import BadArgument
    from ucp.memory import control

    if args.action not in ("status", "metrics") and args.run is None:
        raise BadArgument(f"ucp keeper {args.action} needs the run")
    if (args.action == "dump") != (args.destination is not None):
        raise BadArgument("ucp keeper dump needs the run and a destination; the other actions take no destination")
    out = Output(args)
    if args.action == "status":
        return _status(args, out)
    if args.action == "metrics":
        lines = list(control.prometheus(args.run))
        if not out.result(lambda: {"schema": "ucp.keeper.metrics/1", "lines": lines}):
            for text in lines:
                out.text(text)
        return run.DONE
    if args.action == "start":
        note = control.start_keeper(args.run)
        if not out.result(lambda: {"schema": "ucp.keeper.start/1", "run": note.run, "pid": note.pid}):
            out.good(f"the keeper of '{note.run}' on {note.node} is process {note.pid}")
        return run.DONE
    if args.action == "drop":
        nodes = control.drop(args.run)
        if not out.result(lambda: {"schema": "ucp.keeper.drop/1", "nodes": nodes}):
            out.good(f"let go of '{control.run_name(args.run)}' on {', '.join(nodes)}")
        return run.DONE
    return _generations(args)


def _status(args: argparse.Namespace, out: Output) -> int:
    from ucp.memory import control

    found = control.statuses(args.run)
    if not found and args.run is not None:
        raise control.absent(args.run)
    if out.result(lambda: {"schema": "ucp.keeper.status/1", "keepers": found}):
        return run.DONE
    if not found:
        run.say("ucp keeper: there is no keeper on this machine")
        return run.DONE
    rows = []
    for one in found:
        newest = one["generations"][0] if one["generations"] else None
        state = "" if newest is None else "protected" if newest["protected"] else "unprotected"
        held = bytes_text(one["bytes"])
        rows.append((one["run"], one["node"], str(one["pid"]), held, newest["tag"] if newest else "", state))
    out.table(("run", "node", "process", "memory", "newest", "state"), rows, right=(2, 3))
    for one in found:
        for text in one["said"]:
            run.say(f"ucp keeper: {one['node']}: {text}")
    return run.DONE


def _generations(args: argparse.Namespace) -> int:
    """What the commands that know checkpoints do with the run's memory."""
    from ucp.cli import convert, ls
    from ucp.memory import control
    from ucp.storage.kept import SCHEME

    place = f"{SCHEME}{control.run_name(args.run)}"
    if args.action == "dump":
        return int(convert.main([place, args.destination, *(["--quiet"] if args.quiet else [])]))
    args.folder = place
    return ls.command(args)
