"""``ucp-convert`` as a user meets it: exit codes, one line on stderr, results on stdout."""

from __future__ import annotations

import json
import os
import pickle
import pty
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import ucp
from tests.formats import raw
from ucp import limits
from ucp.cli import convert as command
from ucp.cli import run
from ucp.formats.universal import manifest
from ucp.storage.digests import CHUNK

if TYPE_CHECKING:
    from tests.engines.sources import Sources

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ucp.cli.convert", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        **more,
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command in this process; it must exit with 2, one line on stderr and nothing on stdout."""
    try:
        code = command.main([str(a) for a in arguments])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("ucp-convert: error: ")
    return err


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return raw.virtual_checkpoint(tmp_path / "source", raw.make(tmp_path / "raw"))


@pytest.mark.slow
def test_processes_of_its_own_write_and_count_what_one_does(tmp_path: Path) -> None:
    made = raw.make(tmp_path / "raw", shapes={"w": (6000, 1000), "b": (3,)}, states=("param", "exp_avg"), dp=3)
    ucp.convert(raw.virtual_checkpoint(tmp_path / "source", made), tmp_path / "universal")
    config = tmp_path / "ds_config.json"
    config.write_text(json.dumps({"optimizer": {"type": "Adam"}}))
    native = ("--to", "deepspeed", "--layout", "dp=2,zero=1", "--ds-config", config)
    reports, read = [], []
    for count in (1, 3):
        done = call(tmp_path / "universal", tmp_path / f"{count}", "--json", "--processes", count, *native)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout))
        del reports[-1]["destination"], reports[-1]["seconds"]
        read.append(reports[-1].pop("bytes_read"))
        assert reports[-1].pop("verified_bytes") == read[-1]
    assert reports[0] == reports[1]
    # A chunk that two windows share is read once where one thread fills both, else twice.
    shared = len(raw.tree(tmp_path / "1")) + reports[0]["bytes_written"] // limits.CONVERT_WINDOW_BYTES
    assert abs(read[0] - read[1]) <= shared * CHUNK
    assert min(read) >= sum(array.nbytes for array in made.truth.values()) > 2 * shared * CHUNK
    assert raw.tree(tmp_path / "1") == raw.tree(tmp_path / "3")
    refused = call(tmp_path / "nothing", tmp_path / "4", "--processes", 3)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_a_conversion(source: Path, tmp_path: Path) -> None:
    done = call(source, tmp_path / "dest")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"wrote \S+/dest: 21 tensors of 9 parameters, .* to universal in \d+\.\d s\n", done.stdout)
    with ucp.open(tmp_path / "dest") as checkpoint:
        assert checkpoint.verify() > 0


def test_the_result_as_json(source: Path, tmp_path: Path) -> None:
    done = call(source, tmp_path / "dest", "--json", "--virtual", "--digests", "--workers", 2, "--max-memory", "64MiB")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["destination"] == str(tmp_path / "dest")
    assert (found["virtual"], found["tensors"], found["files"]) == (True, 21, 1)


def test_quiet_says_nothing(source: Path, tmp_path: Path) -> None:
    done = call(source, tmp_path / "dest", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "dest" / manifest.NAME).exists()


def test_a_dry_run(source: Path, tmp_path: Path) -> None:
    done = call(source, tmp_path / "dest", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"would write {tmp_path / 'dest'}: ")
    assert not (tmp_path / "dest").exists()


def test_warnings_go_to_stderr(source: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    source.rename(tmp_path / "run/step1")
    (tmp_path / "raw").rename(tmp_path / "run/raw")
    done = call(tmp_path / "run", tmp_path / "dest")
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("ucp-convert: warning: taking 'step1', the newest checkpoint")


def test_help_is_quick_and_complete() -> None:
    best = 9.0
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = call("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == 0
    flags = {action.option_strings[0] for action in command.parser()._actions if action.option_strings}
    assert {"--to", "--layout", "--virtual", "--digests", "--workers", "--max-memory", "--dry-run", "--json"} < flags
    for flag in [*flags, "exit codes"]:
        assert flag in done.stdout
    assert best < 0.3  # seconds of processor time, of which a busy machine does not take more


def test_the_entry_point_is_the_command() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'ucp-convert = "universal_checkpoint.cli.convert:main"' in text
    assert callable(command.main)


# Progress is shown from the second second on.
AT_ONCE = "from ucp import limits; limits.PROGRESS_PATIENCE_SECONDS = 0; from ucp.cli.convert import main; main()"


def test_progress_on_a_terminal_only(source: Path, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE, source, tmp_path / "dest"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=follower,
        check=True,
    )
    os.close(follower)
    shown = os.read(leader, 10_000).decode()
    os.close(leader)
    assert "100%" in shown
    assert "GB/s" in shown or "MB/s" in shown
    assert shown.endswith("\n")
    assert done.stdout.startswith(b"wrote ")


# --- what is refused: exit code 2, one line, destination untouched ---------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: SOURCE, DEST"),
        (["a"], "the following arguments are required: DEST"),
        (["a", "b", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["a", "b", "--workers", "0"], "argument --workers: '0' is not a whole number of at least 1"),
        (["a", "b", "--workers", "²"], "is not a whole number"),
        (["a", "b", "--max-memory", "2 parsecs"], "argument --max-memory: '2 parsecs' is no size"),
        (["a", "b", "--layout", "dp=x"], "layout 'dp=x': 'dp' needs a whole number"),
        (["a", "b", "--to", "zip"], "unknown target format 'zip'"),
        (["a", "b", "--to", "megatron"], "converting to 'megatron' needs a layout to write for"),
        (["nowhere/at/all", "b"], "nowhere/at/all: there is no such file or folder"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in refused(capsys, *arguments)


def test_sizes() -> None:
    sizes = {"2GiB": 2 << 30, "500MB": 500_000_000, "1.5k": 1500, "7": 7, "1 MiB": 1 << 20, "3TiB": 3 << 40, "12b": 12}
    for text, expected in sizes.items():
        assert run.size(text) == expected


def test_nothing_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty: no checkpoint was recognised here" in refused(capsys, tmp_path / "empty", tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_an_unknown_manifest_version(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    path = source / manifest.NAME
    path.write_bytes(path.read_bytes().replace(b'"ucp":"1.1"', b'"ucp":"2.0"'))
    assert "manifest version '2.0' is not supported" in refused(capsys, source, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_a_manifest_that_points_outside(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    ucp.convert(source, tmp_path / "whole")
    path = tmp_path / "whole" / manifest.NAME
    body = json.loads(path.read_bytes())
    del body["digest"]
    body["files"]["path"][0] = "../raw/rank0.bin"
    path.write_bytes(manifest.frame(body))
    line = refused(capsys, tmp_path / "whole", tmp_path / "dest")
    assert "points at '../raw/rank0.bin', outside its own folder" in line


def test_a_digest_that_does_not_match(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    ucp.convert(source, tmp_path / "whole")
    raw.flip(tmp_path / "whole/model-00001-of-00001.safetensors", 900, 1)
    line = refused(capsys, tmp_path / "whole", tmp_path / "dest")
    assert "model-00001-of-00001.safetensors: chunk 0 (bytes 0 to " in line
    assert not (tmp_path / "dest").exists()


def test_a_destination_that_exists(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest/precious").write_text("x")
    assert "dest: the destination exists already" in refused(capsys, source, tmp_path / "dest")
    assert "holds no checkpoint, so it is not replaced" in refused(capsys, source, tmp_path / "dest", "--overwrite")
    assert raw.tree(tmp_path / "dest") == {"precious": b"x"}


def test_an_internal_error_is_told_apart(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("ucp.conversion.convert", fail)
    assert command.main([str(source), str(tmp_path / "dest")]) == 3
    err = capsys.readouterr().err
    assert err.startswith("ucp-convert: internal error: RuntimeError: first line second line (run again with --debug")
    assert err.count("\n") == 1
    assert command.main([str(source), str(tmp_path / "dest"), "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


# --- DeepSpeed's own files -------------------------------------------------------------------------------------------


@pytest.fixture
def native(sources: Sources, tmp_path: Path) -> Path:
    """A real checkpoint's folder that a test may damage."""
    from tests.engines.configs import Case

    return Path(sources.copy(Case(stage=1, dp=2), tmp_path / "native").folder)


