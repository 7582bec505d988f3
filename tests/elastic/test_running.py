"""Programs under torchrun's own agent: killed ones go on from memory, refused ones are not tried again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import startup
from tests.engines.zygote import ENVIRONMENT
from tests.memory.conftest import keepers
from tests.memory.nodes import wait_for
from ucp.elastic.running import FRESH_STORES, drain, drained, run
from ucp.storage.metrics import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

__all__ = ["keepers"]


def torchrun(folder: Path, mode: str, ranks: int = 2) -> tuple[int, list[dict[str, Any]]]:
    """The exit code, and what the program has told."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["--max-restarts=3", "--monitor-interval=0.1", "-m", "ucp.elastic", "--folder", str(folder)]
    command += [str(ROOT / "tests/elastic/program.py"), str(folder), mode]
    modules = startup.search_path([ROOT])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": modules, FRESH_STORES: "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=pipe, stderr=pipe, text=True
    ) as agent:
        try:
            _, stderr = agent.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(agent.pid, signal.SIGKILL)  # its ranks as well
            raise
    lines = (folder / "told").read_text().splitlines() if (folder / "told").exists() else []
    if agent.returncode and mode == "memory":
        raise AssertionError(stderr[-3000:])
    return agent.returncode, [json.loads(line) for line in lines]


def test_a_killed_rank_costs_no_step_and_leaves_nothing_behind(tmp_path: Path, keepers: Path) -> None:
    code, told = torchrun(tmp_path, "memory")
    assert code == 0
    assert [one["resumed"] for one in told if "resumed" in one] == [0, 3]
    steps = [one["step"] for one in told if "step" in one]
    # Rank 0 may have done the fourth step while rank 1 was killed in it.
    assert steps[:3] == [1, 2, 3]
    assert steps[-3:] == [4, 5, 6]
    assert steps[3:-3] in ([], [4])
    events = [one for one in read_metrics(tmp_path) if one["what"] == "event"]
    assert [(one["event"], one["restart"]) for one in events] == [("started", 0), ("started", 1)]
    wait_for(lambda: list(keepers.glob("*-*")) == [], told=lambda: sorted(keepers.rglob("*")))


def test_a_store_that_outlives_a_restart_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for agents, warned in (("True", True), ("False", False)):
        caplog.clear()
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agents)
        run(lambda: None)
        assert any(FRESH_STORES in text for text in caplog.messages) == warned


def test_a_refusal_is_not_tried_again(tmp_path: Path, keepers: Path) -> None:
    code, told = torchrun(tmp_path, "refuse")
    assert code != 0
    assert len([one for one in told if "start" in one]) == 1
    assert [one["event"] for one in read_metrics(tmp_path)] == ["started", "refused"]


def test_a_drained_node_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCP_NODE", "bad")
    drain(tmp_path, "bad")
    assert drained(tmp_path) == ["bad"]
    code, told = torchrun(tmp_path, "memory-never", 1)
    assert (code != 0, told) == (True, [])
    assert drain(tmp_path, "bad", back=True) == []
