"""``ucp diff``: how two checkpoints differ."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from ucp import limits
from ucp.cli import run, source
from ucp.cli.output import Output
from ucp.progress import ProgressBar
from ucp.units import bytes_text

if TYPE_CHECKING:
    from ucp.inspection.difference import Difference

APART = "  max abs: the largest |A - B|; max rel: the largest |A - B| / max(|A|, |B|), above 1 where the signs differ"
HELP = "compare two checkpoints of any formats and layouts: names, shapes, types, values, training state"
EXAMPLES = """\
  ucp diff runs/llama universal                       0: the same to the bit; 1: they differ
  ucp diff runs/llama@step100 runs/llama@step200 --state param
  ucp diff --quick runs/llama universal               by their digests, in no time where both have recorded them
  ucp diff before after --rtol 1e-5 --ignore-types    as two runs' states are compared
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help=f"{source.CHECKPOINT}; A@TAG takes TAG")
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument("--tag-a", metavar="TAG", help="the checkpoint of A to take, whatever --tag says")
    parser.add_argument("--tag-b", metavar="TAG", help="the checkpoint of B to take, whatever --tag says")
    parser.add_argument("--param", action="append", default=[], metavar="GLOB", help="only these; may be repeated")
    parser.add_argument("--state", action="append", default=[], metavar="NAME", help="only param, exp_avg, ...")
    parser.add_argument("--atol", type=_tolerance, default=0.0, metavar="X", help="count as equal within X")
    parser.add_argument("--rtol", type=_tolerance, default=0.0, metavar="X", help="and X times the larger value")
    parser.add_argument("--ignore-types", action="store_true", help="compare values only, not their element types")
    parser.add_argument("--tensors-only", action="store_true", help="leave out the training state")
    parser.add_argument("--no-values", action="store_true", help="names, shapes, training state; read no tensor")
    parser.add_argument(
        "--quick", action="store_true", help="compare values by logical digests, and read none that both have recorded"
    )
    source.add_arguments(parser, " of A and of B (of one: --tag-a, --tag-b)")


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 on")
    return value


def _taken(which: str, path: str, tag: str | None) -> tuple[str, str | None]:
    """The path and the tag of a side, which can be said once."""
    from ucp.errors import BadArgument
    from ucp.storage.locations import tagged

    folder, said = tagged(path)
    if said is not None and tag is not None:
        raise BadArgument(f"'{path}' names a tag, and so does --tag-{which} {tag}; give one of them")
    return folder, tag if said is None else said


def command(args: argparse.Namespace) -> int:
    from ucp.errors import BadArgument
    from ucp.inspection.difference import diff

    if args.quick and (args.no_values or args.atol or args.rtol):
        raise BadArgument("--quick compares digests, to the bit: give it without --no-values, --atol and --rtol")
    out = Output(args)
    with (
        source.open_checkpoint(args, *_taken("a", args.a, args.tag_a)) as a,
        source.open_checkpoint(args, *_taken("b", args.b, args.tag_b)) as b,
        ProgressBar(args.quiet, "comparing") as bar,
    ):
        found = diff(
            a,
            b,
            params=args.param,
            states=args.state,
            absolute=args.atol,
            relative=args.rtol,
            types=not args.ignore_types,
            training_state=not args.tensors_only and not args.param and not args.state,
            values=not args.no_values,
            quick=args.quick,
            progress=bar,
        )
    code = run.DONE if found.same else run.NO
    if out.result(found.as_json):
        return code
    counted = f"{found.compared} tensors compared ({bytes_text(found.bytes)}), {found.equal} equal to the bit"
    if args.quick:
        counted += f"; {len(found.by_digest)} by digests" + (", reading nothing" if not found.read else "")
    (out.good if found.same else out.bad)(f"{'the same' if found.same else 'they differ'}: {counted}")
    _print(out, found)
    return code


def _print(out: Output, found: Difference) -> None:
    """What differs. For people, tensors whose values differ are a table of their own."""
    from ucp.inspection import display

    rows: list[tuple[str, ...]] = [("only in A", name, "", "") for name in found.only_a]
    rows += [("only in B", name, "", "") for name in found.only_b]
    rows += [
        ("shape", name, display.shape_text(ours), display.shape_text(theirs))
        for name, (ours, theirs) in found.shapes.items()
    ]
    apart: list[tuple[str, ...]] = []
    for t in sorted(found.tensors, key=lambda t: -t.absolute):
        name = f"{t.name}:{t.state}"
        if t.types_differ:
            rows.append(("type", name, *t.dtypes))
        if t.different:
            at = "" if t.first is None else f", first at {list(t.first)}"
            unlike = f", {t.unlike} finite on one side only" if t.unlike else ""
            how = f"max abs {t.absolute:.3g}, max rel {t.relative:.3g}{unlike}"
            label = "values" if t.beyond else "close"
            row = (label, name, f"{t.different} of {t.elements} differ{at}", how)
            (apart if out.people else rows).append(row)
    rows += [("digest", name, *digests) for name, digests in found.by_digest.items() if digests[0] != digests[1]]
    rows += [("value", name, *values) for name, values in found.scalars.items()]
    rows += [("training state", name, *values) for name, values in found.training_state.items()]
    _table(out, ("what", "of", "elements", "how far apart"), apart)
    if apart:
        out.note(APART)
    _table(out, ("what", "of", "in A", "in B"), rows)


def _table(out: Output, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    shown = rows[: limits.DIFF_LINES_COUNT] if out.people else rows
    out.table(head, shown)
    if len(shown) < len(rows):
        out.note(f"  and {len(rows) - len(shown)} more (in a pipe, or with --json, all)")
