"""What a save and a load of a sharded state dict hold in memory beyond what is live, measured from outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def measured(folder: Path, do: str) -> tuple[int, str]:
    """The peak of a process's anonymous memory in bytes, and the way that it took."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.megatron.memory_program", str(folder), do, str(64 * MIB)]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    peak, right, how = out.strip().split(" ", 2)
    assert right == "True"
    return int(peak), how


@pytest.mark.slow(seconds=15)
def test_a_run_is_saved_and_filled_within_its_memory(tmp_path: Path) -> None:
    """330 MB of weights, masters, moments and a tensor in two parts, within 64 MiB. A save stages what no optimizer
    updates, 41 MB here, and has windows besides."""
    peak, _ = measured(tmp_path / "saved", "save")
    assert peak < 96 * MIB, peak
    peak, how = measured(tmp_path / "saved", "load")
    assert how == "verify, then read"
    assert peak < 64 * MIB, peak
