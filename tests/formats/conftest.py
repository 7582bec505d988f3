from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `tests.formats.foreign_programs.made_by` keeps what programs have written, for all tests of formats."""
    return tmp_path_factory.mktemp("foreign")
