"""``ucp-convert SOURCE DEST``: convert a checkpoint (`ucp.convert` on the command line).

Also ``python -m ucp.cli.convert``. Nothing heavy is imported before the arguments are known to be right.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from ucp import printable
from ucp.cli import run, source
from ucp.parallel.mesh import parse_layout
from ucp.progress import ProgressBar

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
    """The command's arguments."""
    p = run.Parser(
        prog=PROGRAM,
        description="Convert a training checkpoint into another form, layout or format.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--version", action=run.Version)
    p.add_argument("source", metavar="SOURCE", help=source.CHECKPOINT)
    p.add_argument("dest", metavar="DEST", help="a folder that does not exist yet")
    p.add_argument(
        "--to",
        default="universal",
        metavar="FORMAT",
        help="universal (default), deepspeed, deepspeed-universal, dcp, huggingface; megatron is planned",
    )
    p.add_argument("--layout", metavar="L", help="ranks and ZeRO stage to write for, such as dp=4,zero=3 (deepspeed)")
    p.add_argument(
        "--spec", metavar="SPEC", help="how tensor parallelism cuts SOURCE: a name in the catalogue or a file"
    )
    p.add_argument("--model-config", metavar="FILE", help="the model's config.json, for the spec's sizes")
    run.add_sizes(p)
    p.add_argument("--virtual", action="store_true", help="write a manifest that points into SOURCE; copy no tensors")
    p.add_argument("--digests", action="store_true", help="with --virtual: read SOURCE once and record its digests")
    p.add_argument("--workers", type=run.count, metavar="N", help="threads (default: processors, at most 8)")
    p.add_argument("--max-memory", type=run.size, metavar="SIZE", help="limit of buffers (default: 43MiB a thread)")
    source.add_tag(p)
    p.add_argument("--ds-config", metavar="FILE", help="DeepSpeed config for what --layout leaves open (deepspeed)")
    p.add_argument("--dtype", metavar="T", help="element type of the weights: bf16, fp16, fp32 (huggingface)")
    p.add_argument(
        "--max-shard-size", type=run.size, metavar="SIZE", help="of a file of weights, such as 5GB (huggingface)"
    )
    p.add_argument(
        "--like",
        metavar="FOLDER",
        help="model folder to carry config, tokenizer and generation files from; a PEFT adapter's for an adapter "
        "(huggingface)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace DEST if it is a checkpoint and not part of SOURCE")
    p.add_argument("--no-resume", action="store_true", help="begin anew, and leave nothing to continue from")
    p.add_argument("--trust-client-state", action="store_true", help="run code that SOURCE's client state asks for")
    p.add_argument("--dry-run", action="store_true", help="plan and check everything, write nothing")
    p.add_argument("--json", action="store_true", help="print the result as JSON (its 'schema' names the version)")
    p.add_argument("--quiet", action="store_true", help="no result line, no progress, no warnings")
    p.add_argument("--debug", action="store_true", help="log what happens, with tracebacks")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parser().parse_args(arguments)
    run.start_logging(PROGRAM, args.quiet, args.debug)
    return run.guarded(PROGRAM, lambda: _convert(args), args.debug)


def _convert(args: argparse.Namespace) -> int:
    layout = None if args.layout is None else parse_layout(args.layout)
    # Imported late: numpy and torch take longer than telling that an argument is wrong.
    from ucp.conversion import convert
    from ucp.transfer.team import from_environment

    team = from_environment(os.environ)
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
            model_config=args.model_config,
            sizes=run.sizes(args.set),
            virtual=args.virtual,
            tag=args.tag,
            digests=args.digests,
            workers=args.workers,
            max_memory=args.max_memory,
            overwrite=args.overwrite,
            resume=not args.no_resume,
            team=team,
            dry_run=args.dry_run,
            ds_config=args.ds_config,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            like=args.like,
            trust_client_state=args.trust_client_state,
            progress=bar,
        )
    finally:
        bar.close()
    if not team.leads:
        return run.DONE
    if args.json:
        sys.stdout.write(printable.dumps({"schema": SCHEMA, **dataclasses.asdict(report)}) + "\n")
    elif not args.quiet:
        sys.stdout.write(f"{printable.line(str(report))}\n")
    return run.DONE


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
