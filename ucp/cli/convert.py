"""``ucp-convert SOURCE DEST``: convert a checkpoint (`ucp.convert` on the command line).

Also ``python -m ucp.cli.convert``. Nothing heavy is imported before the arguments are known to be right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ucp import formats, printable
from ucp.cli import processes, run, source
from ucp.formats.base import Format
from ucp.progress import ProgressBar

if TYPE_CHECKING:
    from ucp.parallel.mesh import Layout
    from ucp.transfer.team import Team

PROGRAM = "ucp-convert"
SCHEMA = "ucp.convert/1"

_EPILOG = """\
examples:
  ucp-convert runs/llama universal                                newest checkpoint to one that resumes anywhere
  ucp-convert runs/llama pointer --virtual                        the same without copying a tensor
  ucp-convert runs/llama out --to deepspeed --layout dp=8,zero=3  a native checkpoint for 8 ranks at ZeRO-3
  ucp-convert runs/llama out --to huggingface --like base --dtype bf16
                                                                  a folder for transformers, with base's tokenizer
  torchrun --nnodes 4 ... -m ucp.cli.convert runs/llama universal the work shared by many machines (srun, mpirun too)

Interrupted, the same command continues where it was.

exit codes: 0 done, 2 the input or the arguments are at fault (one line on stderr says how), 3 an internal error
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments; those of the formats' own are named by the formats."""
    known = formats.built_in()
    p = run.Parser(
        prog=PROGRAM,
        description="Convert a training checkpoint into another form, layout or format.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--version", action=run.Version)
    p.add_argument("source", metavar="SOURCE", help=source.CHECKPOINT)
    p.add_argument("dest", metavar="DEST", help="a folder that does not exist yet")
    p.add_argument("--to", default=formats.DEFAULT_TARGET, metavar="FORMAT", help=_targets(known))
    cut = ", ".join(one.name for format_ in known for one in format_.targets if one.takes_layout)
    p.add_argument("--layout", metavar="L", help=f"ranks and ZeRO stage to write for, such as dp=4,zero=3 ({cut})")
    p.add_argument(
        "--spec", metavar="SPEC", help="how tensor parallelism cuts SOURCE: a name in the catalogue or a file"
    )
    p.add_argument("--changes", metavar="FILE", help="what of the model to change on the way (ucp/changes/README.md)")
    p.add_argument("--model-config", metavar="FILE", help="the model's config.json, for the spec's sizes")
    run.add_sizes(p)
    p.add_argument("--workers", type=run.count, metavar="N", help="threads (default: processors, at most 8)")
    processes.add_argument(p)
    p.add_argument("--max-memory", type=run.size, metavar="SIZE", help="limit of buffers (default: 43MiB a thread)")
    source.add_tag(p)
    takers: dict[str, list[str]] = {}
    options = {option.name: option for _, option in formats.options_of_targets(known)}
    for target, option in formats.options_of_targets(known):
        takers.setdefault(option.name, []).append(target.name)
    for name, option in options.items():
        run.add_option(p, option, f" ({', '.join(takers[name])})")
    p.add_argument("--overwrite", action="store_true", help="replace DEST if it is a checkpoint and not part of SOURCE")
    p.add_argument("--no-resume", action="store_true", help="begin anew, and leave nothing to continue from")
    for option in {option.name: option for format_ in known for option in format_.read_options}.values():
        run.add_option(p, option)
    p.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of a format that another package adds; may be repeated",
    )
    p.add_argument("--allow-approximate", action="store_true", help=source.ALLOW_APPROXIMATE)
    p.add_argument("--dry-run", action="store_true", help="plan and check everything, write nothing")
    p.add_argument("--json", action="store_true", help="print the result as JSON (its 'schema' names the version)")
    p.add_argument("--quiet", action="store_true", help="no result line, no progress, no warnings")
    p.add_argument("--debug", action="store_true", help="log what happens, with tracebacks")
    return p


def _targets(known: Sequence[Format]) -> str:
    names = [target.name for format_ in known for target in format_.targets]
    names[names.index(formats.DEFAULT_TARGET)] += " (default)"
    return f"{', '.join(names)}, or what an installed package adds"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(given)
    run.start_logging(PROGRAM, args.quiet, args.debug)
    return run.guarded(PROGRAM, lambda: _shared(args, given), args.debug)


def _shared(args: argparse.Namespace, given: list[str]) -> int:
    """Convert, with processes of its own where that is worth while."""
    # Imported late: numpy and torch take longer than telling that an argument is wrong.
    from ucp.parallel.mesh import parse_layout

    layout = None if args.layout is None else parse_layout(args.layout)
    options = _options(args)
    import ucp.conversion  # noqa: F401  # before the fork, so once

    nothing = args.dry_run or options.get("virtual", False)  # is copied
    number, given = processes.share_out(args, given, (_source(args),), nothing)
    with processes.shared(["convert", *given], number, lambda team: _convert(args, layout, options, team)) as team:
        return _convert(args, layout, options, team)


def _source(args: argparse.Namespace) -> str:
    return args.source if args.tag is None else f"{args.source}@{args.tag}"


def _convert(args: argparse.Namespace, layout: Layout | None, options: Mapping[str, Any], team: Team) -> int:
    import signal

    from ucp.conversion import convert

    # A launcher ends the processes that are left when one has died; that is an interruption like any other.
    signal.signal(signal.SIGTERM, _interrupt)
    bar = ProgressBar(args.quiet or not team.leads)
    try:
        report = convert(
            args.source,
            args.dest,
            args.to,
            layout,
            args.spec,
            changes=args.changes,
            model_config=args.model_config,
            sizes=run.sizes(args.set),
            tag=args.tag,
            workers=args.workers,
            max_memory=args.max_memory,
            overwrite=args.overwrite,
            resume=not args.no_resume,
            team=team,
            dry_run=args.dry_run,
            progress=bar,
            allow_approximate=args.allow_approximate,
            options=options,
        )
    finally:
        bar.close()
    if not team.leads:
        return run.DONE
    if args.json:
        import dataclasses

        sys.stdout.write(printable.dumps({"schema": SCHEMA, **dataclasses.asdict(report)}) + "\n")
    elif not args.quiet:
        sys.stdout.write(f"{printable.line(str(report))}\n")
    return run.DONE


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The formats' own options that were given. Raises BadArgument."""
    known = formats.built_in()
    options = [option for _, option in formats.options_of_targets(known)]
    options += [option for format_ in known for option in format_.read_options]
    given = {option.name: value for option in options if (value := getattr(args, option.name, None)) is not None}
    if args.option:
        takes = {option.name: option for format_ in formats.every() for option in format_.read_options}
        takes.update({option.name: option for option in formats.target(args.to).options})
        for pair in args.option:
            name, value = run.option(pair, takes)
            given[name] = value
    return given


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