def optimizer_file(folder: Path, rank: int = 1) -> Path:
    (found,) = folder.glob(f"global_step*/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return found


@pytest.mark.slow
def test_a_native_checkpoint_converts(native: Path, tmp_path: Path) -> None:
    done = call(native, tmp_path / "dest")
    assert (done.returncode, done.stderr) == (0, "")
    assert "from deepspeed (dp=2,zero=1) to universal" in done.stdout
    done = call(native, tmp_path / "other", "--to", "deepspeed", "--layout", "dp=3,zero=2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["target_layout"] == "dp=3,zero=2"
    assert {p.name for p in (tmp_path / "other").iterdir()} == {"latest", "global_step3", "zero_to_fp32.py"}


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "no torch file"])
def test_a_rank_file_that_is_not_whole(
    capsys: pytest.CaptureFixture[str], native: Path, tmp_path: Path, damage: str
) -> None:
    victim = optimizer_file(native)
    content = victim.read_bytes()
    victim.unlink()
    if damage != "missing":
        victim.write_bytes({"empty": b"", "truncated": content[:-100], "no torch file": b"x" * 5000}[damage])
    assert victim.name in refused(capsys, native, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


@pytest.mark.slow
def test_a_pickle_that_would_run_code(capsys: pytest.CaptureFixture[str], native: Path, tmp_path: Path) -> None:
    """The bomb is real: unpickled, it writes a file. Read by the command, it does not."""
    trace = tmp_path / "it-ran"

    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {trace}",)

    bomb = pickle.dumps({"module": Bomb()}, protocol=2)
    victim = optimizer_file(native)
    with zipfile.ZipFile(victim, "w") as archive:
        archive.writestr("archive/data.pkl", bomb)
        archive.writestr("archive/version", "3\n")
    line = refused(capsys, native, tmp_path / "dest")
    assert "system" in line
    assert victim.name in line
    assert not trace.exists()
    assert not (tmp_path / "dest").exists()
    pickle.loads(bomb)
    assert trace.exists()


def test_a_refusal_for_want_of_a_config_names_a_way_that_goes(tmp_path: Path, capsys: Any) -> None:
    """--ds-config is for 'deepspeed' alone, so DeepSpeed's universal folder is reached through that."""
    weight = torch.ones(4)
    state = {"w": {"exp_avg": weight, "exp_avg_sq": weight, "step": torch.tensor(1.0)}}
    groups = [{"params": ["w"], "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}]
    ucp.save({"model": {"w": weight}, "optim": {"state": state, "param_groups": groups}}, tmp_path / "source")
    config = tmp_path / "ds.json"
    config.write_text('{"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}}')
    to = ["--to", "deepspeed-universal"]
    assert command.main([str(tmp_path / "source"), str(tmp_path / "out"), *to]) == 2
    assert (
        "convert it to 'deepspeed' with --ds-config first, and that to 'deepspeed-universal'" in capsys.readouterr().err
    )
    native = ["--to", "deepspeed", "--layout", "dp=1,zero=1", "--ds-config", str(config)]
    assert command.main([str(tmp_path / "source"), str(tmp_path / "native"), *native]) == 0
    assert command.main([str(tmp_path / "native"), str(tmp_path / "out"), *to]) == 0
    with ucp.open(tmp_path / "out") as opened:
        assert opened.read("w").tolist() == weight.tolist()
