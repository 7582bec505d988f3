"""Snapshots in memory of FSDP2 and of plain torch, and the commands that look at them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import ucp
from tests.engines.pool import RankPool
from tests.memory import jobs
from ucp import limits
from ucp.cli.main import main
from ucp.memory.options import Options
from ucp.memory.tier import Tier
from ucp.storage.kept import places
from ucp.storage.kept.client import of_note
from ucp.torchdist.memory import MemorySnapshots

pytestmark = pytest.mark.slow


def test_sharded_state_in_memory_resumes_unsharded(
    ranks: RankPool,
    tmp_path: Path,
    keepers: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the commands know the run by its folder's path as it is typed there, though nothing was written to disk."""
    folder = str(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    start, whole = ranks.run(jobs.fsdp, folder, str(keepers), 2, True, world_size=2)[0]
    assert start == 0
    start, again = ranks.run(jobs.fsdp, folder, str(keepers), 0, False, world_size=1)[0]
    assert start == 2
    torch.testing.assert_close(again, whole, rtol=0, atol=0)

    assert main(["keeper", "status", folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["keepers"]
    assert [(one["node"], one["generations"][0]["tag"]) for one in found] == [("a", "step2"), ("b", "step2")]
    assert all(one["generations"][0]["protected"] for one in found)
    assert main(["ls", f"memory://{folder}"]) == 0
    assert not (tmp_path / "run").exists()
    for typed in (folder, "run", "./run", "../" + tmp_path.name + "/run/", "memory://run"):
        assert main(["keeper", "ls", typed]) == 0
    assert "step2" in capsys.readouterr().out
    assert main(["keeper", "metrics", folder]) == 0
    said = capsys.readouterr().out
    assert f'ucp_keeper_step{{run="{folder}",node="a"}} 2' in said
    assert main(["keeper", "dump", "run", str(tmp_path / "dumped"), "--quiet"]) == 0
    assert main(["diff", f"memory://{folder}", str(tmp_path / "dumped")]) == 0
    with ucp.open(tmp_path / "dumped") as checkpoint:
        assert torch.equal(checkpoint.read("0.weight"), whole["0.weight"])
    assert main(["keeper", "drop", "run"]) == 0
    assert list(keepers.glob("*-*")) == []


def test_training_does_not_wait_for_a_snapshot_that_is_under_way(tmp_path: Path, keepers: Path) -> None:
    model = torch.nn.Linear(64, 64)
    memory = MemorySnapshots(tmp_path / "run", redundancy=0, policy="skip")
    assert memory.snapshot(1, model=model)
    memory.wait()
    writer = memory.tier.saver.writer
    os.kill(writer, signal.SIGSTOP)
    try:
        assert memory.snapshot(2, model=model)
        memory.hold()
        assert not memory.snapshot(3, model=model)
        assert not memory.snapshot(4, model=model)
    finally:
        os.kill(writer, signal.SIGCONT)
    memory.wait()
    assert memory.tier.skipped == 2
    assert memory.snapshot(5, model=model)
    memory.wait()
    with ucp.open(memory.tier.location) as checkpoint:
        assert checkpoint.training_state.global_steps == 5
    memory.tier.end()


def test_two_programs_of_one_run_are_told(tmp_path: Path, keepers: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second one, while the first is alive; not after its death, also while nobody has asked for its exit code."""
    tiers = [attached(tmp_path / "run")]
    text = "another program that is alive keeps the same run"
    assert text not in caplog.text
    other = subprocess.Popen(["sleep", "60"])
    of_note(places.notes()[0]).ask("come", pid=other.pid)
    tiers.append(attached(tmp_path / "run"))
    assert f"{text} on node '{places.node()}' (processes {other.pid});" in caplog.text
    caplog.clear()
    other.kill()
    while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    tiers.append(attached(tmp_path / "run"))
    assert text not in caplog.text
    other.wait()
    for tier in tiers:
        tier.end()


def attached(folder: Path) -> Tier:
    tier = Tier(Options(redundancy=0))
    tier.attach(folder, 0)
    return tier


def test_several_processes_digest_what_one_would(
    tmp_path: Path, keepers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "digesters", lambda: 3)
    monkeypatch.setattr(limits, "SAVE_WINDOW_BYTES", 1 << 20)
    model = torch.nn.Linear(1200, 900)
    memory = MemorySnapshots(tmp_path / "run", redundancy=0)

    def kept(step: int) -> dict[str, Any]:
        memory.snapshot(step, model=model)
        memory.wait()
        with ucp.open(memory.tier.location) as checkpoint:
            assert checkpoint.training_state.global_steps == step
            return {key: tensor.digest for key, tensor in checkpoint.catalog.tensors.items()}

    found = kept(1)
    live = ucp.digest(model.state_dict())
    assert {key: digest.whole for key, digest in found.items()} == {(t.name, t.state): t.digest for t in live.tensors}
    assert main(["verify", memory.tier.location]) == 0
    with torch.no_grad():
        model.weight += 1
    writer = psutil.Process(memory.tier.saver.writer)
    crew = writer.children()
    assert len(crew) == 3
    crew[1].kill()
    while crew[1].status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    memory.snapshot(2, model=model)
    memory.wait()
    assert "a process that digests a snapshot has ended" in capsys.readouterr().err
    assert kept(3) != found
    assert main(["verify", memory.tier.location]) == 0
    assert writer.children() == []  # this process digests by itself now
    memory.tier.end()
