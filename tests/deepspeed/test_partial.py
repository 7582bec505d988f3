"""Partial offload (``offload_optimizer.ratio``): two optimizers step the subgroups, and both have states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.deepspeed import partial_jobs
from tests.engines import load_jobs, operators
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.engines.runs import STEPS
from tests.engines.sources import Sources
from tests.engines.truth import known

pytestmark = pytest.mark.slow(seconds=20)

HALF = (("offload_optimizer", {"device": "cpu", "ratio": 0.5}),)
PARTIAL = Case(stage=3, dp=2, optimizer="cpu_adam", sub_group_size=300, zero=HALF)


def test_states_of_both_optimizers(ranks: RankPool, sources: Sources, tmp_path: Path) -> None:
    if not operators.are_built("cpu_adam"):
        pytest.skip("DeepSpeed's CPUAdam is not built")
    truth, counts, losses = ranks.run(partial_jobs.save, PARTIAL, str(tmp_path), world_size=2)[0]
    assert min(counts) >= 1
    assert {name.rpartition(":")[2] for name in truth} == {"param", "exp_avg", "exp_avg_sq"}

    def same(found: dict[str, torch.Tensor]) -> bool:
        return found.keys() == truth.keys() and all(torch.equal(found[key], truth[key]) for key in truth)

    found, again, further = ranks.run(partial_jobs.resume, PARTIAL.but(seed=5), str(tmp_path / "ours"), world_size=2)[0]
    assert same(found)
    assert again == counts
    assert further == pytest.approx(losses, abs=1e-6)
    # on other ranks, and from and into engines of one optimizer
    found, again, further = ranks.run(
        partial_jobs.resume, PARTIAL.but(seed=5, dp=1), str(tmp_path / "ours"), world_size=1
    )[0]
    assert same(found)
    plain = ranks.run(load_jobs.resume, Case(stage=1, dp=2, seed=5), str(tmp_path / "ours"), None, STEPS, world_size=2)[
        0
    ]
    params = known(plain.truth).params
    assert same({f"{name}:{state}": tensor for name, states in params.items() for state, tensor in states.items()})
    run = sources.get(Case(stage=1, dp=2))
    found, _, further = ranks.run(partial_jobs.resume, PARTIAL.but(seed=5), run.folder, world_size=2)[0]
    states = {f"{n}:{s}": t for n, held in known(run.truth).params.items() for s, t in held.items()}
    assert found.keys() == states.keys()
    assert all(torch.equal(found[key], states[key]) for key in states)
    assert further == pytest.approx(run.further, abs=5e-5)
    # DeepSpeed's own save has the first optimizer's states alone
    said = ranks.run(partial_jobs.resume, PARTIAL.but(seed=5), str(tmp_path / "theirs"), world_size=2)[0]
    assert "exp_avg" in said
