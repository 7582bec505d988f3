"""Experts that are listed, stacked by declaration: numbers that do not fit are refused before anything is listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from ucp.errors import UcpError

EXPERTS = 3
LISTED = "block.{i}.experts.{e}.w"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lists") / "saved"
    names = (f"block.{i}.experts.{e}.w" for i in range(2) for e in range(EXPERTS))
    ucp.save({"model": {name: torch.randn(4, 2) for name in names}}, folder)
    return folder


def stacked(experts: object) -> dict[str, Any]:
    line = {"from": [LISTED], "stack": {"e": "experts"}, "as": "experts rows columns"}
    sizes = {"experts": experts, "rows": 4, "columns": 2}
    return {"sizes": sizes, "parameters": {LISTED: "rows columns"}, "names": {"block.{i}.stack": line}}


def test_lists_become_stacks_and_lists_again(source: Path, tmp_path: Path) -> None:
    ucp.convert(source, tmp_path / "stacked", changes=stacked(EXPERTS))
    back = {
        "sizes": {"experts": EXPERTS, "rows": 4, "columns": 2},
        "parameters": {"block.{i}.stack": "experts rows columns"},
        "names": {"block.{i}.stack": {"to": [LISTED], "stack": {"e": "experts"}}},
    }
    ucp.convert(tmp_path / "stacked", tmp_path / "listed", changes=back)
    with ucp.open(source) as one, ucp.open(tmp_path / "stacked") as stack, ucp.open(tmp_path / "listed") as other:
        assert one.parameters.keys() == other.parameters.keys()
        for name in one.parameters:
            i, e = name.split(".")[1:4:2]
            assert torch.equal(one.read(name), other.read(name))
            assert torch.equal(one.read(name), stack.read(f"block.{i}.stack")[int(e)])


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        (0, "would be made of 0 parameters in a stack, since experts is 0; it is from 1 to 65536"),
        (10**12, "would be made of 1000000000000 parameters in a stack"),
        (10**40, "sizes|parameters"),
        (-1, "a size is a whole number from 0"),
        (2, "is none of the 2 that make 'block.0.stack'"),
        (4, r"is made of 4 parameters by changes, and 1 of them are not there, such as 'block.0.experts.3.w'"),
        (2.5, "number"),
    ],
)
def test_numbers_that_do_not_fit(source: Path, tmp_path: Path, experts: object, words: str) -> None:
    with pytest.raises(UcpError, match=words):
        ucp.convert(source, tmp_path / "out", changes=stacked(experts))
    assert not (tmp_path / "out").exists()
