"""``ucp merge``: several checkpoints into one."""

from __future__ import annotations

import argparse
from typing import Any

from ucp import formats
from ucp.cli import processes, run, source
from ucp.cli.output import Output
from ucp.errors import BadArgument
from ucp.formats.base import Option
from ucp.progress import ProgressBar
from ucp.transfer.team import Team

HELP = "combine several checkpoints of one model, of any formats and layouts, into one"
EXAMPLES = """\
  ucp merge runs/x@step100 runs/x@step200 runs/x@step300 mean            the mean of their weights
  ucp merge a b c out --weights 1,2,3 --to huggingface --like a          weighted, as a Hugging Face folder
  ucp merge math code out --base llama --method ties --density 0.4       task vectors, trimmed, by the majority's sign
  ucp merge a b out --method slerp --t 0,0.5,1                           from a to b over the layers
  ucp merge out --recipe merge.yaml --plan                               what a merge file would do
  ucp merge lora-a lora-b out --adapter-merge delta --rank 16            two LoRA adapters into one
"""
SCHEMA = "ucp.merge/1"
ADAPTERS_SCHEMA = "ucp.merge-adapters/1"
_SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="checkpoints; PATH@TAG for one of several")
    parser.add_argument("dest", metavar="OUT", help="a folder that does not exist yet")
    _add_method(parser)
    parser.add_argument("--recipe", metavar="FILE", help="a merge file, which names sources and methods")
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="merge these; may be repeated")
    parser.add_argument(
        "--optimizer", default="none", metavar="HOW", help="none (default): weights alone; average; from=N"
    )
    parser.add_argument("--step", choices=("max",), help="which count averaged states take where they differ")
    parser.add_argument("--buffers", metavar="from=N", help="whose integer tensors count where they differ")
    parser.add_argument("--dtype", metavar="T", help="of the weights: bf16, fp16, fp32 (default: the widest)")
    parser.add_argument("--vocab", choices=("cut",), help="cut padded vocabularies to the smallest's rows")
    parser.add_argument("--allow-nonfinite", action="store_true", help="merge NaN and infinity, too")
    parser.add_argument("--adapter-merge", choices=("factors", "delta", "concat"), help="SOURCEs are LoRA adapters")
    parser.add_argument("--rank", type=run.count, metavar="N", help="of the result (--adapter-merge delta)")
    parser.add_argument("--to", default="universal", metavar="FORMAT", help="as for ucp-convert")
    parser.add_argument("--layout", metavar="L", help="ranks and ZeRO stage to write for (deepspeed)")
    for option in _target_options().values():
        run.add_option(parser, option)
    parser.add_argument("--workers", type=run.count, metavar="N", help="threads (default: processors, at most 8)")
    processes.add_argument(parser)
    parser.add_argument("--max-memory", type=run.size, metavar="SIZE", help="limit of each process's buffers")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a checkpoint")
    parser.add_argument("--no-resume", action="store_true", help="begin anew, and leave nothing to continue from")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and write nothing")
    parser.add_argument("--allow-approximate", action="store_true", help=source.ALLOW_APPROXIMATE)
    parser.add_argument("--spec", metavar="SPEC", help="how tensor parallelism cuts the sources: a name or a file")
    parser.add_argument("--model-config", metavar="FILE", help="the model's config.json, for the spec's sizes")
    source.add_reading(parser)
    run.add_sizes(parser)


def _target_options() -> dict[str, Option]:
    """The targets' own options, but those that a merge has itself or that make no sense for one."""
    taken = ("dtype", "virtual", "digests", "weights")
    return {o.name: o for _, o in formats.options_of_targets(formats.built_in()) if o.name not in taken}


