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


# What DeepSpeed 0.18.9's compute_elastic_config gives for (largest, sizes, version, larger first, ranks).
THEIRS = [
    ((13, [1, 2, 3], 0.1, True, 4), (12, 3, 1)),
    ((13, [1, 2, 3], 0.1, True, 3), (12, 2, 2)),
    ((2000, [2, 4, 6], 0.1, True, 8), (1680, 6, 35)),
    ((2000, [2, 4, 6], 0.1, False, 8), (1680, 6, 35)),
    ((100, [5, 7], 0.2, True, 9), (90, 5, 2)),
    ((100, [5, 7], 0.2, False, 9), (63, 7, 1)),
]


def section(largest: int, sizes: list[int], version: float, larger: bool, **more: Any) -> dict[str, Any]:
    said = {"max_train_batch_size": largest, "micro_batch_sizes": sizes, "version": version, **more}
    return {"elasticity": {"enabled": True, "prefer_larger_batch": larger, **said}, "ucp": {"enabled": True}}


@pytest.mark.parametrize(("given", "wanted"), THEIRS)
def test_deepspeeds_section_is_obeyed(given: tuple[int, list[int], float, bool, int], wanted: tuple[int, ...]) -> None:
    *said, world = given
    asked = section(*said)  # type: ignore[arg-type]
    found = fitted(asked, world)
    assert found is not None
    assert (found.batch, found.micro, found.accumulation) == wanted
    made = adapted(asked, world)
    assert "elasticity" not in made
    assert made["train_batch_size"] == wanted[0]


def test_what_deepspeeds_section_does_not_allow_is_refused() -> None:
    with pytest.raises(BadArgument, match=r"^5 ranks are none of those .* batch of 12: 1, 2, 3, 4, 6, 12$"):
        fitted(section(13, [1, 2, 3], 0.1, True), 5)
    with pytest.raises(BadArgument, match=r'the config has "train_batch_size" as well; .* "ignore_non_elastic'):
        fitted({**section(13, [1], 0.1, True), "train_batch_size": 4}, 2)
    with pytest.raises(BadArgument, match=r"whole numbers above 0, found \[0\]"):
        fitted(section(13, [0], 0.1, True), 2)
    with pytest.raises(BadArgument, match="micro-batch 14 is larger than a batch of 13"):
        fitted(section(13, [14], 0.1, True), 2)
    with pytest.raises(BadArgument, match=r"without model parallelism is understood, found 0\.3"):
        fitted(section(13, [1], 0.3, True), 2)


@pytest.mark.parametrize(
    ("elastic", "more", "text"),
    [
        ({}, {"train_batch_size": 0}, r'"train_batch_size" is a whole number from 1 to \d+, found 0'),
        ({}, {"train_batch_size": -4}, '"train_batch_size" .* found -4'),
        ({}, {"train_batch_size": True}, '"train_batch_size" .* found True'),
        ({}, {"train_batch_size": 10**18}, '"train_batch_size" .* found 10+'),
        ({}, {"train_micro_batch_size_per_gpu": 0}, '"train_micro_batch_size_per_gpu" .* found 0'),
        ({"micro": [2, 0]}, {}, '"micro" is a whole number from 1 .* found 0'),
        ({"micro": 3}, {}, '"micro" needs a list, found 3'),
        ({"min": "2"}, {}, "\"min\" .* found '2'"),
        ({"min": 5, "micro": [1]}, {}, r'4 ranks cannot go on .*: "min" is 5; .* do: 6, 12$'),
        ({"layouts": [4]}, {}, "an elastic layout is text .* found 4"),
        ({"layouts": ["dp=4,zero=1", "dp=4,zero=3"]}, {}, "two elastic layouts are for 4 ranks; .* 'dp=4,zero=3'"),
        ({"layuots": []}, {}, "\"elastic\" is an object with layouts, .* found 'layuots'"),
        ([4], {}, r'"elastic" is an object with .* found '),
    ],
)
def test_what_no_elastic_section_can_say(elastic: Any, more: dict[str, Any], text: str) -> None:
    with pytest.raises(BadArgument, match=text):
        fitted({**config(elastic), **more}, 4)


def test_a_refusal_of_a_huge_batch_is_short_and_quick() -> None:
    for uneven in (False, True):
        given = config({"micro": [1], "uneven": uneven, "min": 8}, train_batch_size=2**31 - 1)
        with pytest.raises(BadArgument, match=r"would do \(of those up to 128\): ") as caught:
            fitted(given, 7)
        assert len(str(caught.value)) < 1000
