"""Layers of one shape get their own states back, in whatever order they are registered and optimized now.

Files of stage 0 in fp32 name no parameters of the optimizer, and nothing but an order tells layers alike apart.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import ucp
from tests.deepspeed import order_jobs as jobs
from tests.engines import releases
from tests.engines.pool import RankPool
from ucp.errors import Unsupported

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (3, "bf16")])
def test_states_follow_their_parameters(ranks: RankPool, tmp_path: Path, stage: int, dtype: str) -> None:
    found = ranks.run(jobs.resumed, stage, dtype, str(tmp_path), world_size=1)[0]
    releases.skip_lacking(found["same"][1])
    plain, ordered = found[""][0], found["sorted"][0]
    assert found["same"] == (plain, "")
    assert found["registered otherwise"] == (plain, "")
    assert found["sorted on both sides"] == (ordered, "")
    if (stage, dtype) != (0, "fp32"):
        assert found["sorted before"] == (ordered, "")
        return
    # The weights' shapes show that the optimizer's order was not the module's, and nothing tells which it was.
    assert "does not name the optimizer's parameters" in found["sorted before"][1]
    ucp.convert(tmp_path / "plain", tmp_path / "converted")
    with pytest.raises(Unsupported, match="does not name the optimizer's parameters"):
        ucp.convert(tmp_path / "sorted", tmp_path / "refused")
    names = [f"{layer}.{kind}" for layer in "abc" for kind in ("bias", "weight")]
    ucp.convert(tmp_path / "sorted", tmp_path / "told", param_names=[names])
