"""Quantised states that do not fit together are refused by name: no number of theirs is believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from ucp.errors import DamagedCheckpoint, UcpError, Unsupported

COUNT = 700  # elements: three of bitsandbytes' blocks of 256
CODES = "'optim.state.w.state1'"


def saved(folder: Path, **damage: torch.Tensor | None) -> Path:
    """A parameter of which bitsandbytes' AdamW8bit keeps codes, in a run's checkpoint."""
    state: dict[str, Any] = {"step": torch.tensor(3.0)}
    for number, least in ((1, -1.0), (2, 0.0)):
        generator = torch.Generator().manual_seed(number)
        state[f"state{number}"] = torch.randint(256, (COUNT,), dtype=torch.uint8, generator=generator)
        state[f"qmap{number}"] = torch.linspace(least, 1, 256)
        state[f"absmax{number}"] = torch.arange(1.0, 4.0)
    state |= damage
    state = {key: value for key, value in state.items() if value is not None}
    ucp.save({"model": {"w": torch.ones(COUNT)}, "optim": {"state": {"w": state}}}, folder)
    return folder


def test_what_fits_is_what_the_codes_stand_for(tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved")
    ucp.convert(folder, tmp_path / "out", changes={"states": "dequantised"})
    with ucp.open(folder) as before, ucp.open(tmp_path / "out") as after:
        codes, qmap = (before.read(f"optim.state.w.{name}") for name in ("state1", "qmap1"))
        absmax = before.read("optim.state.w.absmax1").repeat_interleave(256)[:COUNT]
        assert torch.equal(after.read("w", "exp_avg"), qmap[codes.int()] * absmax)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        ({"absmax1": torch.ones(2)}, DamagedCheckpoint, f"{CODES} has 700 elements in blocks of 256, and 2 scales"),
        ({"absmax1": torch.ones(700)}, DamagedCheckpoint, f"{CODES} has 700 elements in blocks of 256, and 700 scales"),
        ({"absmax1": torch.ones(0)}, DamagedCheckpoint, "0 scales; they do not belong together"),
        ({"absmax1": torch.ones(3, dtype=torch.float64)}, DamagedCheckpoint, "do not belong together"),
        ({"qmap1": torch.ones(256, dtype=torch.float64)}, DamagedCheckpoint, "do not belong together"),
        ({"absmax1": None}, Unsupported, f"{CODES} lacks its map or its scales"),
        ({"qmap1": None}, Unsupported, f"{CODES} lacks its map or its scales"),
        ({"qmap1": torch.ones(255)}, Unsupported, r"a map of \[255\]"),
        ({"qmap1": torch.ones(16)}, Unsupported, r"a map of \[16\]"),
        ({"state1": torch.zeros(699, dtype=torch.uint8)}, Unsupported, r"is uint8 \[699\]"),
        ({"state1": torch.zeros(COUNT, dtype=torch.int64)}, Unsupported, r"is int64 \[700\]"),
        ({"state2": None}, Unsupported, "so its optimizer is not Adam"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, damage: dict[str, torch.Tensor | None], error: type[UcpError], words: str
) -> None:
    folder = saved(tmp_path / "saved", **damage)
    with pytest.raises(error, match=words):
        ucp.convert(folder, tmp_path / "out", changes={"states": "dequantised"})
    assert not (tmp_path / "out").exists()
