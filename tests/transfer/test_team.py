"""Several processes that share a conversion: the same bytes as one alone writes, whoever dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import ucp
from tests.formats import raw
from ucp.errors import BadArgument, ProcessLost
from ucp.transfer.targets import TargetFile
from ucp.transfer.team import Team, from_environment
from ucp.transfer.windows import UNIT, shares

ROOT = Path(__file__).resolve().parents[2]
NATIVE = {"to": "deepspeed", "layout": "dp=2,zero=1", "ds_config": {"optimizer": {"type": "Adam"}}}

# argv: source, destination, process, processes, keyword arguments, seconds to sleep at every progress,
# and what the progress raises in the end.
PROCESS = """
import sys, time
import ucp
from ucp.transfer.team import Team
source, dest, process, processes, options, pause, fault = sys.argv[1:]
def progress(done, total):
    time.sleep(float(pause))
    if done == total and fault:
        raise RuntimeError(fault)
team = Team(int(process), int(processes), join=20.0, lost=2.0, beat=0.1)
try:
    ucp.convert(source, dest, team=team, workers=1, max_memory=12 << 20, progress=progress, **eval(options))
except ucp.errors.UcpError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def made(tmp_path: Path) -> raw.Raw:
    return raw.make(tmp_path / "raw", shapes={"w": (6000, 1000), "b": (3,)}, states=("param", "exp_avg"), dp=3)


@pytest.fixture
def source(tmp_path: Path, made: raw.Raw) -> Path:
    return raw.virtual_checkpoint(tmp_path / "source", made)


@pytest.fixture
def start(source: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started = []

    def begin(
        process: int, processes: int = 2, options: Mapping[str, Any] | None = None, pause: float = 0, fault: str = ""
    ) -> subprocess.Popen[str]:
        arguments = [source, tmp_path / "dest", process, processes, dict(options or {}), pause, fault]
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, text=True
            )
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def await_journal(tmp_path: Path, process: int) -> None:
    """Return once that process has noted a piece."""
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.glob(f".ucp-part-dest/journal/*-{process}")):
        assert time.monotonic() < deadline, "it has begun nothing"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, NATIVE], ids=["universal", "deepspeed"])
def test_three_write_what_one_writes(source: Path, tmp_path: Path, start: Any, options: dict[str, Any]) -> None:
    ucp.convert(source, tmp_path / "expected", **options)
    processes = [start(k, 3, options) for k in (2, 0, 1)]
    assert [ended(process) for process in processes] == [(0, "")] * 3
    assert raw.tree(tmp_path / "dest") == raw.tree(tmp_path / "expected")
    assert not list(tmp_path.glob(".ucp*"))


@pytest.mark.slow
def test_a_lost_process_is_named_and_its_work_continued(source: Path, tmp_path: Path, start: Any, caplog: Any) -> None:
    ucp.convert(source, tmp_path / "expected")
    leader, other = start(0), start(1, pause=0.2)
    await_journal(tmp_path, 1)
    other.send_signal(signal.SIGKILL)
    code, stderr = ended(leader)
    assert code == 1
    assert f"ProcessLost: process 1 ({socket.gethostname()}) was lost: it has given no sign of life" in stderr
    assert not (tmp_path / "dest").exists()
    report = ucp.convert(source, tmp_path / "dest")
    assert report.bytes_read < report.bytes_written / 2
    assert raw.tree(tmp_path / "dest") == raw.tree(tmp_path / "expected")


@pytest.mark.slow
def test_a_process_that_fails_tells_why(tmp_path: Path, start: Any) -> None:
    leader, other = start(0), start(1, fault="no more paper")
    code, stderr = ended(leader)
    assert code == 1
    assert f"ProcessLost: process 1 ({socket.gethostname()}) failed: RuntimeError: no more paper" in stderr
    assert ended(other)[0] == 1
    assert not (tmp_path / "dest").exists()


@pytest.mark.slow
def test_the_first_process_dies_and_all_begin_again(source: Path, tmp_path: Path, start: Any) -> None:
    """What still runs of the attempt before stops by itself, and harms nothing."""
    ucp.convert(source, tmp_path / "expected", **NATIVE)
    leader, other = start(0, options=NATIVE, pause=0.05), start(1, options=NATIVE, pause=0.3)
    await_journal(tmp_path, 1)
    leader.send_signal(signal.SIGKILL)
    leader.wait()
    again = [start(k, 2, NATIVE) for k in (0, 1)]
    assert [ended(process) for process in again][1] == (0, "")
    assert again[0].returncode == 0
    code, stderr = ended(other)
    assert code == 1
    assert "ProcessLost: process 1 stops: process 0 has given up, or another conversion has begun" in stderr
    assert raw.tree(tmp_path / "dest") == raw.tree(tmp_path / "expected")


