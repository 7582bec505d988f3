"""What a conversion holds in memory, measured from outside: anonymous memory of the command and all it starts."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import ucp
from tests.formats import raw
from ucp.catalog import LogicalTensor, ParameterInfo, SourceFile
from ucp.geometry import box, concat

ROOT = Path(__file__).resolve().parents[1]
ROWS, COLUMNS = 1 << 14, 1 << 15  # of float32: 2 GiB
MIB = 1 << 20


def two_gibibytes(folder: Path) -> Path:
    """A checkpoint of one tensor, cut into two column shards: sparse files with a few numbers in them."""
    made = raw.make(folder / "raw", shapes={"b": (3,)}, states=("param",), dp=1)
    path = folder / "raw" / "large.bin"
    half = ROWS * COLUMNS // 2
    with open(path, "wb") as stream:
        stream.truncate(2 * half * 4)
        for shard in (0, 1):
            for row in range(0, ROWS, 1000):
                stream.seek(4 * (shard * half + row * COLUMNS // 2))
                stream.write(np.float32([shard + 1, row]).tobytes())
    stat = path.stat()
    catalog = made.catalog
    blocks = concat(
        [box([0, k * COLUMNS // 2], [ROWS, COLUMNS // 2], k * half, buffer=len(catalog.files)) for k in (0, 1)], 2
    )
    large = LogicalTensor("large", "param", (ROWS, COLUMNS), "float32", blocks, np.zeros(2, np.int64))
    catalog = dataclasses.replace(
        catalog,
        files=(*catalog.files, SourceFile(str(path), stat.st_size, stat.st_mtime_ns)),
        parameters={**catalog.parameters, "large": ParameterInfo("large", large.shape, {"param": "float32"})},
        tensors={**catalog.tensors, ("large", "param"): large},
    )
    return raw.virtual_checkpoint(folder / "source", raw.Raw(catalog, made.truth))


def anonymous(process: psutil.Process) -> int:
    """Bytes of anonymous memory of a process and its children."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        with open(f"/proc/{one.pid}/status") as stream:
            total += sum(int(line.split()[1]) << 10 for line in stream if line.startswith("RssAnon:"))
    return total


def peak_of(arguments: list[object]) -> int:
    """The most anonymous memory of a command, which has to succeed."""
    peak = 0
    with subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, anonymous(watched))
            except (OSError, psutil.Error):
                break
            time.sleep(0.01)
    assert process.returncode == 0
    return peak


@pytest.mark.slow
def test_a_tensor_of_two_gibibytes_in_a_quarter(tmp_path: Path) -> None:
    source = two_gibibytes(tmp_path)
    peak = peak_of(["-m", "ucp.cli.convert", source, tmp_path / "dest", "--max-memory", "256MiB"])
    assert 20 * MIB < peak < (256 + 400) * MIB
    assert peak < 256 * MIB + 100 * MIB, f"{peak / MIB:.0f} MiB: more than is needed since no process imports torch"
    with ucp.open(tmp_path / "dest") as checkpoint:
        for shard in (0, 1):
            at = shard * COLUMNS // 2
            found = checkpoint.read("large", region=(slice(5000, 5001), slice(at, at + 3)))
            assert found.tolist() == [[shard + 1, 5000, 0]]
    os.unlink(tmp_path / "dest" / "model-00001-of-00001.safetensors")


@pytest.mark.slow
def test_a_merge_of_ten_in_as_much(tmp_path: Path) -> None:
    made = raw.make(tmp_path / "raw", shapes={"w": (1 << 12, 1 << 12)}, states=("param",), dp=1)
    source = raw.virtual_checkpoint(tmp_path / "source", made)
    command = ["-m", "ucp.cli.main", "merge", *[source] * 10, tmp_path / "dest", "--max-memory", "128MiB"]
    peak = peak_of([*command, "--workers", "8"])
    assert peak < (128 + 100) * MIB, f"{peak / MIB:.0f} MiB"
    with ucp.open(source) as one, ucp.open(tmp_path / "dest") as merged:
        assert merged.read("w").allclose(one.read("w"))
