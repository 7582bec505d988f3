"""The cases of a test that is dear in the fast part: some stay there, the others are marked slow."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow_but(quick: Container[Any], cases: Iterable[Any]) -> list[Any]:
    """``cases`` for parametrize, all marked slow but those in ``quick``. A tuple has a value for each name."""
    out: list[Any] = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        out.append(case if case in quick else pytest.param(*values, marks=pytest.mark.slow))
    return out
