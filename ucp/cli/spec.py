"""``ucp-spec``: check a spec, alone or against a model's config or a checkpoint; draft one; show the catalogue.

Also ``python -m ucp.cli.spec``. Nothing heavy is imported before the arguments are known to be right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ucp import printable
from ucp.cli import run, source
from ucp.errors import BadArgument
from ucp.storage import configs
from ucp.units import counted

if TYPE_CHECKING:
    from ucp.inspection.shards import ShardReport, Shards
    from ucp.inspection.trial import Trial
    from ucp.spec.bound import Bound
    from ucp.spec.language import Line, Spec

PROGRAM = "ucp-spec"
log = printable.logger(PROGRAM)

_EPILOG = """\
examples:
  ucp-spec show                                       the specs that come with the package
  ucp-spec show llama                                 one of them, line by line, in the words of the paper
  ucp-spec check my.yaml                              its syntax
  ucp-spec check my.yaml --config model/config.json   every size and shape for this model
  ucp-spec check llama global_step100                 every parameter of a checkpoint; its ranks' shards merged and
                                                      cut again; what is taken on trust
  ucp-spec check llama global_step100 --model autotp  the merged model run beside the sharded one
  ucp-spec infer global_step100 > my.yaml             a draft: what the checkpoint tells, the rest marked as unknown

exit codes: 0 done, 2 the spec, the input or the arguments are at fault (stderr says how), 3 an internal error
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = run.Parser(
        prog=PROGRAM,
        description="Check and show specs: how a model family's parameters may be cut over ranks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--version", action=run.Version)
    commands = p.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=run.Parser)
    check = commands.add_parser("check", help="check a spec: its syntax, its sizes, and a checkpoint's parameters")
    check.add_argument("spec", metavar="SPEC", help="a spec's file, or the name of one in the catalogue")
    check.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="a checkpoint whose parameters to check")
    check.add_argument("--config", metavar="FILE", help="the model's config.json (default: the one in CHECKPOINT)")
    run.add_sizes(check)
    check.add_argument(
        "--model",
        metavar="FACTORY",
        help="run the merged and the sharded model and compare their logits: 'autotp' for transformers' models, or "
        "MODULE:FUNCTION, called with (tp ranks, this rank) for a module from tokens to logits",
    )
    check.add_argument("--section", metavar="NAME", help="the section under layouts: that counts, such as autotp")
    source.add_tag(check)
    infer = commands.add_parser("infer", help="draft a spec from what a checkpoint tells of itself")
    infer.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a folder of them")
    source.add_tag(infer)
    show = commands.add_parser("show", help="list the catalogue, or show one spec line by line")
    show.add_argument("spec", metavar="NAME", nargs="?", help="a name in the catalogue, or a spec's file")
    for command in (check, infer, show):
        command.add_argument(
            "--json", action="store_true", help="print the result as JSON (its 'schema' names the version)"
        )
        command.add_argument("--quiet", action="store_true", help="no result, no warnings")
        command.add_argument("--debug", action="store_true", help="log what happens, with tracebacks")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parser().parse_args(arguments)
    run.start_logging(PROGRAM, args.quiet, args.debug)
    return run.guarded(PROGRAM, lambda: _command(args), args.debug)


def _command(args: argparse.Namespace) -> int:
    from ucp.errors import SpecError

    try:
        return {"check": _check, "infer": _infer, "show": _show}[args.command](args)
    except SpecError as error:
        return _refused([error])


def _refused(errors: Sequence[Any]) -> int:
    """Print each refusal as one line, with the text that it is about and a mark below it."""
    for error in errors[:20]:
        run.say(f"{PROGRAM}: error: {error}")
        if error.picture:
            sys.stderr.write(printable.lines(error.picture) + "\n")
    if len(errors) > 20:
        run.say(f"{PROGRAM}: error: and {len(errors) - 20} more of these")
    return run.AT_FAULT


def _print(args: argparse.Namespace, result: Mapping[str, Any], lines: Sequence[str]) -> None:
    if args.json:
        sys.stdout.write(printable.dumps({"schema": f"ucp.spec-{args.command}/1", **result}) + "\n")
    elif not args.quiet:
        sys.stdout.write("".join(f"{printable.line(line)}\n" for line in lines))