def test_those_who_never_come(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ProcessLost, match=r"of 3 processes, 1, 2 did not come within 0\.5 seconds"):
        ucp.convert(source, tmp_path / "dest", team=Team(0, 3, join=0.5))
    with pytest.raises(ProcessLost, match=r"process 0 did not begin in '.*team' within 0\.5 seconds"):
        ucp.convert(source, tmp_path / "dest", team=Team(2, 3, join=0.5))
    assert not list(tmp_path.glob(".ucp*"))


@pytest.mark.slow
def test_other_arguments_are_refused(tmp_path: Path, start: Any) -> None:
    leader = start(0)
    start(1, options=NATIVE)
    code, stderr = ended(leader)
    assert code == 1
    assert "sees another source, or has other arguments, than process 0" in stderr


@pytest.mark.parametrize("total", [0, 1, UNIT - 1, UNIT, 10 * UNIT + 3])
@pytest.mark.parametrize("processes", [1, 2, 3, 40])
def test_shares_are_disjoint_complete_and_even(total: int, processes: int) -> None:
    files = [TargetFile(str(k), size, (), ()) for k, size in enumerate((0, total, 17, 3 * total, 5))]
    held = [shares(files, k, processes) for k in range(processes)]
    for index, file in enumerate(files):
        parts = sorted(share[index] for share in held if share[index][0] < share[index][1])
        assert sum(last - first for first, last in parts) == file.size
        assert all(before[1] == after[0] for before, after in pairwise(parts))
    loads = [sum(last - first for first, last in share) for share in held]
    assert max(loads) - min(loads) <= 2 * UNIT + 22


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, (0, 2)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6"}, (5, 6)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # the script of a batch job: one process
    ],
)
def test_launchers_number_the_processes(environment: dict[str, str], expected: tuple[int, int]) -> None:
    team = from_environment(environment)
    assert (team.process, team.processes) == expected


def test_a_launcher_that_counts_wrong_is_told() -> None:
    with pytest.raises(BadArgument, match="RANK=4 and WORLD_SIZE=4 do not number"):
        from_environment({"RANK": "4", "WORLD_SIZE": "4"})


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True])
def test_two_torchrun_agents(source: Path, tmp_path: Path, lost: bool) -> None:
    """As on two machines: one agent each, two processes each; then with a process that is killed, and once more."""
    ucp.convert(source, tmp_path / "expected")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = tmp_path / "pids"
    pids.mkdir()
    # Each process tells its number, and works slowly where one is to be killed.
    (tmp_path / "slow.py").write_text(
        "import os, sys, time, pathlib\n"
        f"pathlib.Path({str(pids)!r}, os.environ['RANK']).write_text(str(os.getpid()))\n"
        "import ucp.transfer.pieces as pieces\n"
        "add = pieces.Journal.add\n"
        f"pieces.Journal.add = lambda journal, piece: (add(journal, piece), time.sleep({0.4 if lost else 0}))\n"
        "from ucp.cli.convert import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )

    def agents(program: list[Any]) -> list[subprocess.Popen[str]]:
        common = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"]
        common += ["--master_addr=127.0.0.1", f"--master_port={port}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return [
            subprocess.Popen(
                [*common, f"--node_rank={node}", *map(str, program), str(source), str(tmp_path / "dest")],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for node in (0, 1)
        ]

    started = agents([tmp_path / "slow.py"] if lost else ["-m", "ucp.cli.convert"])
    if lost:
        await_journal(tmp_path, 3)
        os.kill(int((pids / "3").read_text()), signal.SIGKILL)
        outputs = [process.communicate(timeout=120) for process in started]
        assert all(process.returncode for process in started)
        assert any("ucp-convert: interrupted" in stderr or "process 3" in stderr for _, stderr in outputs)
        assert not (tmp_path / "dest").exists()
        assert (tmp_path / ".ucp-part-dest").is_dir()
        started = agents(["-m", "ucp.cli.convert"])
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert [stdout.count("wrote ") for stdout, _ in outputs] == [1, 0]  # the first process alone prints
    assert raw.tree(tmp_path / "dest") == raw.tree(tmp_path / "expected")
