"""ZeRO-Infinity: engines whose optimizer lies on a disk, as sources and as targets, with real swap files.

DeepSpeed's async_io writes and reads them (`tests.engines.operators.async_io`); without a compiler this skips.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import ucp
from tests.deepspeed import nvme_jobs
from tests.deepspeed.nvme_jobs import MEMORY, SMALL, SUBGROUP
from tests.engines import operators
from tests.engines.pool import RankPool

pytestmark = pytest.mark.slow(seconds=40)

NVME = {"nvme": "states", "size": SMALL}


@pytest.fixture(scope="module", autouse=True)
def _async_io() -> None:
    if not operators.has_async_io():
        pytest.skip("DeepSpeed's async_io is not built: python -m tests.engines.operators")


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """What two ranks saved, both ways, and converted; their next losses."""
    folder = tmp_path_factory.mktemp("nvme")
    losses = ranks.run(nvme_jobs.save, str(folder), world_size=2)[0]
    ucp.convert(folder / "native", folder / "universal")
    return folder, losses


def check(result: Sequence[Any], losses: list[float] | None, exactly: bool = False) -> None:
    """All 36 tensors are those that the source's own accessors gave, and training goes on as there."""
    count, wrong, steps, proved, *further = result
    assert (count, wrong, steps, proved) == (36, [], {3.0}, True)
    if losses is not None:
        assert further[0] == pytest.approx(losses, abs=0 if exactly else 4e-3)


@pytest.mark.parametrize(
    ("form", "target", "trained"),
    [
        ("native", NVME, 0),
        ("ours", NVME, 2),
        ("native", {"nvme": "all"}, 0),
        ("ours", {"nvme": "", "stage": 1}, 0),
        ("universal", {"nvme": "", "stage": 2}, 0),
        ("universal", NVME, 0),
    ],
    ids=["native", "ours into one that has trained", "parameters, too", "stage 1", "stage 2", "universal"],
)
def test_what_lies_on_a_disk_is_saved_and_loaded_exactly(
    ranks: RankPool, saved: tuple[Path, list[float]], tmp_path: Path, form: str, target: dict[str, Any], trained: int
) -> None:
    source, losses = saved
    arguments = (str(source), form, str(tmp_path), {**target, "seed": 2}, trained)
    # in the same layout the next losses are the same numbers
    check(ranks.run(nvme_jobs.load, *arguments, world_size=2)[0], losses, exactly=target is NVME)


def test_fsdp2(ranks: RankPool, saved: tuple[Path, list[float]]) -> None:
    check(ranks.run(nvme_jobs.fsdp, str(saved[0]), "native", world_size=2)[0], None)


@pytest.mark.parametrize("form", ["native", "ours"])
def test_two_ranks_one_and_two_again(
    ranks: RankPool, saved: tuple[Path, list[float]], tmp_path: Path, form: str
) -> None:
    """What a rank saved that went on from what two ranks saved."""
    source, losses = saved
    target = {**NVME, "seed": 3}
    check(ranks.run(nvme_jobs.load, str(source), form, str(tmp_path), target, 0, form, world_size=1)[0], losses)
    (tmp_path / "truth.pt").symlink_to(source / "truth.pt")
    target["seed"] = 4
    check(ranks.run(nvme_jobs.load, str(tmp_path), form, str(tmp_path), target, world_size=2)[0], losses, exactly=True)


@pytest.mark.parametrize("ranks_count", [1, 2])
def test_a_full_disk_is_refused_before_anything_changes(
    ranks: RankPool, saved: tuple[Path, list[float]], tmp_path: Path, ranks_count: int
) -> None:
    said, changed = ranks.run(nvme_jobs.refused, str(saved[0]), "native", str(tmp_path), world_size=ranks_count)[0]
    assert re.search(r"need about \d+ bytes there, and 1048576 are free.*nothing was changed", said)
    assert changed == []


def test_one_subgroup_in_host_memory_at_a_time(ranks: RankPool, tmp_path: Path) -> None:
    """Six subgroups of 57 MB. A load may take 64 MiB; a save beside training has copies of one subgroup."""
    took = ranks.run(nvme_jobs.measure, str(tmp_path), world_size=1, timeout=300)[0]
    assert took.pop("staged") <= SUBGROUP
    for what, peak in took.items():
        assert peak <= MEMORY + SUBGROUP, (what, took)
