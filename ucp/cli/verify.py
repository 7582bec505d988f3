"""``ucp verify``: whether a checkpoint is whole."""

from __future__ import annotations

import argparse

from ucp.cli import run, source
from ucp.cli.output import Output
from ucp.progress import ProgressBar
from ucp.units import bytes_text

HELP = "check that a checkpoint is whole: files, coverage, digests, copies, training state"
EXAMPLES = """\
  ucp verify runs/llama                      reads every byte that a digest or a checksum covers
  ucp verify runs/llama --finite             and looks for infinities and NaN
  ucp verify runs/llama --quick              metadata only: files, sizes, coverage, training state
  ucp verify copy --against DIGEST           and that all tensors together have this digest: see ucp digest
  ucp verify runs/llama || exit 1            1: damaged; 2: no checkpoint at all
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=source.CHECKPOINT)
    parser.add_argument("--finite", action="store_true", help="look for values that are infinite or not a number")
    parser.add_argument("--quick", action="store_true", help="read metadata only, no tensors")
    parser.add_argument(
        "--against", metavar="DIGEST", help="the digest of all tensors (ucp digest) that it should have; computed anew"
    )
    source.add_arguments(parser)


def command(args: argparse.Namespace) -> int:
    from ucp.errors import BadArgument
    from ucp.inspection.verify import verify

    if args.quick and args.finite:
        raise BadArgument("--finite reads every value, which --quick forbids; give one of them")
    out = Output(args)
    with ProgressBar(args.quiet, "verifying") as bar:
        verdict = verify(
            args.checkpoint,
            args.tag,
            spec=args.spec,
            model_config=args.model_config,
            sizes=run.sizes(args.set),
            trust_paths=args.trust_paths,
            quick=args.quick,
            finite=args.finite,
            against=args.against,
            progress=bar,
        )
    code = run.DONE if verdict.whole else run.NO
    if out.result(verdict.as_json):
        return code
    faults = [f for f in verdict.findings if f.fault]
    layout = f" ({verdict.layout})" if verdict.layout else ""
    if verdict.whole:
        out.good(f"{verdict.path}: whole; {verdict.format}{layout}")
    else:
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        out.bad(f"{verdict.path}: damaged, {count}; {verdict.format}{layout}")
    done = verdict.checked
    facts = []
    if "tensors" in done:
        facts.append(("coverage", f"{done['tensors']} tensors, every element held exactly once"))
    for key, what in (
        ("digested", "compared with the checkpoint's digests"),
        ("digested_by_zip", "compared with checksums in torch's files"),
        ("compared", "of copies compared with each other"),
        ("finite", "looked through for infinities and NaN"),
        ("logical", "compared with logical digests"),
    ):
        if done.get(key):
            facts.append((key.replace("_", " "), f"{bytes_text(done[key])} {what}"))
    out.facts(facts)
    rows = [("fault" if f.fault else "note", f.kind, f.subject, f.text) for f in verdict.findings]
    for weight, kind, subject, text in rows:
        if out.people:
            (out.bad if weight == "fault" else out.note)(f"  {weight}: {f'{subject}: ' if subject else ''}{text}")
        else:
            out.table((), [(weight, kind, subject, text)])
    return code
