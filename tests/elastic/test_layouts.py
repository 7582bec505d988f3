"""The layout and the batches for the ranks that there are."""

from __future__ import annotations

from typing import Any

import pytest

from ucp.elastic.layouts import Fitted, adapted, fitted
from ucp.errors import BadArgument


def config(elastic: Any, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": 1},
        "ucp": {"enabled": True, "elastic": elastic},
        **more,
    }


@pytest.mark.parametrize(
    ("world", "wanted"),
    [(4, (3, 1)), (3, (2, 2)), (2, (3, 2)), (1, (3, 4)), (6, (2, 1)), (12, (1, 1))],
)
def test_the_global_batch_is_kept(world: int, wanted: tuple[int, int]) -> None:
    found = fitted(config({"micro": [1, 2]}), world)
    assert found == Fitted(world, 1, *wanted)
    assert found.batch == 12


def test_layouts_choose_the_stage_and_the_config_is_not_touched() -> None:
    given = config({"layouts": ["dp=4,zero=1", "dp=2,zero=3", "dp=1"], "micro": [1]})
    made = adapted(given, 2)
    assert made["zero_optimization"] == {"stage": 3}
    assert (made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (3, 2)
    assert given["zero_optimization"] == {"stage": 1}
    assert fitted(given, 1) == Fitted(1, 1, 3, 4)
    with pytest.raises(BadArgument, match=r"^3 ranks cannot go on .* no layout has as many ranks; .* do: 1, 2, 4$"):
        fitted(given, 3)


@pytest.mark.parametrize("world", [5, 7, 8])
def test_what_does_not_divide_is_refused_with_what_would(world: int) -> None:
    with pytest.raises(BadArgument, match=r"global batch of 12: no micro-batch divides it; .* do: 1, 2, 3, 4, 6, 12$"):
        fitted(config({"micro": [1]}), world)


def test_what_is_not_elastic_stays() -> None:
    given = config(None)
    assert adapted(given, 5) is given
    deepspeed = config({"micro": [1]}, elasticity={"enabled": True})
    assert adapted(deepspeed, 5) is deepspeed
    with pytest.raises(BadArgument, match='needs "train_batch_size"'):
        fitted({"ucp": {"elastic": {}}}, 2)
