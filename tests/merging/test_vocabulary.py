"""Vocabularies of different widths are refused, or cut to the smallest one's rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ucp
from ucp.errors import BadArgument, Mismatch
from ucp.merging import merge


def saved(path: Path, rows: int, seed: int, head: int | None = None, hidden: int = 5) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    state = {
        "embed.weight": torch.randn(rows, hidden, generator=draw),
        "head.weight": torch.randn(head or rows, hidden, generator=draw),
        "norm.weight": torch.randn(5, generator=draw),
    }
    ucp.save({"model": state}, path)
    return state


def test_padded_rows_are_cut(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", 37, 0), saved(tmp_path / "b", 40, 1)
    with pytest.raises(Mismatch, match=r"\[37, 5\] .* \[40, 5\] .*vocab"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", vocab="cut")
    with ucp.open(tmp_path / "out") as merged:
        for name in a:
            rows = len(a[name])
            assert torch.equal(merged.read(name), ((a[name].double() + b[name][:rows].double()) / 2).float())
    # Whichever comes first, and where one source alone is taken.
    merge([tmp_path / "b", tmp_path / "a"], tmp_path / "other", vocab="cut", weights=(1, 0))
    with ucp.open(tmp_path / "other") as merged:
        assert torch.equal(merged.read("embed.weight"), b["embed.weight"][:37])
        merged.verify()


def test_other_differences_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a", 37, 0)
    saved(tmp_path / "b", 40, 1, head=41)
    saved(tmp_path / "c", 40, 2, hidden=6)
    with pytest.raises(Mismatch, match="a vocabulary is of one width"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", vocab="cut")
    with pytest.raises(Mismatch, match="no other width of a vocabulary"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "out", vocab="cut")
    with pytest.raises(BadArgument, match="found 'pad'"):
        merge([tmp_path / "a"], tmp_path / "out", vocab="pad")
    assert not (tmp_path / "out").exists()
