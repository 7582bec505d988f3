"""``ucp inspect``: what is in a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ucp import limits
from ucp.cli import run, source
from ucp.cli.output import Output
from ucp.units import bytes_text, counted, each_text

if TYPE_CHECKING:
    from ucp.checkpoint import Checkpoint
    from ucp.inspection.summary import Module, ParameterSummary, Summary

HELP = "show what is in a checkpoint: format, layout, step, sizes, parameters, states, fragments"
# What a checkpoint's entries are called here: one, several.
KINDS = {
    "parameter": ("{} trained", "{} trained"),
    "frozen": ("{} frozen", "{} frozen"),
    "buffer": ("{} buffer", "{} buffers"),
    "padding": ("{} piece of padding", "{} pieces of padding"),
}
TRAINING = {
    "lr_scheduler": "learning-rate scheduler",
    "loss_scaler": "loss scaler",
    "ranks": "random generators and client state of each rank",
    "data_sampler": "curriculum data sampler",
    "random_ltd": "random token dropping",
}
LEGEND = (
    "  param: the weight in the highest precision there is, such as ZeRO's fp32 master; the others: the optimizer's "
    "states; cut: how ranks or files divide it ('flat ranges over 4 ranks': ZeRO's partitions)"
)
EXAMPLES = """\
  ucp inspect runs/llama                              everything, layers of the same shapes as one line
  ucp inspect runs/llama --tree 3                     sums by module, three levels deep
  ucp inspect runs/llama --param '*.0.*.weight'       each of these, with where its fragments lie
  ucp inspect runs/llama --json | jq .step
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=source.CHECKPOINT)
    parser.add_argument("--tree", nargs="?", type=run.count, const=100, metavar="DEPTH", help="sums by module")
    parser.add_argument("--param", metavar="GLOB", help="only these parameters, with the places of their fragments")
    source.add_arguments(parser)


def command(args: argparse.Namespace) -> int:
    from ucp.inspection import summary

    out = Output(args)
    with source.open_checkpoint(args, args.checkpoint) as checkpoint:
        found = summary.summarise(checkpoint)
        names = [p.name for p in found.parameters]
        if args.param is not None:
            names = summary.matching(names, args.param)
        kept = [p for p in found.parameters if p.name in set(names)]

        def as_json() -> dict[str, Any]:
            body = found.as_json()
            body["parameters"] = [asdict(p) for p in kept]
            if args.param is not None:
                for entry in body["parameters"]:
                    for state, values in entry["states"].items():
                        places = summary.fragments(checkpoint.catalog, entry["name"], state)
                        values["places"] = [asdict(place) for place in places]
            if args.tree is not None:
                body["tree"] = summary.tree(kept).as_json()
            return body

        if out.result(as_json):
            return run.DONE
        if args.tree is not None:
            _tree(out, summary.tree(kept), args.tree)
        elif args.param is not None:
            _parameters(out, checkpoint, kept)
        else:
            _overview(out, found)
    return run.DONE