def _add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method", default="linear", help="linear (default), lerp, slerp, task, ties, dare, ema, lawa, mwa"
    )
    parser.add_argument("--weights", type=_numbers, metavar="W,W", help="one a SOURCE (linear, task, ties, dare)")
    parser.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=None, help="divide by the weights' sum"
    )
    parser.add_argument(
        "--t", type=_numbers, metavar="T[,T]", help="from the first (0) to the second (1); several: over the layers"
    )
    parser.add_argument("--base", metavar="PATH", help="what all began from (task, ties, dare)")
    parser.add_argument("--mask", action="append", default=[], metavar="PATH", help="one for each SOURCE (task)")
    parser.add_argument("--scale", type=float, metavar="X", help="of the task vectors")
    parser.add_argument("--density", type=float, metavar="X", help="share of elements that is kept (ties, dare)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws (dare)")
    parser.add_argument("--elect", action="store_true", default=None, help="by the majority's sign (dare)")
    parser.add_argument("--beta", type=float, metavar="X", help="decay of the moving average (ema)")
    parser.add_argument("--window", type=run.count, metavar="N", help="how many of the last (lawa)")
    parser.add_argument("--stride", type=run.count, metavar="N", help="and every which of them (lawa)")
    parser.add_argument(
        "--metric",
        metavar="loss=X,X|step=X,X",
        help="a metric of each SOURCE; without numbers what they say themselves (mwa)",
    )
    parser.add_argument("--penalty", type=float, metavar="P", help="0 is the mean, a large one takes the best (mwa)")


def command(args: argparse.Namespace) -> int:
    if args.adapter_merge is not None:
        return _adapters(args)
    number, given = processes.share_out(args, args.given, args.sources, args.plan)
    if number > 1:
        import ucp.merging.combine  # noqa: F401  # once, for copies of this process, too
    with processes.shared(given, number, lambda team: _combine(args, team)) as team:
        return _combine(args, team)


def _combine(args: argparse.Namespace, team: Team) -> int:
    from ucp.merging.combine import merge

    metrics = {} if args.metric is None else _metrics(args.metric)
    options = ("weights", "normalize", "t", "scale", "density", "seed", "elect", "beta", "window", "stride", "penalty")
    given: dict[str, Any] = {name: value for name in options if (value := getattr(args, name)) is not None}
    taken = [*_target_options(), *source.reading(args)]
    given |= {name: value for name in taken if (value := getattr(args, name, None)) is not None}
    with ProgressBar(args.quiet or not team.leads or args.plan, "merging") as bar:
        report = merge(
            args.sources,
            args.dest,
            args.method,
            base=args.base,
            masks=args.mask,
            recipe=args.recipe,
            only=args.only,
            optimizer=_number(args.optimizer, "--optimizer") if "=" in args.optimizer else args.optimizer,
            step=args.step,
            buffers=None if args.buffers is None else _number(args.buffers, "--buffers"),
            dtype=args.dtype,
            allow_nonfinite=args.allow_nonfinite,
            vocab=args.vocab,
            to=args.to,
            layout=args.layout,
            spec=args.spec,
            model_config=args.model_config,
            sizes=run.sizes(args.set),
            workers=args.workers,
            max_memory=args.max_memory,
            overwrite=args.overwrite,
            resume=not args.no_resume,
            dry_run=args.plan,
            allow_approximate=args.allow_approximate,
            team=team,
            progress=bar,
            **given,
            **metrics,
        )
    if not team.leads:
        return run.DONE
    out = Output(args)
    if out.report(SCHEMA, report):
        return run.DONE
    lines = list(report.lines.items())
    out.table(("parameters", "operation"), [(str(n), text) for text, n in lines[:_SHOWN]], right=(0,))
    if len(lines) > _SHOWN:
        out.note(f"and {len(lines) - _SHOWN} more; --json has all")
    return run.DONE


def _adapters(args: argparse.Namespace) -> int:
    from ucp.merging.adapters import merge_adapters

    report = merge_adapters(args.sources, args.dest, args.adapter_merge, args.weights, args.rank)
    Output(args).report(ADAPTERS_SCHEMA, report)
    return run.DONE


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers; write them as 1,2,0.5") from None


def _metrics(text: str) -> dict[str, Any]:
    """``loss=2.0,1.0`` as the method's options. Raises BadArgument."""
    form, given, numbers = text.partition("=")
    try:
        return {"form": form, "metrics": tuple(float(part) for part in numbers.split(","))} if given else {"form": form}
    except ValueError:
        raise BadArgument(f"--metric {text}: write loss=X,X,... or step=X,X,... with one number a source") from None


def _number(text: str, flag: str) -> int:
    """``from=N``, counted from 1 on the command line. Raises BadArgument."""
    word, _, number = text.partition("=")
    if word != "from" or not number.isascii() or not number.isdigit() or int(number) < 1:
        raise BadArgument(f"{flag} {text}: write from=N, the number of the source, counted from 1")
    return int(number) - 1
