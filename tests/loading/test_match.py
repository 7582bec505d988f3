"""A plan is complete, or one refusal that lists all that does not fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.saving.parts import ADAM, FakeTarget, Saved, catalog, group, slot, target
from ucp.catalog import Catalog, ParamGroup
from ucp.errors import Mismatch
from ucp.loading.match import plan
from ucp.loading.nouns import LoadPlan, Wish

SHAPE = (2, 3)


def two() -> Catalog:
    return catalog({"a": Saved(), "b": Saved((5,)), "frozen": Saved(kind="frozen"), "seen": Saved((), "buffer")})


def live(*more: str, without: Sequence[str] = ()) -> FakeTarget:
    members = {n: s for n, s in {"a": SHAPE, "b": (5,), **dict.fromkeys(more, SHAPE)}.items() if n not in without}
    outside = [slot(1, {"frozen": SHAPE}, "frozen"), slot(2, {"seen": ()}, "buffer")]
    return target(slot(0, members), *(s for s in outside if s.members[0].name not in without))


def refusal(saved: Catalog, at: FakeTarget, wish: Wish | None = None) -> str:
    with pytest.raises(Mismatch) as caught:
        plan(saved, at, wish or Wish())
    text = str(caught.value)
    assert text.startswith("nothing was loaded: the checkpoint (dp=2,zero=1) and the engine (dp=1,zero=3) do not match")
    return text


def wanted(found: LoadPlan) -> dict[tuple[int, str], list[str]]:
    return {(key, state): [w.tensor.name for w in wants] for (key, state, _), wants in found.wants.items()}


def test_everything_is_wanted_once() -> None:
    found = plan(two(), live(), Wish())
    assert wanted(found) == {
        (0, "param"): ["a", "b"],
        (0, "exp_avg"): ["a", "b"],
        (0, "exp_avg_sq"): ["a", "b"],
        (1, "param"): ["frozen"],
        (2, "param"): ["seen"],
    }
    assert found.scalars == {0: {"step": 4.0}}
    assert found.options == {0: {"lr": 0.1, "weight_decay": 0.0}}
    assert found.sources == {0: 0}
    assert (found.left, found.unused, found.rounded, found.notes) == ((), (), (), ())


def test_weights_only_wants_no_state_and_no_hyperparameter() -> None:
    for wish in (Wish(weights_only=True), Wish(optimizer=False)):
        found = plan(two(), live(), wish)
        assert {state for _, state in wanted(found)} == {"param"}
        assert (found.scalars, found.options, found.sources) == ({}, {}, {})


def test_missing_parameters_and_buffers_are_listed_with_their_shapes() -> None:
    saved = catalog({"a": Saved(), "b": Saved((5,))})
    text = refusal(saved, live("c"))
    assert "3 would stay unrestored: parameter 'c' [2, 3], parameter 'frozen' [2, 3], buffer 'seen' []" in text
    assert "allow_missing" in text


def test_unused_parameters_and_buffers_are_listed_with_their_shapes() -> None:
    text = refusal(two(), live(without=("b", "seen")))
    assert "2 of the checkpoint would stay unused: parameter 'b' [5], buffer 'seen' []" in text


def test_one_refusal_lists_every_kind_of_misfit() -> None:
    saved = catalog({"a": Saved((3, 2)), "b": Saved((5,)), "d": Saved()})
    text = refusal(saved, target(slot(0, {"a": SHAPE, "b": (5,), "c": SHAPE})))
    assert "1 does not fit: parameter 'a' [2, 3] has shape [3, 2] in the checkpoint" in text
    assert "parameter 'c' [2, 3]" in text
    assert "parameter 'd' [2, 3]" in text


def test_a_long_list_is_cut_and_counted() -> None:
    text = refusal(catalog({"a": Saved()}), target(slot(0, {"a": SHAPE, **{f"n{i}": SHAPE for i in range(30)}})))
    assert "30 would stay unrestored" in text
    assert "'n4' [2, 3], and 25 more" in text


@pytest.mark.parametrize("pattern", ["c", "*", "[c]"])
def test_allowed_missing_ones_are_left_as_they_are(pattern: str) -> None:
    found = plan(two(), live("c"), Wish(allow_missing=(pattern,)))
    assert found.left == ("c",)
    assert wanted(found)[0, "param"] == ["a", "b"]


def test_allowed_unused_ones_are_not_read() -> None:
    found = plan(two(), live(without=("b", "seen")), Wish(allow_unused=("b", "s*")))
    assert found.unused == ("b", "seen")
    assert wanted(found)[0, "param"] == ["a"]


def test_not_strict_allows_missing_and_unused_names_but_no_other_shape() -> None:
    found = plan(two(), live("c", without=("b",)), Wish(strict=False))
    assert (found.left, found.unused) == (("c",), ("b",))
    with pytest.raises(Mismatch, match="has shape"):
        plan(catalog({"a": Saved((7,))}), target(slot(0, {"a": SHAPE})), Wish(strict=False))


def test_not_strict_is_no_leave_to_train_from_scratch() -> None:
    none = target(slot(0, {"x": SHAPE, "y": SHAPE}))
    text = refusal(two(), none, Wish(strict=False))
    assert "none of the 2 parameters trained here ('x', …) is in the checkpoint" in text
    for wish in (Wish(strict=False, weights_only=True), Wish(strict=False, optimizer=False)):
        assert plan(two(), none, wish).left == ("x", "y")
    assert plan(two(), none, Wish(strict=False, allow_missing=("x", "y"))).left == ("x", "y")


def test_a_pattern_for_another_name_allows_nothing() -> None:
    refusal(two(), live("c"), Wish(allow_missing=("a", "b", "cc"), allow_unused=("c",)))


def states(*names: str, **more: Any) -> Catalog:
    return catalog({"a": Saved(states=names, **more)})


def test_states_of_another_optimizer_are_refused_by_name_in_both_directions() -> None:
    text = refusal(states("momentum_buffer", step=None), target(slot(0, {"a": SHAPE})))
    assert "2 would stay unrestored: optimizer state 'exp_avg' of 'a' [2, 3], optimizer state 'exp_avg_sq' of" in text
    assert "1 of the checkpoint would stay unused: optimizer state 'momentum_buffer' of 'a' [2, 3]" in text


def test_states_are_listed_by_name_with_some_of_their_parameters() -> None:
    shapes = {f"p{i}": (i,) for i in range(1, 6)}
    saved = catalog({n: Saved(s, states=()) for n, s in shapes.items()})
    text = refusal(saved, target(slot(0, shapes)))
    assert "10 would stay unrestored: optimizer state 'exp_avg' of 'p1' [1], 'p2' [2] and 3 more, " in text


def test_allowed_states_stay_and_others_go_unused() -> None:
    wish = Wish(allow_missing=("a:exp_avg_sq",), allow_unused=("*:momentum_buffer",))
    found = plan(states("exp_avg", "momentum_buffer"), target(slot(0, {"a": SHAPE})), wish)
    # exp_avg_sq is made of what there is: nothing is read for it.
    assert wanted(found) == {(0, "param"): ["a"], (0, "exp_avg"): ["a"], (0, "exp_avg_sq"): []}
    assert found.left == ("a:exp_avg_sq",)
    assert found.unused == ("a:momentum_buffer",)
    refusal(states("exp_avg", "momentum_buffer"), target(slot(0, {"a": SHAPE})), Wish(allow_missing=("a:exp_avg_sq",)))
    refusal(states("exp_avg"), target(slot(0, {"a": SHAPE})), Wish(allow_missing=("b:exp_avg_sq",)))


def test_an_optimizer_of_unknown_states_gets_all_of_them_and_that_is_said() -> None:
    found = plan(states("odd_state"), target(slot(0, {"a": SHAPE}), groups=[group("a", expects=None)]), Wish())
    assert (0, "odd_state") in wanted(found)
    assert any("odd_state" in note for note in found.notes)


def test_a_slot_of_which_no_state_is_brought_keeps_all_of_its_own() -> None:
    wish = Wish(allow_missing=("*:exp_avg*",), allow_unused=("*:momentum_buffer",))
    found = plan(states("momentum_buffer", step=None), target(slot(0, {"a": SHAPE})), wish)
    assert wanted(found) == {(0, "param"): ["a"]}
    assert found.scalars == {}


def test_a_parameter_that_was_frozen_may_start_without_states() -> None:
    saved = catalog({"a": Saved(), "b": Saved(kind="frozen")})
    found = plan(saved, target(slot(0, {"a": SHAPE, "b": SHAPE})), Wish(allow_missing=("b:*",)))
    assert wanted(found) == {(0, "param"): ["a", "b"], (0, "exp_avg"): ["a"], (0, "exp_avg_sq"): ["a"]}
    assert found.scalars == {0: {"step": 4.0}}
    assert found.left == ("b:exp_avg", "b:exp_avg_sq")


def test_values_that_the_optimizer_does_not_keep_are_not_given_to_it() -> None:
    at = target(slot(0, {"a": SHAPE}), groups=[group("a", expects=("exp_avg",), values=())])
    assert plan(states("exp_avg"), at, Wish()).scalars == {0: {}}


def test_a_missing_step_count_is_a_missing_state() -> None:
    at = target(slot(0, {"a": SHAPE}), groups=[group("a", values=("step",))])
    assert "optimizer state 'step' of 'a' [2, 3]" in refusal(states(*ADAM, step=None), at)
    assert plan(states(*ADAM, step=None), at, Wish(allow_missing=("a:step",))).scalars == {0: {}}


def test_an_optimizer_without_states_takes_a_checkpoint_without() -> None:
    found = plan(states(step=None), target(slot(0, {"a": SHAPE}), groups=[group("a", expects=())]), Wish())
    assert wanted(found) == {(0, "param"): ["a"]}


def test_no_states_are_legitimate_before_the_first_step_only() -> None:
    at = target(slot(0, {"a": SHAPE}))
    for steps, skipped in ((0, 0), (3, 3)):
        saved = catalog({"a": Saved(states=(), step=None)}, steps=steps, skipped=skipped)
        assert plan(saved, at, Wish()).scalars == {0: {}}
    refusal(catalog({"a": Saved(states=(), step=None)}, steps=4), at)
    refusal(catalog({"a": Saved(states=(), step=None)}, steps=4, skipped=3), at)
    refusal(catalog({"a": Saved(states=(), step=None)}, steps=None), at)


def test_one_buffer_has_one_step_count_and_one_set_of_states() -> None:
    saved = catalog({"a": Saved(step=4.0), "b": Saved(step=5.0)})
    assert "one flat buffer has one value" in refusal(saved, target(slot(0, {"a": SHAPE, "b": SHAPE})))
    found = plan(saved, target(slot(0, {"a": SHAPE}), slot(1, {"b": SHAPE}), groups=[group("a", "b")]), Wish())
    assert found.scalars == {0: {"step": 4.0}, 1: {"step": 5.0}}
    saved = catalog({"a": Saved(), "b": Saved(states=("exp_avg",))})
    text = refusal(saved, target(slot(0, {"a": SHAPE, "b": SHAPE})))
    assert "1 would stay unrestored: optimizer state 'exp_avg_sq' of 'b' [2, 3]" in text


def test_frozen_at_the_source_trained_here_and_back() -> None:
    saved = catalog({"a": Saved(), "b": Saved(kind="frozen")})
    text = refusal(saved, target(slot(0, {"a": SHAPE, "b": SHAPE})))
    assert "2 would stay unrestored: optimizer state 'exp_avg' of 'b' [2, 3]" in text
    text = refusal(saved, target(slot(0, {"b": SHAPE}), slot(1, {"a": SHAPE}, "frozen")))
    assert "optimizer state 'exp_avg' of 'a', which is not trained here" in text
    both = Wish(allow_missing=("b:*",), allow_unused=("a:*",))
    found = plan(saved, target(slot(0, {"b": SHAPE}), slot(1, {"a": SHAPE}, "frozen")), both)
    assert wanted(found) == {(0, "param"): ["b"], (1, "param"): ["a"]}


@pytest.mark.parametrize(("kept", "here"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32")])
def test_values_in_fewer_bits_are_taken_as_they_are(kept: str, here: str) -> None:
    saved = catalog({"a": Saved(dtype=kept, state_dtype=kept)})
    found = plan(saved, target(slot(0, {"a": SHAPE}, dtype=here)), Wish())
    assert {dtype for _, _, dtype in found.wants} == {here}


@pytest.mark.parametrize(("kept", "here"), [("float32", "bfloat16"), ("float16", "bfloat16"), ("bfloat16", "float16")])
def test_masters_and_states_are_never_rounded(kept: str, here: str) -> None:
    weights = catalog({"a": Saved(dtype=kept, state_dtype=here)})
    assert f"parameter 'a' [2, 3] is {kept} in the checkpoint and {here} here" in refusal(
        weights, target(slot(0, {"a": SHAPE}, dtype=here))
    )
    moments = catalog({"a": Saved(dtype=here, state_dtype=kept)})
    assert f"'exp_avg' of 'a' is {kept}" in refusal(moments, target(slot(0, {"a": SHAPE}, dtype=here)))


@pytest.mark.parametrize(("kept", "here"), [("int64", "int32"), ("float32", "int64"), ("int64", "float32")])
def test_buffers_and_frozen_weights_of_other_kinds_of_numbers_are_refused(kept: str, here: str) -> None:
    for kind in ("buffer", "frozen"):
        saved = catalog({"a": Saved(kind=kind, dtype=kept)})
        assert "which would lose bits" in refusal(saved, target(slot(0, {"a": SHAPE}, kind, dtype=here)))


def test_states_may_have_an_element_type_of_their_own() -> None:
    saved = catalog({"a": Saved(state_dtype="bfloat16")})
    kept = plan(saved, target(slot(0, {"a": SHAPE}, states=dict.fromkeys(ADAM, "bfloat16"))), Wish())
    assert {(state, dtype) for _, state, dtype in kept.wants} == {
        ("param", "float32"),
        ("exp_avg", "bfloat16"),
        ("exp_avg_sq", "bfloat16"),
    }


@pytest.mark.parametrize("kind", ["frozen", "buffer"])
def test_what_the_model_keeps_in_fewer_bits_is_rounded_and_named(kind: str) -> None:
    saved = catalog({"a": Saved(), "f": Saved(kind=kind)})
    found = plan(saved, target(slot(0, {"a": SHAPE}), slot(1, {"f": SHAPE}, kind, dtype="bfloat16")), Wish())
    assert found.rounded == ("f",)
    assert (1, "param", "float32") in found.wants


A = ParamGroup(("a",), {"lr": 0.1, "weight_decay": 0.0, "initial_lr": 0.5})
B = ParamGroup(("b",), {"lr": 0.2, "weight_decay": 0.0})


def pair(groups: Sequence[ParamGroup]) -> Catalog:
    return catalog({"a": Saved(), "b": Saved()}, groups)


def apart() -> tuple[Any, Any]:
    return slot(0, {"a": SHAPE}, group=0), slot(1, {"b": SHAPE}, group=1)


def test_groups_are_matched_by_names_not_by_index() -> None:
    found = plan(pair([B, A]), target(*apart(), groups=[group("a"), group("b")]), Wish())
    assert found.options == {
        0: {"lr": 0.1, "weight_decay": 0.0, "initial_lr": 0.5},
        1: {"lr": 0.2, "weight_decay": 0.0},
    }
    assert found.sources == {0: 1, 1: 0}


def test_a_split_group_gives_both_its_hyperparameters() -> None:
    found = plan(pair([ParamGroup(("a", "b"), {"lr": 0.3})]), target(*apart(), groups=[group("a"), group("b")]), Wish())
    assert found.options == {0: {"lr": 0.3}, 1: {"lr": 0.3}}
    assert found.sources == {0: 0, 1: 0}


def test_merged_groups_must_agree() -> None:
    text = refusal(pair([A, B]), target(slot(0, {"a": SHAPE, "b": SHAPE})))
    assert re.search(
        r"param group 0 here holds parameters of the checkpoint's groups 0 and 1, whose 'initial_lr'", text
    )
    agreeing = pair([ParamGroup(("a",), {"lr": 0.3}), ParamGroup(("b",), {"lr": 0.3})])
    found = plan(agreeing, target(slot(0, {"a": SHAPE, "b": SHAPE})), Wish())
    assert (found.options, found.sources) == ({0: {"lr": 0.3}}, {})


def test_how_an_optimizer_computes_stays_the_targets() -> None:
    own = {"foreach": True, "fused": True, "capturable": True, "differentiable": True, "name": "x", "step": 9}
    saved = catalog({"a": Saved()}, [ParamGroup(("a",), {"lr": 0.3, **own, "unheard_of": 1})])
    found = plan(saved, target(slot(0, {"a": SHAPE}), groups=[group("a", foreach=False, fused=None)]), Wish())
    assert found.options == {0: {"lr": 0.3}}
    assert found.notes == ("param group 0: the optimizer here has no 'step', 'unheard_of', so that stays unused",)


def test_a_group_of_an_unknown_optimizer_is_given_what_it_had() -> None:
    """Such as a step count that the optimizer puts into its group in its first step."""
    counted = torch.tensor([1.0, 2.0])
    saved = catalog({"a": Saved()}, [ParamGroup(("a",), {"lr": 0.3, "foreach": True, "step": 9, "counted": counted})])
    own = replace(group("a"), takes=None)
    found = plan(saved, target(slot(0, {"a": SHAPE}), groups=[own]), Wish())
    assert found.notes == ()
    options = dict(found.options[0])
    assert torch.equal(options.pop("counted"), counted)
    assert options == {"lr": 0.3, "step": 9}


def test_groups_without_recorded_hyperparameters_keep_their_own_and_say_so() -> None:
    found = plan(catalog({"a": Saved()}, [ParamGroup(("a",), None)]), target(slot(0, {"a": SHAPE})), Wish())
    assert found.options == {}
    assert any("keeps its own hyperparameters" in note for note in found.notes)


def test_tied_here_but_not_in_the_checkpoint_and_back() -> None:
    untied = catalog({"embed": Saved(), "head": Saved()})
    assert "parameter 'head' [2, 3]" in refusal(untied, target(slot(0, {"embed": SHAPE})))
    tied = catalog({"embed": Saved(aliases=("head",))})
    assert "1 would stay unrestored: parameter 'head' [2, 3]" in refusal(
        tied, target(slot(0, {"embed": SHAPE, "head": SHAPE}))
    )
    assert wanted(plan(tied, target(slot(0, {"head": SHAPE})), Wish()))[0, "param"] == ["embed"]


def test_a_tied_parameter_under_both_names_is_one() -> None:
    saved = catalog({"a": Saved(), "b": Saved((5,)), "other": Saved(), "alone": Saved()})
    at = replace(live(without=("frozen", "seen")), tied={"other": "a"})
    text = refusal(saved, at)
    assert "'alone'" in text
    assert "'other'" not in text
    found = plan(saved, at, Wish(allow_unused=("alone",)))
    assert [(one.name, other.name, one.state) for one, other in found.tied] == [
        ("other", "a", state) for state in ("exp_avg", "exp_avg_sq", "param")
    ]
    assert plan(saved, at, Wish(allow_unused=("alone", "other"))).tied == ()
    assert [one.state for one, _ in plan(saved, at, Wish(weights_only=True, allow_unused=("alone",))).tied] == ["param"]


def test_a_tied_parameter_of_two_shapes_is_refused() -> None:
    saved = catalog({"a": Saved(), "b": Saved((5,)), "other": Saved((3, 2))})
    text = refusal(saved, replace(live(without=("frozen", "seen")), tied={"other": "a"}))
    assert "'other' (param, float32 [3, 2]) is tied to 'a' here, and it has float32 [2, 3] in the checkpoint" in text
