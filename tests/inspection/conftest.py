"""Checkpoints to look at: of plain numpy, with a known truth, and native ones that DeepSpeed wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.formats import raw

OLDER = Path(__file__).resolve().parents[1] / "formats/deepspeed/older"


@pytest.fixture
def made(tmp_path: Path) -> raw.Raw:
    return raw.make(tmp_path / "raw", aliases={"embed.weight": ("head.weight",)})


@pytest.fixture
def consolidated(tmp_path: Path, made: raw.Raw) -> Path:
    return raw.write_consolidated(tmp_path / "whole", made.catalog)


@pytest.fixture
def virtual(tmp_path: Path, made: raw.Raw) -> Path:
    return raw.virtual_checkpoint(tmp_path / "virtual", made)


@pytest.fixture(params=["0.14.4-z0-bf16", "0.14.4-z1-bf16", "0.14.4-z2-fp32", "0.14.4-z3-fp32"])
def native(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A real checkpoint's folder (of tags) that a test may damage."""
    return Path(shutil.copytree(OLDER / request.param, tmp_path / "native"))
