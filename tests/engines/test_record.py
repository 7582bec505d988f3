"""The table of releases is what has run, and nothing is called tested that has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.engines import record, releases
from ucp.deepspeed.supported import TESTED_VERSIONS


def test_the_readme_shows_what_is_recorded() -> None:
    text = record.README.read_text(encoding="utf-8")
    assert record.shown(text, record.load()) == text


def test_every_tested_version_has_run() -> None:
    rows = {row["packages"]["deepspeed"]: row["areas"] for row in record.load()}
    for version in TESTED_VERSIONS:
        assert rows[version]["smoke"]["passed"]
        assert not rows[version]["smoke"]["failed"]


def test_the_oldest_and_the_newest_are_what_the_script_runs() -> None:
    script = (releases.CONSTRAINTS.parent / "test").read_text(encoding="utf-8")
    ordered = sorted(TESTED_VERSIONS, key=lambda v: [int(p) for p in v.split(".")])
    assert f"oldest_deepspeed={ordered[0]}\n" in script
    assert f"newest_deepspeed={ordered[-1]} " in script
    assert releases.pinned("deepspeed") in TESTED_VERSIONS


def test_counts_are_pytests(tmp_path: Path) -> None:
    results = tmp_path / "results.xml"
    results.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.deepspeed.test_smoke"/>'
        '<testcase classname="tests.deepspeed.test_smoke"><failure/></testcase>'
        '<testcase classname="tests.deepspeed.test_smoke"><error/></testcase>'
        '<testcase classname="tests.deepspeed.test_tp.TestX"><skipped/></testcase>'
        '<testcase classname="tests.test_other"/>'
        "</testsuite></testsuites>"
    )
    found = record.counted(results)
    assert found == {"smoke": {"passed": 1, "failed": 2, "skipped": 0}, "TP": {"passed": 0, "failed": 0, "skipped": 1}}
    old = [{"packages": {"deepspeed": "0.16.9", "torch": "2.13.0"}, "areas": {"smoke": {}, "TP": {"passed": 7}}}]
    (row,) = record.add(old, {"deepspeed": "0.16.9", "torch": "2.13.0"}, found)
    assert row["areas"] == found
    assert "| 0.16.9 | 2.13.0 | 1 ✓, 2 failed | 1 – |" in record.table([row])


def test_a_single_test_of_a_module_may_have_a_column_of_its_own() -> None:
    pairs = "tests.deepspeed.test_load_pairs"
    assert record.area_of(f"{pairs}::test_loads_exactly") == "layouts"
    assert record.area_of(f"{pairs}::test_loads_exactly_with_deepspeeds_compiled_optimizers") == "compiled optimizers"
    assert record.area_of("tests.formats.deepspeed.write.test_tp::test_x") == "native files"
    assert record.area_of("tests.deepspeed.test_tp_more::test_x") == ""


def test_nothing_is_excused_on_the_pinned_releases() -> None:
    if releases.is_pinned():
        assert releases.fault(["attempting to reduce an unsupported grad type: torch.float16"]) == ""


def test_what_a_release_fails_at_is_named_below_the_table(tmp_path: Path) -> None:
    parts = []
    for number, fault in enumerate(["has no AutoTP", "has no AutoTP", "has no Muon"]):
        parts.append(tmp_path / f"{number}.xml")
        message = f'<skipped message="DeepSpeed 0.15.4: {fault}"/>'
        parts[-1].write_text(f'<x><testcase classname="tests.deepspeed.test_tp">{message}</testcase></x>')
    assert record.counted(*parts)["TP"] == {"passed": 0, "failed": 0, "skipped": 3}
    found = record.faults(*parts)
    assert found == {"TP": {"has no AutoTP": 2, "has no Muon": 1}}
    packages = {"deepspeed": "0.15.4", "torch": "2.13.0"}
    rows = record.add([], packages, record.counted(*parts), found)
    assert "- 0.15.4 with torch 2.13.0: has no AutoTP (2 –); has no Muon (1 –)\n" in record.table(rows)
    again = record.add(rows, packages, {"TP": {"passed": 3, "failed": 0, "skipped": 0}})
    assert "faults" not in again[0]


def test_a_column_may_run_in_parts(tmp_path: Path) -> None:
    """A part that ran again counts as it ran last; the other parts stay."""
    packages = {"deepspeed": "0.15.4", "torch": "2.13.0"}
    skipped = '<skipped message="DeepSpeed 0.15.4: has no AutoTP"/>'
    runs = [
        [("test_tp", "test_a[1]", ""), ("test_tp", "test_a[2]", "<failure/>"), ("test_tp", "test_b", skipped)],
        [("test_pipe", "test_c", "")],
        [("test_tp", "test_a[1]", ""), ("test_tp", "test_a[2]", "")],
    ]
    rows: list[dict[str, Any]] = [{"packages": packages, "areas": {"PP": {"passed": 9}, "smoke": {"passed": 2}}}]
    for number, cases in enumerate(runs):
        path = tmp_path / f"{number}.xml"
        told = [f'<testcase classname="tests.deepspeed.{m}" name="{n}">{x}</testcase>' for m, n, x in cases]
        path.write_text(f"<x>{''.join(told)}</x>")
        rows = record.record(rows, packages, path)
    (row,) = rows
    assert row["areas"]["TP"] == {"passed": 2, "failed": 0, "skipped": 1}
    assert row["areas"]["PP"] == {"passed": 1, "failed": 0, "skipped": 0}
    assert row["areas"]["smoke"] == {"passed": 2}
    assert row["faults"] == {"TP": {"has no AutoTP": 1}}


def test_a_case_that_ran_again_counts_as_it_ran_last(tmp_path: Path) -> None:
    told = '<x><testcase classname="tests.deepspeed.test_tp" name="test_a[{}]">{}</testcase></x>'
    files = [("1", "<failure/>"), ("2", ""), ("1", "")]
    for number, case in enumerate(files):
        (tmp_path / f"{number}.xml").write_text(told.format(*case))
    found = record.counted(*(tmp_path / f"{number}.xml" for number in range(3)))
    assert found == {"TP": {"passed": 2, "failed": 0, "skipped": 0}}
