"""What a load takes beyond what is live, measured from outside of it: memory of the host, and of a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.deepspeed import memory_jobs as jobs
from tests.engines.pool import RankPool
from ucp.loading.strategy import VERIFY_THEN_READ

pytestmark = pytest.mark.slow(seconds=25)

MIB = 1 << 20
WEIGHTS = 4 * jobs.LAYERS * jobs.WIDTH**2


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("memory") / "run")
    ranks.run(jobs.make, folder, world_size=1)
    return folder


@pytest.mark.parametrize("way", jobs.WAYS)
def test_host_memory_beyond_what_is_live(ranks: RankPool, saved: str, way: str) -> None:
    """A rank's share is 225 MB, of which 75 MB are weights, and the load may take 64 MiB."""
    for took in ranks.run(jobs.load, saved, way, world_size=1):
        assert took.strategy == VERIFY_THEN_READ
        assert 2 * WEIGHTS <= took.states < 2 * WEIGHTS + MIB
        assert took.peak - took.states <= jobs.MEMORY, took
        assert took.left - took.states <= jobs.MEMORY, took


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", jobs.WAYS)
def test_device_memory_beyond_what_is_live(tmp_path: Path, way: str) -> None:
    folder = str(tmp_path / "run")
    jobs.make(folder, "cuda")
    took = jobs.load(folder, way, "cuda")
    assert 2 * WEIGHTS <= took.states < 2 * WEIGHTS + MIB
    assert took.device_peak - took.states <= 256 * MIB, took
    assert took.device_left - took.states <= MIB, took
    assert took.peak <= jobs.MEMORY + 256 * MIB, took
