"""No text out of a checkpoint reaches a terminal, a log, an error or a page with its control characters."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ucp
from tests.formats import raw
from ucp import printable
from ucp.catalog import ParamGroup, TrainingState
from ucp.cli.main import main
from ucp.errors import NotACheckpoint, UcpError

CLEAR = "\x1b[2J\x1b]0;title\x07"
HOSTILE = f"w{CLEAR}\x7f\x9b31m\u202egnp\u2066.x\r\nfake\tline\u2028\u0085"
# What may stand in the output of a program in a pipe: columns are parted by tabs, entries by line ends.
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é ∂ 漢 \u00a0", "plain é ∂ 漢 \u00a0"),
        ("\x1b[2J", r"\033[2J"),
        ("a\nb\tc\rd\x07\x08\x0b\x0c", r"a\nb\tc\rd\a\b\v\f"),
        ("\x00\x7f", r"\000\177"),
        ("\x9b", r"\302\233"),
        ("\u202e\u2066", r"\342\200\256\342\201\246"),
        ("\udcff", r"\377"),
        ("\ud800", r"\355\240\200"),
        ("C:\\new", "C:\\new"),
    ],
)
def test_as_ls_shows_it(text: str, shown: str) -> None:
    assert printable.line(text) == shown
    assert printable.line(shown) == shown


@pytest.mark.skipif(shutil.which("ls") is None, reason="needs ls")
def test_ls_agrees(tmp_path: Path) -> None:
    for code in (*range(1, 32), 127):
        (tmp_path / f"x{chr(code)}y").touch()
    there = subprocess.run(["ls", "-b", "-U", tmp_path], capture_output=True, check=True, env={"LC_ALL": "C"})
    assert set(there.stdout.decode().splitlines()) == {printable.line(f"x{chr(c)}y") for c in (*range(1, 32), 127)}


def test_all_that_is_escaped_is_all_there_is() -> None:
    everything = "".join(map(chr, range(0x3000)))
    assert not FORBIDDEN.search(printable.line(everything))
    assert "\n" not in printable.line(everything)
    assert printable.lines("a\nb\x1b\n") == "a\nb\\033\n"


def test_errors_are_one_line() -> None:
    error = NotACheckpoint(f"{HOSTILE}: is none")
    assert not FORBIDDEN.search(str(error))
    assert "\n" not in str(error)
    assert str(UcpError(str(error))) == str(error)


def test_json_keeps_the_text_and_shows_no_control() -> None:
    said = printable.dumps({HOSTILE: [HOSTILE]})
    assert said.isascii()
    assert said.isprintable()
    assert json.loads(said) == {HOSTILE: [HOSTILE]}


def test_log_records_are_lines_whoever_handles_them() -> None:
    """A program's own handler, not ours: the escapes are made before any handler sees the record."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log = printable.logger("ucp.test")
    log.addHandler(handler)
    try:
        log.warning("100%% of '%s' and %d%%", HOSTILE, 5)
        log.warning("no arguments: 100% \x1b")
    finally:
        log.removeHandler(handler)
    first, second, rest = stream.getvalue().split("\n")
    assert (second, rest) == (r"no arguments: 100% \033", "")
    assert first.startswith("100% of 'w\\033[2J")
    assert first.endswith("and 5%")
    assert not FORBIDDEN.search(first)


def test_every_module_logs_like_that() -> None:
    package = Path(ucp.__file__).parent
    wrong = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"^\w+ = logging\.getLogger", path.read_text(), re.MULTILINE)
    ]
    assert wrong == []


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two checkpoints with hostile names everywhere; `latest` names one that is not there."""
    folder = tmp_path_factory.mktemp("hostile") / f"run{CLEAR}\n"
    groups = (ParamGroup((HOSTILE,), {f"lr{HOSTILE}": 0.1}),)
    state = TrainingState(groups, global_steps=7, client_state={HOSTILE: HOSTILE}, extra={HOSTILE: 1})
    for seed, tag in enumerate((f"step1{HOSTILE}".replace("/", ""), "step2")):
        made = raw.make(
            folder / f".{seed}", shapes={HOSTILE: (3, 2)}, states=("param", f"s{HOSTILE}"), training_state=state,
            seed=seed, aliases={HOSTILE: (f"tied{HOSTILE}",)},
        )  # fmt: skip
        raw.write_consolidated(folder / tag, made.catalog)
    (folder / "latest").write_text(f"gone{HOSTILE}")
    (folder / f".ucp-part-{HOSTILE}").mkdir()
    return folder


COMMANDS = {
    "ls": ["ls", "{0}"],
    "inspect": ["inspect", "{0}"],
    "inspect a tag": ["inspect", "{0}", "--tag", f"step1{HOSTILE}"],
    "verify": ["verify", "{0}"],
    "diff": ["diff", "{1}", "{2}"],
    "plan": ["plan", "{0}", "--layout", "dp=2,zero=1"],
    "no tag": ["inspect", "{0}", "--tag", f"none{HOSTILE}"],
    "no folder": ["inspect", "{0}/none"],
    "no command": ["inspect", "{0}", f"--{HOSTILE}"],
    "convert": ["convert", "{2}", "{3}/out\n"],
    "convert elsewhere": ["convert", "{2}", "{3}/ds", "--to", "deepspeed-universal"],
    "report": ["report", "{0}", "-o", "{3}/page\x1b.html"],
}


@pytest.mark.parametrize("form", ["pipe", "terminal", "json"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_show_no_control_character(
    hostile: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    form: str,
) -> None:
    places = (str(hostile), str(hostile / f"step1{HOSTILE}"), str(hostile / "step2"), str(tmp_path))
    arguments = [part.format(*places) if part.startswith("{") else part for part in COMMANDS[command]]
    if form == "terminal":
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("NO_COLOR", "1")
    if form == "json":
        arguments.append("--json")
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code in (0, 1, 2)
    out, err = capsys.readouterr()
    assert out or err
    for text in (out, err):
        assert not FORBIDDEN.search(text), FORBIDDEN.search(text)
        assert not re.search(r"^(fake|\s*line)", text, re.MULTILINE)
    if form == "json" and out:
        json.loads(out)
    else:
        assert "fake\tline" not in out
    if command == "report" and code == 0:
        page = (tmp_path / "page\x1b.html").read_text()
        assert not FORBIDDEN.search(page)
