"""A swap folder without room for the states is refused by what the swapper itself says of its files."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ucp.deepspeed.live import swapped
from ucp.errors import DestinationError


def optimizer(folder: Path, elements: int) -> Any:
    """What DeepSpeed's stage-3 optimizer tells of two subgroups, of which the swapper keeps the first."""
    flats = [torch.zeros(0), torch.zeros(8)]
    for k, flat in enumerate(flats):
        flat.ds_id = f"0_{k}"  # type: ignore[attr-defined]
    return SimpleNamespace(
        fp32_partitioned_groups_flat=flats,
        fp16_partitioned_groups_flat_numel=[elements, 8],
        optimizer_swapper=SimpleNamespace(swap_folder=str(folder)),
        _swappable_optimizer_subgroup=lambda s: s == 0,
    )


def test_states_that_do_not_fit(tmp_path: Path) -> None:
    states = ("exp_avg", "exp_avg_sq")
    most = 1 << 50  # elements: more than any disk here
    swapped.check_room(optimizer(tmp_path, 1000), lambda s: states)
    with pytest.raises(DestinationError, match=r"need about \d+ bytes there, and \d+ are free.*nothing was changed"):
        swapped.check_room(optimizer(tmp_path, most), lambda s: states)
    for state in states:  # files that are there are written over
        (tmp_path / f"{state}-0_0.tensor.swp").touch()
    swapped.check_room(optimizer(tmp_path, most), lambda s: states)


def test_ranks_of_a_node_share_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = os.statvfs(tmp_path)
    elements = stat.f_bavail * stat.f_frsize // 8  # half of what is free, for one state of one rank
    swapped.check_room(optimizer(tmp_path, elements), lambda s: ("exp_avg",))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(DestinationError):
        swapped.check_room(optimizer(tmp_path, elements), lambda s: ("exp_avg",))
