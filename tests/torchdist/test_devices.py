"""FSDP2 on two GPUs over NCCL: saved by this project and by stock DCP, resumed on one GPU, and back, to the bit.

Skipped where there are fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engines.device_pool import DEVICE, DevicePool
from tests.engines.fsdp import Mesh
from tests.torchdist import dtensor_jobs as jobs
from tests.torchdist.test_state_dicts import SAVES, check, under

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
LOADS = [
    (jobs.shared, jobs.load_ucp, "ucp"),
    (jobs.titan, jobs.load_ucp, "titan"),
    (jobs.app, jobs.load_ucp, "app"),
    (jobs.shared, jobs.load_ucp, "async"),
    (jobs.shared, jobs.load_ucp, "dcp"),
    (jobs.titan, jobs.load_reader, "dcp-titan"),
    (jobs.shared, jobs.load_ucp, "writer"),
    (jobs.shared, jobs.load_reader, "async-writer"),
]


@pytest.fixture(scope="module")
def devices() -> Iterator[DevicePool]:
    pool = DevicePool()
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Mesh(2), Mesh(1, seed=1)),
        (Mesh(1), Mesh(2, seed=1)),
        (Mesh(1, tp=2), Mesh(2, seed=1)),
        (Mesh(2), Mesh(1, tp=2)),
    ],
    ids=["2to1", "1to2", "tp2to2", "2totp2"],
)
def test_every_way_to_save(devices: DevicePool, tmp_path: Path, before: Mesh, after: Mesh) -> None:
    first = devices.run(jobs.save, before, under(tmp_path, SAVES), world_size=before.ranks)
    found = devices.run(jobs.load, after, under(tmp_path, LOADS), None, str(tmp_path / "on"), world_size=after.ranks)
    check(found, first, len(LOADS))
    again = devices.run(
        jobs.load, before, under(tmp_path, [(jobs.shared_model, jobs.load_ucp, "on")]), world_size=before.ranks
    )
    check(again, first, 1)


def test_the_whole_training_state(devices: DevicePool, tmp_path: Path) -> None:
    """On as many GPUs schedulers, loaders and generators, the devices' too, go on where they were."""
    path = str(tmp_path / "training")
    first = devices.run(jobs.save, Mesh(2), [], path, world_size=2)
    found = devices.run(jobs.load, Mesh(2, seed=1), [], path, world_size=2)
    check(found, first, 1)
    assert not torch.equal(first[0].extra, first[1].extra)
    for rank, (run, one) in enumerate(zip(found, first, strict=True)):
        step, extra, position, drawn, _ = run.extra
        assert (step, extra, position) == (jobs.STEPS, {"note": "kept"}, rank)
        assert torch.equal(drawn, one.extra)
        assert run.further == one.further