def _check(args: argparse.Namespace) -> int:
    from ucp.spec import shipped
    from ucp.spec.bound import bind

    spec = shipped.find(args.spec)
    _unused_sizes(spec)
    settings = run.sizes(args.set)
    if args.section is not None and args.section not in spec.layouts:
        known = ", ".join(spec.layouts) or "none"
        raise BadArgument(f"--section {args.section}: {spec.file} has no such section under layouts: (it has {known})")
    config: Mapping[str, Any] | None = configs.read(args.config, BadArgument) if args.config else None
    if args.checkpoint is None:
        if config is None and not settings:
            return _syntax(args, spec)
        return _sizes(args, bind(spec, config, settings, args.section))
    from ucp.inspection.shards import check_spec, open_shards

    with open_shards(args.checkpoint, args.tag) as shards:
        if config is None:
            config = configs.of_model(shards.path) or shards.config
        if config is None and not settings and any(formula.references() for formula in spec.sizes.values()):
            raise BadArgument(f"{shards.path} has no config.json; give the model's with --config, or sizes with --set")
        bound = bind(spec, config, settings, args.section)
        checked = check_spec(bound, shards)
        if checked.report.problems:
            return _refused(checked.report.problems)
        tried = _tried(bound, shards, args.model, config) if args.model else None
    _report(args, bound, checked, tried)
    return run.DONE


def _tried(bound: Bound, shards: Shards, factory: str, config: Mapping[str, Any] | None) -> Trial:
    """Run both models. Raises Mismatch if the merged one computes something else than the sharded one."""
    from ucp.errors import Mismatch
    from ucp.inspection.trial import try_model

    trial = try_model(bound, shards, factory, config)
    if not trial.agrees:
        raise Mismatch(
            f"{bound.spec.file}: the model merged by it computes other logits than its shards do: they differ by up to "
            f"{trial.difference:.3g}, where the largest is {trial.scale:.3g}; something that it says and shapes can't "
            "show is wrong (check without --model lists what is taken on trust)"
        )
    return trial


def _infer(args: argparse.Namespace) -> int:
    from ucp.inspection.shards import draft_spec, open_shards
    from ucp.spec.language import loads

    with open_shards(args.checkpoint, args.tag) as shards:
        text = draft_spec(shards)
    unknown = {str(line.pattern): line.why for line in loads(text, "the draft").unknown}
    _print(args, {"spec": text, "unknown": unknown}, text.splitlines())
    if unknown:
        log.warning(
            f"{counted(len(unknown), 'line is', 'lines are')} marked unknown; "
            "the spec can't be used before all of them are written"
        )
    return run.DONE


def _unused_sizes(spec: Spec) -> None:
    from ucp.spec.language import unused_sizes

    for name in unused_sizes(spec):
        log.warning(f"{spec.sizes[name].source.position}: nothing uses the size '{name}'")


def _syntax(args: argparse.Namespace, spec: Spec) -> int:
    result = {"spec": spec.file, "models": spec.models, "lines": len(spec.lines), "sizes": list(spec.sizes)}
    text = f"{spec.file}: well formed ({counted(len(spec.lines), 'line')}, {counted(len(spec.sizes), 'size')}); "
    lines = [text + "give --config or a checkpoint to check what they say"]
    lines += [f"marked unknown: {line.pattern} ({line.why})" for line in spec.unknown]
    _print(args, result, lines)
    return run.DONE


def _sizes(args: argparse.Namespace, bound: Bound) -> int:
    """Print every size, and the shape of every line. A missing size is refused if a line can't do without it."""
    from ucp.spec.evaluate import shape_of
    from ucp.spec.grammar import names

    needed = {
        axis.name
        for line in bound.lines
        if not line.optional
        for axis in names(line.expression)
        if axis.name in bound.absent
    }
    if needed:
        return _refused([bound.absent[name] for name in bound.absent if name in needed])
    rows: list[tuple[str, ...]] = []
    shapes = {}
    for line in bound.lines:
        if any(axis.name in bound.absent for axis in names(line.expression)):
            continue
        shape = shape_of(line.expression, bound.sizes)
        shapes[str(line.pattern)] = list(shape)
        rows.append((f"  {line.pattern}", str(list(shape)), str(line.expression)))
    sizes = [f"{name}={n}" for name, n in bound.sizes.items()]
    sizes += [f"{name}: none" for name in bound.absent]
    _print(
        args, {"spec": bound.spec.file, "sizes": dict(bound.sizes), "shapes": shapes}, [", ".join(sizes), *_table(rows)]
    )
    return run.DONE


