"""``allow_missing`` and ``allow_unused``: what refusals advise is tried, and what matches nothing is told."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ucp
from tests.saving.parts import FakeTarget, Saved, catalog, group, slot, target
from ucp.deepspeed.live import WORDS
from ucp.errors import Mismatch
from ucp.loading.match import plan
from ucp.loading.nouns import Wish
from ucp.loading.patterns import unmatched
from ucp.megatron.target import ShardedWords

MOMENTUM = ("momentum_buffer",)


def engine(*names: str, expects: tuple[str, ...] | None = None) -> FakeTarget:
    groups = None if expects is None else [group(*names, expects=expects)]
    return replace(target(slot(0, dict.fromkeys(names, (2, 3))), groups=groups), words=WORDS)


@pytest.mark.parametrize(
    ("saved", "here", "advised"),
    [
        (("a",), engine("a", "b"), {"allow_missing": ["b"]}),
        (("a", "b"), engine("a"), {"allow_unused": ["b"]}),
        (("a", "c[0]*"), engine("a", "b"), {"allow_missing": ["b"], "allow_unused": ["c[[]0][*]"]}),
        (("a",), engine("a", expects=MOMENTUM), {"allow_missing": ["a:momentum_buffer"]}),
        (("a", "b"), engine("a", "b", expects=MOMENTUM), {"allow_missing": ["*:momentum_buffer"]}),
    ],
    ids=["added", "removed", "odd name", "other optimizer", "of several"],
)
def test_an_engines_refusal_advises_what_would_load(
    saved: tuple[str, ...], here: FakeTarget, advised: dict[str, list[str]]
) -> None:
    found = catalog({name: Saved() for name in saved})
    with pytest.raises(Mismatch) as refused:
        plan(found, here, Wish())
    said = re.search(r'to load all the same: ("ucp": .*?}})', str(refused.value))
    assert said, refused.value
    section = json.loads(f"{{{said[1]}}}")["ucp"]["load"]
    assert {key: section[key] for key in advised} == advised
    plan(found, here, Wish(**{key: tuple(patterns) for key, patterns in section.items()}))


def test_long_advice_is_cut() -> None:
    with pytest.raises(Mismatch, match=r'"allow_missing": \["n0", "n1", "n2", \.\.\.\]}'):
        plan(catalog({"a": Saved()}), engine("a", *(f"n{i}" for i in range(5))), Wish())
    with pytest.raises(Mismatch, match=r'to load all the same: allow_unused=\["b"\]'):
        plan(catalog({"a": Saved(), "b": Saved()}), replace(engine("a"), words=ShardedWords("it", "")), Wish())


@pytest.mark.parametrize("pattern", ["a", "a*", "*", "*:*", "*:exp_avg", "[ab]:exp_*", "a:step"])
def test_patterns_that_match_are_not_told_of(pattern: str) -> None:
    saved = catalog({"a": Saved()})
    assert unmatched(saved, engine("a"), Wish(allow_missing=(pattern,), allow_unused=(pattern,))) == []


def test_patterns_that_match_nothing_are_one_warning() -> None:
    saved = catalog({"a": Saved(), "old": Saved()})
    wish = Wish(allow_missing=("adaptor.*", "a", "old", "*:exp_agv"), allow_unused=("odl", "old"))
    assert unmatched(saved, engine("a"), wish) == [
        "no name here matches 'adaptor.*' and 'old' and '*:exp_agv' of allow_missing; "
        "no name in the checkpoint matches 'odl' of allow_unused"
    ]
    # What other ranks have counts, too, and so do states that nobody knows beforehand.
    elsewhere = replace(engine("a"), elsewhere={"adaptor.x": "parameter"})
    assert unmatched(saved, elsewhere, Wish(allow_missing=("adaptor.*",))) == []
    unknown = replace(engine("a"), groups=[group("a", expects=None)])
    assert unmatched(saved, unknown, Wish(allow_missing=("*:exp_agv",))) == []
    # A catalog that was changed as declared has no longer all names of what lies on disk.
    assert unmatched(saved, engine("a"), Wish(allow_unused=("odl",)), is_changed=True) == []


def test_a_load_warns_of_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(2, 2)
    ucp.save_training(tmp_path / "saved", model=model, step=1)
    ucp.load_training(tmp_path / "saved", model=model, allow_missing=["wieght"], allow_unused=["old.*"])
    told = [r.getMessage() for r in caplog.records if "matches" in r.getMessage()]
    assert told == [
        f"{tmp_path / 'saved'}: no name here matches 'wieght' of allow_missing; "
        "no name in the checkpoint matches 'old.*' of allow_unused"
    ]
    caplog.clear()
    state = {"model": {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}}
    for pattern in ("model.weight", "weight", "*"):
        ucp.load(state, tmp_path / "saved", allow_missing=[pattern])
    assert "matches" not in caplog.text
    ucp.load(state, tmp_path / "saved", allow_missing=["optim.*"])
    assert caplog.text.count("no name here matches 'optim.*' of allow_missing") == 1
