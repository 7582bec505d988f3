"""``ucp`` as a user meets it: exit codes, tables for people, lines for pipes, JSON with a named schema."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import ucp
from tests.formats import raw
from tests.slow_cases import slow_but
from ucp.cli import main as command
from ucp.formats.universal import manifest
from ucp.version import version

ROOT = Path(__file__).resolve().parents[2]


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command in this process: (exit code, stdout, stderr)."""
    try:
        code = command.main([str(a) for a in arguments])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def on_a_terminal(*arguments: object) -> str:
    leader, follower = pty.openpty()
    subprocess.run(
        [sys.executable, "-m", "ucp.cli.main", *map(str, arguments)],
        cwd=ROOT,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
        check=False,
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 1 << 16)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    return shown.decode()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return raw.write_consolidated(tmp_path / "run/step7", raw.make(tmp_path / "raw").catalog)


@pytest.mark.parametrize("name", [*command.COMMANDS, "convert", "spec"])
def test_help_has_examples(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = call(capsys, name, "--help")
    assert code == 0
    assert "examples:" in out
    assert f"ucp {name}" in out or f"ucp-{name}" in out


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = "import sys; from ucp.cli.main import parser; parser().format_help(); "
    code += "print({'torch', 'numpy'} & set(sys.modules))"
    best = 9.0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.stdout.strip() == "set()"
    assert best < 0.3  # seconds of processor time


@pytest.mark.parametrize(
    "arguments", slow_but([["verify"]], [["inspect"], ["ls"], ["verify"], ["plan", "--layout", "dp=2,zero=3"]])
)
def test_looking_needs_no_torch(source: Path, arguments: list[str]) -> None:
    code = f"""
import sys
from ucp.cli.main import main
code = main({[arguments[0], str(source), *arguments[1:], "--quiet"]!r})
sys.exit(code or ("torch" in sys.modules) * 9)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "schema"),
    [
        (["inspect"], "ucp.inspect/1"),
        (["inspect", "--tree", "--param", "layer.*"], "ucp.inspect/1"),
        (["ls"], "ucp.ls/1"),
        (["verify", "--finite"], "ucp.verify/1"),
        (["plan", "--layout", "dp=2,zero=3", "--matrix"], "ucp.plan/1"),
    ],
)
def test_json_names_its_schema(
    capsys: pytest.CaptureFixture[str], source: Path, arguments: list[str], schema: str
) -> None:
    _, out, err = call(capsys, arguments[0], source, *arguments[1:], "--json")
    assert err == ""
    assert json.loads(out)["schema"] == schema


def test_inspect_in_a_pipe(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    code, out, err = call(capsys, "inspect", source)
    assert (code, err) == (0, "")
    lines = [line.split("\t") for line in out.splitlines()]
    assert ["layout", "dp=3,zero=1"] in lines
    rows = {line[0]: line for line in lines if len(line) == 7}
    assert set(rows) == {*raw.SHAPES, "frozen.weight", "mask", "steps"}
    assert rows["layer.0.weight"][2:4] == ["5 × 3 × 11", "parameter"]
    assert "\x1b" not in out


def test_inspect_one_parameter(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    code, out, _ = call(capsys, "inspect", source, "--param", "embed.*", "--json")
    assert code == 0
    (entry,) = json.loads(out)["parameters"]
    (place,) = entry["states"]["param"]["places"]
    with open(place["file"], "rb") as stream:
        stream.seek(place["byte"])
        raw_bytes = stream.read(13 * 7 * 4)
    with ucp.open(source) as checkpoint:
        assert checkpoint.read("embed.weight").numpy().tobytes() == raw_bytes
    code, _, err = call(capsys, "inspect", source, "--param", "absent*")
    assert (code, err.count("\n")) == (2, 1)


def test_a_terminal_gets_tables(source: Path) -> None:
    shown = on_a_terminal("inspect", source)
    assert "\x1b[1m" in shown
    assert "parameter" in shown
    lines = [line for line in shown.splitlines() if "float32" in line and "×" in line]
    assert len({line.index("parameter") for line in lines}) == 1  # a column
    assert "whole" in on_a_terminal("verify", source)


def test_verify_says_no(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    assert call(capsys, "verify", source.parent)[0] == 0
    raw.flip(source / "model-00001-of-00001.safetensors", 900, 1)
    code, out, err = call(capsys, "verify", source.parent)
    (line,) = err.splitlines()
    assert (code, line.split(" of ")[0]) == (1, "ucp verify: warning: taking 'step7', the newest checkpoint")
    fault = next(line.split("\t") for line in out.splitlines() if line.startswith("fault\t"))
    assert fault[1:3] == ["digest", str(source / "model-00001-of-00001.safetensors")]
    assert call(capsys, "verify", source, "--quick")[0] == 0
    code, _, err = call(capsys, "verify", source / "nowhere")
    assert (code, err.count("\n")) == (2, 1)
    assert call(capsys, "verify", source, "--quick", "--finite")[0] == 2


def test_diff_says_no(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    same = raw.virtual_checkpoint(tmp_path / "same", raw.make(tmp_path / "raw2", dp=5, stage=3))
    other = raw.virtual_checkpoint(tmp_path / "other", raw.make(tmp_path / "raw3", seed=1))
    code, out, err = call(capsys, "diff", source, same)
    assert (code, err) == (0, "")
    assert out.startswith("the same: 21 tensors compared")
    code, out, _ = call(capsys, "diff", source, other, "--state", "exp_avg")
    assert code == 1
    assert len([line for line in out.splitlines() if line.startswith("values\t")]) == 5
    code, out, _ = call(capsys, "diff", source, other, "--json")
    assert code == 1
    body = json.loads(out)
    assert (body["schema"], body["same"]) == ("ucp.diff/1", False)
    assert call(capsys, "diff", source, other, "--atol", "-1")[0] == 2


def test_diff_takes_a_tag_with_its_path(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    """As merge does, unless there is such a path."""
    run = source.parent
    raw.write_consolidated(run / "other@1", raw.make(tmp_path / "raw2", seed=1).catalog)
    (run / "latest").write_text("other@1")
    assert call(capsys, "diff", f"{run}@{source.name}", source)[0] == 0
    assert call(capsys, "diff", run / "other@1", run)[0] == 0
    assert call(capsys, "diff", f"{run}@{source.name}", run / "other@1", "--tensors-only")[0] == 1
    code, _, err = call(capsys, "diff", f"{run}@x", source, "--tag-a", "y")
    assert (code, err.count("\n")) == (2, 1)
    assert "names a tag, and so does --tag-a y" in err


def test_ls_and_plan(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    (source.parent / "latest").write_text("step7")
    code, out, _ = call(capsys, "ls", source.parent)
    assert code == 0
    fields = out.rstrip("\n").split("\t")
    assert (fields[0], fields[1], fields[-2], fields[-1]) == ("step7", "7", "whole", "latest")
    code, out, _ = call(capsys, "plan", source, "--layout", "dp=3,zero=2", "--rank-bandwidth", "1kB")
    assert code == 0
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[0] for row in rows[-3:]] == ["rank 0", "rank 1", "rank 2"]
    assert any(row[0] == "time" for row in rows)
    code, _, err = call(capsys, "plan", source, "--layout", "dp=3,tp=2")
    assert code == 2
    assert "give a spec" in err


def test_report(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    code, out, err = call(capsys, "report", source, "-o", page, "--plan-layout", "dp=2,zero=3")
    assert (code, err) == (0, "")
    assert out.startswith(f"wrote {page}: 9 parameters")
    assert page.read_text().startswith("<!doctype html>")
    assert call(capsys, "report", source, "-o", tmp_path / "no/such/folder.html")[0] == 2


def test_other_programs_as_commands(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    assert call(capsys, "convert", source, tmp_path / "copy")[0] == 0
    assert (tmp_path / "copy" / manifest.NAME).exists()
    assert call(capsys, "spec", "show")[0] == 0


@pytest.mark.parametrize(
    "arguments", [[], ["frobnicate"], ["inspect"], ["inspect", "a", "--tree", "0"], ["plan", "a"], ["diff", "a"]]
)
def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_a_reader_that_goes_away(source: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m ucp.cli.main inspect {source} --json | head -c 10",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ('{"schema": ', "") or (done.stdout, done.stderr) == ('{"schema":', "")


@pytest.mark.parametrize("program", [[], ["convert"], ["spec"]])
def test_the_version(capsys: pytest.CaptureFixture[str], program: list[str]) -> None:
    code, out, _ = call(capsys, *program, "--version")
    assert (code, out) == (0, f"{'-'.join(['ucp', *program])} {version()}\n")


def test_slips(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    """Each is one line that says what would be right."""
    for arguments, words in (
        (("inspect", source, "--frob"), "ucp inspect: error: unrecognized arguments: --frob (see ucp inspect --help)"),
        (("verify", source.parent, "--tag", "step8"), "no checkpoint with the tag 'step8'; did you mean 'step7'?"),
        (("report", source.parent, "--tag", "step8"), "no checkpoint with the tag 'step8'; did you mean 'step7'?"),
        (("diff", source, source, "--param", "x*"), "no parameter of either checkpoint matches 'x*'; there are 'embed"),
        (("diff", source, source, "--state", "exp"), "neither checkpoint has a state 'exp'; there are 'exp_avg'"),
        (
            ("ls", source / "ucp.json"),
            f"is a single file in the folder of a checkpoint ('universal'); give that folder, '{source}'",
        ),
        (("plan", source, "--layout", "dp=2,pp=2,zero=1"), "is no name of a pipeline's"),
        (("plan", source, "--layout", "dp=2,zero=1", "--ds-config", "no.json"), "no.json: there is no such file"),
    ):
        code, out, err = call(capsys, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert words in err


def test_debug_shows_where(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = call(capsys, "inspect", tmp_path / "nowhere", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert "Traceback" not in call(capsys, "inspect", tmp_path / "nowhere")[2]


@pytest.mark.slow
def test_a_diff_heads_its_columns_with_what_they_hold(source: Path, tmp_path: Path) -> None:
    made = raw.make(tmp_path / "raw2", seed=1)
    state = dataclasses.replace(made.catalog.training_state, global_steps=99)
    other = raw.write_consolidated(tmp_path / "other", dataclasses.replace(made.catalog, training_state=state))
    shown = on_a_terminal("diff", source, other).splitlines()
    heads = [line for line in shown if line.startswith("\x1b[2m  what")]
    assert [("elements" in head, "in A" in head) for head in heads] == [(True, False), (False, True)]
    assert any("max rel: the largest |A - B| / max(|A|, |B|)" in line for line in shown)
    assert any("global_steps" in line and "99" in line for line in shown)


def test_a_plan_says_why_it_has_no_time(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    code, out, _ = call(capsys, "plan", source, "--layout", "dp=2,zero=1")
    assert (code, "time\tnot known: say how fast" in out) == (0, True)
    _, out, _ = call(capsys, "plan", source, "--layout", "dp=2,zero=1", "--storage-bandwidth", "2GB")
    assert "time\tless than 0.1 s, limited by the storage's bandwidth" in out


def test_inspect_speaks_of_ranks_and_explains_its_table(source: Path) -> None:
    shown = on_a_terminal("inspect", source)
    assert re.search(r"parameters\s*\S*\s+\d+ trained, ", shown)
    assert "param: the weight in the highest precision there is" in shown
    assert "loss_scaler" not in shown
    assert " of 1 files" not in shown


@pytest.mark.parametrize(("said", "meant"), [("hf", "huggingface"), ("HF", "huggingface"), ("deepsped", "deepspeed")])
def test_a_target_by_another_name_is_told_its_own(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, said: str, meant: str
) -> None:
    code, _, err = call(capsys, "convert", source, tmp_path / "out", "--to", said)
    assert (code, f"unknown target format '{said}'; did you mean '{meant}'?" in err) == (2, True)


def test_what_a_conversion_counts_is_what_it_wrote(tmp_path: Path, source: Path) -> None:
    report = ucp.convert(source, tmp_path / "model", "huggingface")
    with ucp.open(tmp_path / "model") as opened:
        assert (report.tensors, report.parameters) == (len(opened.catalog.tensors), len(opened.parameters))
    counts = f"{report.tensors} tensors of {report.parameters} parameters, 1 file, "
    assert f"wrote {tmp_path / 'model'}: {counts}" in str(report)
