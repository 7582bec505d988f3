"""The table of what has run with which releases: kept in ``tests/releases.json``, shown in ``tests/README.md``.

``python -m tests.engines.record RESULTS.xml ...`` (pytest's junit files, of the parts of one run) adds the run that
wrote them and shows the table anew; `./scripts/test --deepspeed … --record` does that. Runs with the same packages are
one row: what ran last of a test function counts, so that a long column may run in parts. What a release fails at by
itself (`tests.engines.releases.FAULTS`) is listed below it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree

from tests.engines.releases import PACKAGES, installed

TESTS = Path(__file__).resolve().parents[1]
RECORD = TESTS / "releases.json"
README = TESTS / "README.md"
BEGIN, END = "<!-- releases: written by tests/engines/record.py -->\n", "<!-- end of releases -->\n"

# The table's columns, and the test modules in each, or single tests of a module; the first that fits counts.
AREAS: Mapping[str, tuple[str, ...]] = {
    "smoke": ("tests.deepspeed.test_smoke",),
    "other releases' files": ("tests.deepspeed.test_older",),
    "TP, PP, SP among each other": ("tests.deepspeed.test_every_layout",),
    "compiled optimizers": (
        "tests.deepspeed.test_compiled",
        "tests.deepspeed.test_load_pairs::test_loads_exactly_with_deepspeeds_compiled_optimizers",
    ),
    "layouts": ("tests.deepspeed.test_load_pairs", "tests.formats.deepspeed.read.test_matrix"),
    "saves": ("tests.deepspeed.test_save", "tests.deepspeed.test_bytes", "tests.deepspeed.test_plugin"),
    "refusals": ("tests.deepspeed.test_refusals", "tests.deepspeed.test_releases"),
    "TP": ("tests.deepspeed.test_tp", "tests.formats.deepspeed.read.test_tp"),
    "PP": ("tests.deepspeed.test_pipe", "tests.formats.deepspeed.read.test_pipe"),
    "experts": ("tests.deepspeed.test_moe_load", "tests.deepspeed.test_moe_auto"),
    "all else": tuple(
        f"tests.deepspeed.test_{name}"
        for name in (
            *("apart", "changed_parallel", "changes", "digests", "factored", "load_memory", "many_optimizers"),
            *("moe_pipe", "moe_refusals", "order", "override", "partial", "partly", "proof", "samples"),
            *("save_deaths", "save_remote", "zeropp"),
        )
    ),
    "what steps are made with": ("tests.deepspeed.test_gradients",),
    "native files": ("tests.formats.deepspeed.write",),
    "programs": ("tests.deepspeed.test_trainer",),
    "FSDP2, DCP": ("tests.torchdist", "tests.formats.dcp"),
}


def area_of(test: str) -> str:
    """The column that a test, "module::function", belongs to; '' for none."""
    for area, parts in AREAS.items():
        if any(test == part or test.startswith((f"{part}.", f"{part}::")) for part in parts):
            return area
    return ""


def _cases(results: Iterable[Path]) -> Iterator[ElementTree.Element]:
    """The cases of these files, in this order; one that a later file has again counts as it ran there."""
    last: dict[Any, ElementTree.Element] = {}
    for path in results:
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            last[(case.get("classname"), case.get("name")) if case.get("name") else len(last)] = case
    yield from last.values()


def by_test(*results: Path) -> dict[str, dict[str, int]]:
    """Of each test that has a column, by "module::function": how many of its cases passed, failed and skipped, and of
    the skipped how many for each fault of the release, by its meaning."""
    out: dict[str, dict[str, int]] = {}
    for case in _cases(results):
        test = f"{case.get('classname', '')}::{case.get('name', '').partition('[')[0]}"
        if area_of(test):
            found = out.setdefault(test, {})
            for kind in (_outcome(case), _fault(case)):
                if kind:
                    found[kind] = found.get(kind, 0) + 1
    return out


def in_areas(tests: Mapping[str, Mapping[str, int]]) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """What `by_test` counted, by area: outcomes, and the release's faults."""
    areas: dict[str, dict[str, int]] = {}
    known: dict[str, dict[str, int]] = {}
    for test, kinds in tests.items():
        area = area_of(test)
        outcomes = areas.setdefault(area, {"passed": 0, "failed": 0, "skipped": 0})
        for kind, count in kinds.items():
            into = outcomes if kind in outcomes else known.setdefault(area, {})
            into[kind] = into.get(kind, 0) + count
    return areas, known


