"""``python -m tests.engines.async_io FOLDER`` builds the operator there."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.engines.async_io import build

build(Path(sys.argv[1]))
