"""Folders that Megatron-Core wrote, and their tensors as its own loader reads them: fixtures for the tests' rooms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.engines.megatron import written as runs
from tests.engines.megatron.launch import by_name


@pytest.fixture(scope="session")
def written(kept: Path) -> Path:
    """The folder of `tests.engines.megatron.written`."""
    return runs.folder(kept)


@pytest.fixture(scope="session")
def truths(written: Path) -> Mapping[str, Mapping[tuple[str, str], torch.Tensor]]:
    return {name: by_name(written / f"{name}.pt") for name in runs.WRITTEN}
