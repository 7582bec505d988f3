"""What a load does for each of thousands of small tensors, counted: calls of Python functions, and reads."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from ucp import limits

# It was 130 before copies, digests and what is asked for were columns, and 21 before most of the plan was.
CALLS = 16


def weights(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    shapes = [(1024,), (32, 32), (1000,)]
    return {f"layers.{k}.weight": torch.randn(shapes[k % 3], generator=generator) for k in range(count)}


def counted(work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often functions of the package were called in this thread, and how often files were read in any."""
    found: Counter[str] = Counter()
    package = str(Path(ucp.__file__).parent)
    real = os.preadv

    def seen(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            found["calls"] += 1

    def read(*arguments: Any) -> int:
        found["reads"] += 1
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", read)
        sys.setprofile(seen)
        try:
            work()
        finally:
            sys.setprofile(None)
    return found


@pytest.mark.parametrize("held", [True, False])
def test_little_is_done_for_each_of_thousands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool) -> None:
    if not held:
        monkeypatch.setattr(limits, "HELD_ANYWAY_BYTES", 0)
        monkeypatch.setattr("ucp.loading.strategy.choose", lambda every: ucp.loading.strategy.VERIFY_THEN_READ)
    found = {}
    for count in (600, 2400):
        values = weights(count)
        ucp.save({"model": values}, tmp_path / str(count))
        state = {"model": {name: torch.zeros_like(value) for name, value in values.items()}}
        found[count] = counted(lambda path=tmp_path / str(count), into=state: ucp.load(into, path), monkeypatch)
        assert all(torch.equal(state["model"][name], value) for name, value in values.items())
    each = {what: (found[2400][what] - found[600][what]) / 1800 for what in ("calls", "reads")}
    assert each["calls"] <= CALLS, each
    assert each["reads"] <= 0.1, each
