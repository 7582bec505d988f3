"""Programs under torchrun's own agent: killed ones go on from memory, refused ones are not tried again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests import startup
from tests.engines.zygote import ENVIRONMENT
from tests.memory.conftest import keepers
from tests.memory.nodes import wait_for
from ucp.elastic.running import FRESH_STORES, REFUSED, drain, drained, run
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


@pytest.mark.parametrize(
    "wrong",
    [
        {
            "train_batch_size": 7,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
        },  # AssertionError
        {},  # DeepSpeedConfigError: no batch at all
        {"train_batch_size": 1, "zero_optimization": {"stage": 7}},  # pydantic's
        {"train_batch_size": 1, "fp16": {"enabled": True}, "bf16": {"enabled": True}},
    ],
)
def test_what_deepspeed_finds_wrong_in_its_configuration_is_not_tried_again(
    wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as ended:
        run(lambda: DeepSpeedConfig(wrong))
    assert ended.value.code == REFUSED


def test_other_errors_in_deepspeed_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    def broken(self: Any, config: Any) -> None:
        raise OSError("the file system hangs")

    monkeypatch.setattr(DeepSpeedConfig, "_initialize_params", broken)
    with pytest.raises(OSError, match="hangs"):
        run(lambda: DeepSpeedConfig({"train_batch_size": 1}))
    with pytest.raises(RuntimeError, match="out of memory"):
        run(lambda: (_ for _ in ()).throw(RuntimeError("out of memory")))


def test_a_drained_node_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCP_NODE", "bad")
    drain(tmp_path, "bad")
    assert drained(tmp_path) == ["bad"]
    code, told = torchrun(tmp_path, "memory-never", 1)
    assert (code != 0, told) == (True, [])
    assert drain(tmp_path, "bad", back=True) == []


def test_the_other_nodes_go_on_without_a_drained_one(tmp_path: Path, keepers: Path) -> None:
    """Two agents, each a node: the ranks of the one that stays would wait for those of the one that has left. Rounds
    wait so long for more nodes that the second agent is always in the first."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    quick = "last_call_timeout=8,keep_alive_interval=1,keep_alive_max_attempt=2"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=1:2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
    ]
    command += [f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf={quick}", "--max-restarts=3"]
    command += ["--monitor-interval=0.1", "-m", "ucp.elastic", "--folder", str(tmp_path)]
    command += [str(ROOT / "tests/elastic/program.py"), str(tmp_path), "memory-drain"]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": startup.search_path([ROOT]), FRESH_STORES: "1"}
    agents = {}
    try:
        for node in ("good", "bad"):
            agents[node] = subprocess.Popen(command, env={**environment, "UCP_NODE": node}, start_new_session=True)
            wait_for(lambda: is_listening(port), 30)  # by the first one's agent
        assert agents["good"].wait(120) == 0
        assert agents["bad"].wait(30) != 0
    finally:
        for agent in agents.values():
            with suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert [(one["resumed"], one["world"]) for one in told if "resumed" in one] == [(0, 2), (3, 1)]
    assert told[-1]["step"] == 6
    events = [one for one in read_metrics(tmp_path) if one.get("what") == "event"]
    assert {(one["event"], one["node"]) for one in events} >= {("drained", "bad"), ("restarted", "good")}


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
