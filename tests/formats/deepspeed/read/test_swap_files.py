"""ZeRO-Infinity's swap files beside stage 3's: read as what they hold, or refused by name.

The files are laid out here by plain torch, as DeepSpeed's save has them; `tests/deepspeed/test_nvme.py` compares with
engines that really swap, where the machine can build DeepSpeed's async_io.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.formats.deepspeed.read.test_damaged import TAG
from tests.formats.deepspeed.read.test_same_save import optimizer_of, rewrite, saved
from ucp.errors import DamagedCheckpoint, UcpError, Unsupported
from ucp.inspection.verify import verify

RANKS = (0, 1)


@pytest.fixture(autouse=True, scope="module")
def _deepspeed() -> None:
    """Its classes are in the files, which torch itself rewrites here."""
    pytest.importorskip("deepspeed")


def swap(folder: Path, which: Callable[[int], bool] = lambda s: True, base: int = 0) -> None:
    """Move these subgroups' tensors into swap files, as DeepSpeed's swapper and its save do."""
    model = next((folder / TAG).glob("zero_pp_rank_0_*model_states.pt"))
    content = torch.load(model, weights_only=False)
    shared = content.get("shared_params") or {}
    order = [n for n in content["module"] if n not in content["buffer_names"] and n not in shared]
    groups = [list(shapes) for shapes in content["param_shapes"]]
    for rank in RANKS:
        place = folder / TAG / "offloaded_tensors" / f"rank{rank:02d}"
        place.mkdir(parents=True)

        def move(content: dict[str, Any], place: Path = place) -> None:
            state = content["optimizer_state_dict"]
            for s, names in enumerate(groups):
                if not which(s):
                    continue
                name = f"{order.index(names[0]) + base}_{order.index(names[-1]) + base}.tensor.swp"
                state["fp32_flat_groups"][s] = out(state["fp32_flat_groups"][s], place / name)
                inner = state["optimizer_state_dict"]["state"][s]
                for key in [k for k, v in inner.items() if torch.is_tensor(v) and v.dim()]:
                    inner[key] = out(inner[key], place / f"{key}-{name}")

        rewrite(optimizer_of(folder, rank), move)


def out(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    raw = tensor.detach().numpy().tobytes()
    path.write_bytes(raw + b"\xff" * (-len(raw) % 1024))
    return torch.empty(0, dtype=tensor.dtype)


def everything(folder: Path) -> dict[str, Any]:
    with ucp.open(folder, tag=TAG) as opened:
        return {f"{n} {s}": opened.read(n, s) for n, info in opened.parameters.items() for s in info.states}


@pytest.mark.parametrize("base", [0, 40])
@pytest.mark.parametrize("which", ["all", "some"])
def test_what_was_swapped_is_read(tmp_path: Path, which: str, base: int) -> None:
    folder = saved(tmp_path, "z3")
    truth = everything(folder)
    swap(folder, (lambda s: True) if which == "all" else (lambda s: s == 0), base)
    found = everything(folder)
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[key], truth[key]) for key in truth)
    report = verify(folder, TAG)
    assert report.whole
    ucp.convert(folder, tmp_path / "out", tag=TAG)
    with ucp.open(tmp_path / "out") as opened:
        assert all(torch.equal(opened.read(*key.rsplit(" ", 1)), truth[key]) for key in truth)


def swap_file(folder: Path, prefix: str = "") -> Path:
    return sorted((folder / TAG / "offloaded_tensors" / "rank01").glob(f"{prefix}*.swp"))[0]


def drop(folder: Path) -> None:
    swap_file(folder, "exp_avg-").unlink()


def drop_masters(folder: Path) -> None:
    swap_file(folder, "[0-9]").unlink()


def drop_rank(folder: Path) -> None:
    (folder / TAG / "offloaded_tensors" / "rank01").rename(folder / TAG / "elsewhere")


def truncate(folder: Path) -> None:
    path = swap_file(folder)
    os.truncate(path, path.stat().st_size - 1024)


def lengthen(folder: Path) -> None:
    with open(swap_file(folder), "ab") as file:
        file.write(b"x" * 1024 * 1024)


def rename(folder: Path) -> None:
    path = swap_file(folder, "[0-9]")
    path.rename(path.with_name("77_99.tensor.swp"))


@pytest.mark.parametrize("damage", [drop, drop_masters, drop_rank, truncate, lengthen, rename])
def test_damage_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = saved(tmp_path, "z3")
    swap(folder)
    damage(folder)
    with pytest.raises((DamagedCheckpoint, Unsupported)) as caught:
        ucp.open(folder, tag=TAG)
    assert "offloaded_tensors" in str(caught.value)


def test_a_link_or_a_pipe_is_no_swap_file(tmp_path: Path) -> None:
    folder = saved(tmp_path, "z3")
    swap(folder)
    path = swap_file(folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UcpError):
        everything(folder)


@pytest.mark.parametrize("name", ["../rank00/exp_avg", "/exp_avg", "exp_avg\0", "..\\exp_avg", "x" * 300])
def test_a_state_whose_name_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    """A swap file has the name of its state, which the checkpoint says."""
    folder = saved(tmp_path, "z3")
    swap(folder)
    for rank in RANKS:

        def renamed(content: dict[str, Any]) -> None:
            for state in content["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
                state[name] = state.pop("exp_avg")

        rewrite(optimizer_of(folder, rank), renamed)
    with pytest.raises(UcpError, match=r"an optimizer state's swap file .* cannot be a file's name"):
        ucp.open(folder, tag=TAG)
