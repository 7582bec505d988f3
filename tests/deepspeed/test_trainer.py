"""The Hugging Face Trainer, and Accelerate, with ``import ucp.deepspeed.auto``: what they call, find and delete.

One process: on the CPU, Accelerate takes every rank for a job of its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ucp.inspection.listing import listing

pytestmark = pytest.mark.slow
pytest.importorskip("accelerate")

ROOT = Path(__file__).resolve().parents[2]


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"ACCELERATE_USE_DEEPSPEED": "true"} if program == "accelerated" else {}
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.deepspeed.{program}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **alone, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(job: subprocess.Popen[str]) -> list[float]:
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0, err[-3000:]
    (line,) = [line for line in out.splitlines() if line.startswith("losses ")]
    found: list[float] = json.loads(line.removeprefix("losses "))
    return found


def test_the_trainer_resumes_on_another_stage(tmp_path: Path) -> None:
    whole, first = start("trainer", tmp_path / "whole", 2, 6), start("trainer", tmp_path / "run", 2, 4)
    expected, begun = losses(whole), losses(first)
    assert begun == expected[:4]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]  # the limit is kept
    (saved,) = listing(tmp_path / "run/checkpoint-4").checkpoints
    assert (saved.format, saved.layout, saved.step, saved.whole) == ("universal", "dp=1,zero=2", 4, True)
    resumed = losses(start("trainer", tmp_path / "run", 3, 6, "resume"))
    assert resumed[:4] == begun  # the Trainer's own record
    assert resumed[4:] == pytest.approx(expected[4:], abs=5e-5)


def test_accelerate_resumes_on_another_stage(tmp_path: Path) -> None:
    whole, first = start("accelerated", tmp_path / "whole", 2, 4), start("accelerated", tmp_path / "state", 2, 2)
    expected, begun = losses(whole), losses(first)
    assert begun == expected[:4]
    (saved,) = listing(tmp_path / "state").checkpoints
    assert (saved.tag, saved.layout, saved.step) == ("pytorch_model", "dp=1,zero=2", 4)
    assert losses(start("accelerated", tmp_path / "state", 3, 2)) == pytest.approx(expected[4:], abs=5e-5)
