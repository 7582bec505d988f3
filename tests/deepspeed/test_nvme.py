"""ZeRO-Infinity: engines whose optimizer lies on a disk, as sources and as targets, with real swap files.

DeepSpeed's async_io needs libaio and its headers (Debian: libaio-dev), and takes minutes to build:
``python -m tests.engines.operators AsyncIOBuilder``. Without, this test skips; `tests/README.md` has its last result.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines import operators
from tests.engines.pool import ROOT

pytestmark = pytest.mark.slow

CASES = 6


def test_what_lies_on_a_disk_is_saved_and_loaded_exactly(tmp_path: Path) -> None:
    if not operators.has_async_io():
        pytest.skip("DeepSpeed's async_io is not built: python -m tests.engines.operators AsyncIOBuilder")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("nvme_jobs.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": str(operators.folder()),
    }
    done = subprocess.run(
        [*launch, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = [json.loads(line[len("RESULT ") :]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(found) == CASES
    for case in found:
        assert case["count"] == 36, case
        assert case["wrong"] == [], case
        assert case["steps"] == [3.0], case
        assert case["loss"] == pytest.approx(case["then"], abs=0 if "NVMe" in case["what"] else 4e-3), case
