"""Global batches that no micro-batch divides: every sample counts once, and alike, on any number of ranks."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests.elastic import uneven_jobs
from tests.engines.pool import RankPool
from ucp.elastic.layouts import Fitted, adapted, fitted
from ucp.errors import BadArgument
from ucp.job.data_order import GlobalBatches, GlobalOrder
from ucp.job.streams import per_sample

UNEVEN = {"train_batch_size": 10, "ucp": {"enabled": True, "elastic": {"micro": [1, 2], "uneven": True}}}


@pytest.mark.parametrize("world", range(1, 11))
@pytest.mark.parametrize("batch", [10, 37])
def test_every_sample_has_one_place(world: int, batch: int) -> None:
    what = fitted({**UNEVEN, "train_batch_size": batch}, world)
    assert what is not None
    cells = list(itertools.chain.from_iterable(what.counts(k) for k in range(what.accumulation)))
    assert (sum(cells), what.batch) == (batch, batch)
    assert 1 <= min(cells) <= max(cells) <= what.micro <= 2
    assert max(cells) - min(cells) <= 1
    assert sum(what.weight(count) for count in cells) == pytest.approx(world * what.accumulation)
    assert what.is_uneven == (batch % (world * what.accumulation) != 0)


def test_the_config_that_deepspeed_gets() -> None:
    made = adapted(UNEVEN, 3)
    wanted = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    assert {key: made[key] for key in wanted} == wanted
    assert fitted(UNEVEN, 3) == Fitted(3, 0, 2, 2, 10)
    assert not fitted(UNEVEN, 5).is_uneven  # type: ignore[union-attr]
    with pytest.raises(BadArgument, match=r"11 ranks .* not a sample for each of them; .* do: 1, 2, 3, .* 10$"):
        fitted(UNEVEN, 11)


def test_batches_that_are_alike_are_the_global_order() -> None:
    for rank in range(3):
        order = iter(GlobalOrder(20, 2, rank=rank, world=3, seen=8, seed=4))
        batches = iter(GlobalBatches(20, lambda k: (2, 2, 2), rank=rank, seen=8, seed=4))
        for _ in range(9):
            assert next(batches) == [next(order), next(order)]
    with pytest.raises(BadArgument, match="rank 3 of 3"):
        GlobalBatches(20, lambda k: (2, 2, 2), rank=3)


@pytest.mark.slow
def test_the_same_steps_on_any_number_of_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """One rank, whose micro-batches are all full, beside 3 and then 4, whose are not."""
    for name in ("one", "more"):
        (tmp_path / name).mkdir()
    at = 0
    for world in (3, 4):
        plain = ranks.run(uneven_jobs.steps, str(tmp_path / "one"), at, world_size=1)
        found = ranks.run(uneven_jobs.steps, str(tmp_path / "more"), at, world_size=world)
        at += uneven_jobs.STEPS * uneven_jobs.BATCH
        assert found[0][0] == pytest.approx(plain[0][0], abs=5e-5)
        for step in range(uneven_jobs.STEPS):
            assert sorted(itertools.chain(*(one[2][step] for one in found))) == sorted(plain[0][2][step])
        for name, tensor in plain[0][1].items():
            torch.testing.assert_close(found[0][1][name], tensor, rtol=0, atol=1e-5)
        assert {one[3] for one in found} == {at}


@pytest.mark.slow
def test_random_numbers_that_belong_to_samples(ranks: RankPool) -> None:
    drawn = ranks.run(uneven_jobs.per_sample, False, "per_sample", world_size=1)[0]
    assert drawn == torch.rand(3, generator=per_sample(5, 0, 7, "crop")).tolist()
    with pytest.raises(Exception, match="BadArgument: '1' is a Dropout, whose masks depend on the number of ranks"):
        ranks.run(uneven_jobs.per_sample, True, "per_sample", world_size=1)
    with pytest.raises(Exception, match=r'BadArgument: .* the config needs .*"rng": "per_sample"'):
        ranks.run(uneven_jobs.per_sample, False, "per_rank", world_size=1)