def _outcome(case: ElementTree.Element) -> str:
    bad = case.find("failure") is not None or case.find("error") is not None
    return "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"


def _fault(case: ElementTree.Element) -> str:
    """What the release fails at by itself, because of which this test was skipped."""
    skipped = case.find("skipped")
    message = "" if skipped is None else skipped.get("message", "")
    return message.partition(": ")[2] if message.startswith("DeepSpeed ") else ""


def counted(*results: Path) -> dict[str, dict[str, int]]:
    """Area -> how many tests passed, failed and skipped."""
    return in_areas(by_test(*results))[0]


def faults(*results: Path) -> dict[str, dict[str, int]]:
    """Area -> what the release fails at by itself -> how many tests that kept from running."""
    return in_areas(by_test(*results))[1]


def add(
    rows: list[dict[str, Any]],
    packages: Mapping[str, str],
    areas: Mapping[str, Any],
    found: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
    tests: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """The rows with this run in them. found: `faults` of the run; tests: `by_test` of all that the row counts so."""
    own = next((row for row in rows if row["packages"] == dict(packages)), None)
    others = [row for row in rows if row is not own]
    merged: dict[str, Any] = {"packages": dict(packages), "areas": {**(own["areas"] if own else {}), **areas}}
    kept = {area: known for area, known in (own or {}).get("faults", {}).items() if area not in areas}
    if said := {**kept, **found}:
        merged["faults"] = said
    if tests:
        merged["tests"] = dict(tests)
    return sorted([*others, merged], key=_order)


def _order(row: Mapping[str, Any]) -> list[list[int]]:
    return [[int(p) for p in row["packages"].get(n, "0").split(".") if p.isdigit()] for n in PACKAGES]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    columns = [area for area in AREAS if any(area in row["areas"] for row in rows)]
    usual = {n: _most(row["packages"].get(n, "") for row in rows) for n in PACKAGES[2:]}
    lines = [f"| DeepSpeed | torch | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 2)}"]
    for row in rows:
        packages = row["packages"]
        others = [f"{n} {packages.get(n, 'absent')}" for n in PACKAGES[2:] if packages.get(n, "") != usual[n]]
        others = ["without those below"] if others and not any(n in packages for n in PACKAGES[2:]) else others
        name = ", ".join([packages["deepspeed"], *others])
        lines.append(f"| {name} | {packages['torch']} | {' | '.join(_cell(row['areas'].get(c)) for c in columns)} |")
    rest = ", ".join(f"{n} {v}" for n, v in usual.items() if v)
    lines += ["", f"With {rest}, unless a row says otherwise.", ""]
    for row in rows:
        told: dict[str, int] = {}
        for known in row.get("faults", {}).values():
            for meaning, count in known.items():
                told[meaning] = told.get(meaning, 0) + count
        if told:
            parts = "; ".join(f"{meaning} ({count} –)" for meaning, count in told.items())
            lines.append(f"- {row['packages']['deepspeed']} with torch {row['packages']['torch']}: {parts}")
    return "\n".join([*lines, ""] if lines[-1] else lines)


def _most(values: Any) -> str:
    found = list(values)
    return max(set(found), key=lambda v: (found.count(v), v)) if found else ""


def _cell(area: Mapping[str, int] | None) -> str:
    if area is None:
        return ""
    parts = [f"{area['passed']} ✓"] if area["passed"] else []
    parts += [f"{area['failed']} failed"] if area["failed"] else []
    parts += [f"{area['skipped']} –"] if area["skipped"] else []
    return ", ".join(parts)


def shown(text: str, rows: list[dict[str, Any]]) -> str:
    """The README's text with this table in it."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


def load() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else []
    return rows


def of_these(rows: list[dict[str, Any]], packages: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """`by_test` of what the row of these packages has counted by test so far."""
    own = next((row for row in rows if row["packages"] == dict(packages)), {})
    return dict(own.get("tests", {}))


def record(rows: list[dict[str, Any]], packages: Mapping[str, str], *results: Path) -> list[dict[str, Any]]:
    """The rows with what these results say in them."""
    tests = dict(sorted({**of_these(rows, packages), **by_test(*results)}.items()))
    return add(rows, packages, *in_areas(tests), tests)


def main(*results: Path) -> None:
    found = {name: installed(name) for name in PACKAGES}
    rows = record(load(), {n: v for n, v in found.items() if v}, *results)
    RECORD.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    README.write_text(shown(README.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
