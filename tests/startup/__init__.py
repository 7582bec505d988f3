"""What the programs that tests start import first (`sitecustomize`)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent


def search_path(further: Iterable[str | Path | None]) -> str:
    """A PYTHONPATH with this folder first."""
    return os.pathsep.join(map(str, filter(None, (FOLDER, *further))))
