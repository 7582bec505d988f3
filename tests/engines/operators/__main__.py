"""``python -m tests.engines.operators``: builds what is missing; 1 where something could not be built."""

from __future__ import annotations

import sys

from tests.engines.operators import build

sys.exit(0 if build() else 1)