def _overview(out: Output, found: Summary) -> None:
    from ucp.inspection import display
    from ucp.inspection.summary import approximate_text
    from ucp.parallel.mesh import Layout

    out.title(found.path)
    kinds = ", ".join(KINDS.get(kind, (f"{n} {kind}",) * 2)[n != 1].format(n) for kind, n in found.kinds.items())
    states = ", ".join(
        f"{state} ({bytes_text(entry['bytes'])}, {'/'.join(entry['dtypes'])})" for state, entry in found.states.items()
    )
    sizes = [h.bytes for h in found.holders]
    who = display.holder_word(h.name for h in found.holders)
    spread = f"{counted(len(sizes), who)}, {each_text(min(sizes, default=0), max(sizes, default=0))}"
    if len(sizes) == 1:
        spread = f"one {who}, {bytes_text(sizes[0])}"
    training = found.training
    has = [TRAINING[name] for name in ("lr_scheduler", "loss_scaler") if training[name]]
    if training["client_state"]:
        has.append(f"client state ({', '.join(training['client_state'])})")
    has += [TRAINING.get(name, name) for name in training["extra"]]
    out.facts(
        [
            ("format", f"{found.format}, written by {found.writer}"),
            *([("approximate", approximate_text(found.approximate))] if found.approximate else []),
            ("layout", str(Layout(**found.layout))),
            *found.facts.items(),
            ("step", "unknown" if found.step is None else str(found.step)),
            ("parameters", f"{kinds}, {display.count_text(found.elements)} elements"),
            ("states", states),
            ("size", f"{bytes_text(found.bytes)} of tensors, {bytes_text(found.file_bytes)} of files"),
            ("held by", f"{spread}, {counted(found.fragments, 'fragment')}"),
            ("digests", f"in {sum(f.digests for f in found.files)} of {counted(len(found.files), 'file')}"),
            ("param groups", str(len(training["param_groups"]))),
            ("training state", ", ".join(has) or ("none" if found.step is None else "counters only")),
        ]
    )
    rows = [_row(name, p, f"× {n}" if n > 1 else "") for name, p, n in _families(found, out.people)]
    out.table(("parameter", "", "shape", "kind", "states", "size", "cut"), rows, right=(5,))
    out.note(LEGEND)


def _row(name: str, p: ParameterSummary, times: str) -> tuple[str, ...]:
    from ucp.inspection import display

    states = " ".join(f"{state}:{s.dtype}" for state, s in p.states.items())
    return name, times, display.shape_text(p.shape), p.kind, states, bytes_text(p.bytes), p.cut


def _families(found: Summary, grouped: bool) -> Iterator[tuple[str, ParameterSummary, int]]:
    from ucp.inspection.summary import families

    if not grouped:
        yield from ((p.name, p, 1) for p in found.parameters)
        return
    yield from families(found.parameters)


def _tree(out: Output, root: Module, depth: int) -> None:
    from ucp.inspection import display

    rows: list[tuple[str, ...]] = []

    def walk(module: Module, level: int) -> None:
        share = module.bytes / root.bytes if root.bytes else 0.0
        name = "  " * level + (module.name or "(model)")
        rows.append(
            (
                name,
                str(module.parameters),
                display.count_text(module.elements),
                bytes_text(module.bytes),
                f"{share:.1%}",
            )
        )
        if level < depth:
            for child in module.children:
                walk(child, level + 1)

    walk(root, 0)
    out.table(("module", "tensors", "elements", "size", "share"), rows, right=(1, 2, 3, 4))


def _parameters(out: Output, checkpoint: Checkpoint, kept: list[ParameterSummary]) -> None:
    from ucp.inspection import display, summary

    for p in kept:
        if out.people:
            out.title(p.name)
            facts = [("shape", display.shape_text(p.shape)), ("kind", p.kind), ("cut", p.cut)]
            facts += [("also named", ", ".join(p.aliases))] if p.aliases else []
            facts += [(key, display.scalar_text(value)) for key, value in p.scalars.items()]
            out.facts(facts)
        rows = []
        for state, s in p.states.items():
            for place in summary.fragments(checkpoint.catalog, p.name, state):
                spans = ", ".join(f"{o}:{o + n}" for o, n in zip(place.offsets, place.sizes, strict=True))
                holder = f"{place.holder} (copy)" if place.copy else place.holder
                rows.append((p.name, state, s.dtype, f"[{spans}]", holder, str(place.byte), place.file))
        shown = rows[: limits.INSPECT_FRAGMENTS_COUNT] if out.people else rows
        head = ("parameter", "state", "type", "box", "held by", "at byte", "of file")
        out.table(head[out.people :], [row[out.people :] for row in shown], right=(4,))
        if len(shown) < len(rows):
            out.note(f"  and {counted(len(rows) - len(shown), 'more fragment')} (--json lists them)")