def _report(args: argparse.Namespace, bound: Bound, checked: ShardReport, trial: Trial | None) -> None:
    report = checked.report
    groups: dict[str, list[Any]] = {}
    for one in report.checked:
        groups.setdefault(str(one.found.pattern) if one.found else "(buffers without a line)", []).append(one)
    rows: list[tuple[str, ...]] = []
    for pattern, members in groups.items():
        shapes = {str(list(one.shape)) for one in members}
        shape = shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes"
        rows.append((f"  {pattern}", f"{len(members)} ×", shape, members[0].words))
    lines = [f"{counted(len(report.checked), 'name matches', 'names match')} {bound.spec.file}:", *_table(rows)]
    if checked.merged:
        lines.append(
            f"the shards of {checked.merged} parameters merge, and cut again are what they were; "
            f"{checked.copies} of them are held by several ranks, in equal copies"
        )
    lines += [f"padding: {name} is {bound.sizes[name]}, kept as {n}" for name, n in report.padding.items()]
    if report.absent:
        lines.append(f"not in this checkpoint: {', '.join(report.absent)}")
    if trial is not None:
        lines.append(
            f"the merged model computes what its shards do: logits differ by {trial.difference:.2g} at most, where the "
            f"largest is {trial.scale:.3g}"
        )
    elif report.trust:
        lines.append("taken on trust from the spec, since neither shapes nor copies can show it:")
        for statement, names in report.trust.items():
            first, *others = names
            lines.append(f"  {statement} ({first}{f' and {len(others)} more' if others else ''})")
    result = {
        "spec": bound.spec.file,
        "sizes": dict(bound.sizes),
        "parameters": {
            one.name: {
                "shape": list(one.shape),
                "line": str(one.found.pattern) if one.found else None,
                "axes": str(one.found.expression) if one.found else None,
                "pattern": one.words,
            }
            for one in report.checked
        },
        "padding": dict(report.padding),
        "absent": list(report.absent),
        "merged": checked.merged,
        "copies": checked.copies,
        "trust": {statement: list(names) for statement, names in report.trust.items()},
        "trial": None if trial is None else {"difference": trial.difference, "scale": trial.scale},
    }
    _print(args, result, lines)


def _show(args: argparse.Namespace) -> int:
    from ucp.spec import shipped

    if args.spec is None:
        specs = [(name, shipped.find(name)) for name in shipped.names()]
        result = [{"name": name, "models": spec.models, "about": spec.about, "file": spec.file} for name, spec in specs]
        _print(
            args,
            {"schema": "ucp.spec-list/1", "specs": result},
            _table([(name, ", ".join(spec.models), spec.about) for name, spec in specs]),
        )
        return run.DONE
    spec = shipped.find(args.spec)
    lines = [f"{spec.file}: {', '.join(spec.models)}"]
    lines += [spec.about] if spec.about else []
    lines += ["sizes:", *_table([(f"  {name}", formula.source.text) for name, formula in spec.sizes.items()])]
    lines += ["parameters:", *_lines(spec.lines)]
    for name, more in spec.layouts.items():
        lines += [f"under {name}:", *_lines(more)]
    lines += ["tied:"] if spec.ties else []
    lines += [
        f"  {tie.pattern} to {tie.to}" + (f", when {tie.when.source.text}" if tie.when else "") for tie in spec.ties
    ]
    lines += [f"names of {name}: {len(maps)}" for name, maps in spec.names.items()]
    _print(args, _as_json(spec), lines)
    return run.DONE


def _lines(lines: Sequence[Line]) -> list[str]:
    from ucp.spec.check import words

    rows = []
    for line in lines:
        when = f"when {line.when.source.text}" if line.when else "optional" if line.optional else ""
        rows.append((f"  {line.pattern}", str(line.expression), words(line.pattern, line.expression), when))
        if line.otherwise:
            rows.append(("", str(line.otherwise), words(line.pattern, line.otherwise), "else"))
    return _table(rows)


def _as_json(spec: Spec) -> dict[str, Any]:
    from ucp.spec.check import words

    return {
        "file": spec.file,
        "models": spec.models,
        "about": spec.about,
        "sizes": {name: formula.source.text for name, formula in spec.sizes.items()},
        "parameters": {
            str(line.pattern): {
                "axes": str(line.expression),
                "pattern": words(line.pattern, line.expression),
                "when": line.when.source.text if line.when else None,
                "else": str(line.otherwise) if line.otherwise else None,
                "optional": line.optional,
            }
            for line in spec.lines
        },
        "tied": {str(tie.pattern): str(tie.to) for tie in spec.ties},
        "layouts": list(spec.layouts),
        "names": list(spec.names),
    }


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The rows with their columns aligned. The last column is not padded."""
    if not rows:
        return []
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]) - 1)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows]


if __name__ == "__main__":
    sys.exit(main())
