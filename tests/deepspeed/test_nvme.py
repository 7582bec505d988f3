"""ZeRO-Infinity: engines whose optimizer lies on a disk, as sources and as targets, with real swap files.

DeepSpeed's async_io needs libaio and its headers (Debian: libaio-dev), and takes minutes to build:
``python -m tests.engines.operators AsyncIOBuilder``. Without, this test skips; `tests/README.md` has its last result.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines import operators
from tests.engines.pool import ROOT

pytestmark = pytest.mark.slow

CASES = 9
SUBGROUP, MEMORY = 3 * 4 * 2 * 1536**2, 64 << 20  # as in `nvme_jobs`, which imports DeepSpeed


def results(tmp_path: Path, ranks: int, *more: str) -> list[Any]:
    """What `nvme_jobs` prints on so many ranks."""
    if not operators.has_async_io():
        pytest.skip("DeepSpeed's async_io is not built: python -m tests.engines.operators AsyncIOBuilder")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("nvme_jobs.py")
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": str(operators.folder()),
    }
    done = subprocess.run(
        [*launch, str(script), str(tmp_path), *more], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line[len("RESULT ") :]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]


def test_what_lies_on_a_disk_is_saved_and_loaded_exactly(tmp_path: Path) -> None:
    """On two ranks, what these saved on one, and that on two again."""
    folders = [tmp_path / name for name in ("two", "one", "again")]
    for folder in folders:
        folder.mkdir()
    found = results(folders[0], 2)
    assert len(found) == CASES
    printed = [*results(folders[1], 1, str(folders[0])), *results(folders[2], 2, str(folders[1]))]
    full = [line for line in printed if "refused" in line]
    assert len(full) == 4
    for line in full:
        assert re.search(r"need about \d+ bytes there, and 1048576 are free.*nothing was changed", line["refused"])
        assert line["changed"] == []
    on_others = [line for line in printed if line not in full]
    assert len(on_others) == 4
    for case in (*found, *on_others):
        assert case["count"] == 36, case
        assert case["wrong"] == [], case
        assert case["steps"] == [3.0], case
        assert case["proved"], case
        same = "NVMe" in case["what"] and case not in on_others[:2]
        assert case["losses"] == pytest.approx(case["then"], abs=0 if same else 4e-3), case


def test_one_subgroup_in_host_memory_at_a_time(tmp_path: Path) -> None:
    """Six subgroups of 57 MB. A load may take 64 MiB; a save beside training has copies of one subgroup."""
    (took,) = results(tmp_path, 1, "memory")
    assert took.pop("staged") <= SUBGROUP
    for what, peak in took.items():
        assert peak <= MEMORY + SUBGROUP, (what, took)
