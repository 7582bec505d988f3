"""What a load holds in memory beyond what is live, measured from outside the loader: anonymous memory of a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

import ucp
from tests.loading import memory_program

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def measured(folder: Path, reader: str, memory: int) -> tuple[int, str]:
    """The peak in bytes, and the way that the load took."""
    command = [sys.executable, "-m", "tests.loading.memory_program", str(folder), reader, str(memory)]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    peak, right, strategy = out.strip().split(" ", 2)
    assert right == "True"
    return int(peak), strategy


@pytest.mark.slow(seconds=15)
def test_a_load_stays_within_its_memory(tmp_path: Path) -> None:
    """700 MiB within 256 and 64 MiB, from our files and from DCP's, by ``ucp.load`` and by ``dcp.load``."""
    ucp.save(memory_program.state(3.0), tmp_path / "ours")
    for reader, memory in (("load", 256 * MIB), ("dcp", 64 * MIB)):
        peak, strategy = measured(tmp_path / "ours", reader, memory)
        assert strategy == "verify, then read"
        assert peak < memory, (reader, memory, peak)
    dcp.save(memory_program.state(3.0), checkpoint_id=tmp_path / "theirs", no_dist=True)
    peak, _ = measured(tmp_path / "theirs", "load", 64 * MIB)
    assert peak < 64 * MIB
