"""A refusal speaks of its target in that target's own words: of an engine, of a state dict, of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.saving.parts import FakeTarget, Saved, catalog, slot, target
from ucp import limits
from ucp.catalog import ParamGroup
from ucp.errors import BadArgument, Mismatch
from ucp.loading.load import load
from ucp.loading.match import plan
from ucp.loading.nouns import Wish
from ucp.loading.refusals import Findings, Item
from ucp.loading.report import LoadReport
from ucp.loading.target import Target
from ucp.torchdist.state_dicts import flatten
from ucp.torchdist.target import StateDictTarget

ENGINES = ("the engine", '"ucp"', "load_module_strict", "param group 0")
"""What a refusal about a state dict never says."""


def state_dict(**model: torch.Tensor) -> dict[str, Any]:
    states = {name: {"exp_avg": torch.zeros_like(t), "step": torch.tensor(0.0)} for name, t in model.items()}
    groups = [{"params": list(model), "lr": 0.5}]
    return {"model": dict(model), "optim": {"state": states, "param_groups": groups}}


def both(saved: Mapping[str, Saved], here: Mapping[str, tuple[int, ...]], **options: Any) -> tuple[str, str]:
    """What is said where this is saved and that is to be filled: of an engine, and of a state dict."""
    found = catalog(saved, **options)
    members: FakeTarget = target(slot(0, here))
    entries = flatten(state_dict(**{name: torch.zeros(shape) for name, shape in here.items()}))
    texts = []
    targets: list[Target] = [members, StateDictTarget("runs/one", entries, found)]
    for one in targets:
        with pytest.raises(Mismatch) as caught:
            plan(found, one, Wish())
        texts.append(str(caught.value))
    assert texts[0].startswith("nothing was loaded: the checkpoint (dp=2,zero=1) and the engine (dp=1,zero=3) do not")
    assert texts[1].startswith("runs/one: nothing was loaded, since what is asked for is not what the checkpoint has")
    assert not any(word in texts[1] for word in ENGINES)
    return texts[0], texts[1]


def test_what_is_missing() -> None:
    of_engine, of_state_dict = both({"a": Saved()}, {"a": (2, 3), "b": (4,)})
    assert "1 would stay unrestored: parameter 'b' [4]; " in of_engine
    names = "'model.b', 'optim.state.b.exp_avg', 'optim.state.b.step'"
    assert f"3 are not in the checkpoint: {names}; " in of_state_dict
    assert of_state_dict.endswith("; allow_missing=[...] leaves what is missing as it is")


def test_what_is_unused() -> None:
    of_engine, of_state_dict = both({"a": Saved(), "b": Saved((4,))}, {"a": (2, 3)})
    assert "1 of the checkpoint would stay unused: parameter 'b' [4]; " in of_engine
    assert "2 of the checkpoint would stay unused: a:exp_avg_sq, b" in of_state_dict


def test_other_shapes_and_element_types() -> None:
    of_engine, of_state_dict = both({"a": Saved((3, 2))}, {"a": (2, 3)})
    assert "1 does not fit: parameter 'a' [2, 3] has shape [3, 2] in the checkpoint" in of_engine
    assert "'model.a' is [3, 2] in the checkpoint and [2, 3] here" in of_state_dict
    of_engine, of_state_dict = both({"a": Saved(dtype="float64")}, {"a": (2, 3)})
    lost = "is float64 in the checkpoint and float32 here, which would lose bits"
    assert f"parameter 'a' [2, 3] {lost}" in of_engine
    assert f"'model.a' {lost}" in of_state_dict


def test_groups_that_do_not_agree() -> None:
    groups = [ParamGroup(("a",), {"lr": 0.1}), ParamGroup(("b",), {"lr": 0.2})]
    of_engine, of_state_dict = both({"a": Saved(), "b": Saved()}, {"a": (2, 3), "b": (2, 3)}, groups=groups)
    assert (
        "param group 0 here holds parameters of the checkpoint's groups 0 and 1, whose 'lr' differ (0.1 and 0.2)"
        in (of_engine)
    )
    assert "'optim.param_groups.0.lr' is for parameters of the checkpoint's groups [0, 1], which have 0.1, 0.2" in (
        of_state_dict
    )


def test_nothing_is_advised_where_no_permission_helps() -> None:
    of_engine, of_state_dict = both({"a": Saved((3, 2), states=("exp_avg",))}, {"a": (2, 3)})
    assert "allow" not in of_state_dict
    assert "allow" not in of_engine  # nor where a state is missing besides: the shapes still differ


def test_of_another_optimizer_at_most_five_names_are_told() -> None:
    from ucp.deepspeed.live import WORDS

    def told(missing: str, *unused: str) -> str:
        found = Findings(WORDS)
        for number in range(9):
            found.missing += [Item("parameter", f"p{number}", (2,), missing)] if missing else []
            found.unused += [Item("parameter", f"p{number}", (2,), state) for state in unused]
        with pytest.raises(Mismatch) as refused:
            found.refuse("dp=1", "dp=2", set(unused))
        return str(refused.value)

    momentum = told("momentum_buffer", "exp_avg", "exp_avg_sq")
    assert len(re.findall(r"'p\d'", momentum)) <= limits.REFUSAL_ITEMS_COUNT
    assert (
        "18 of the checkpoint would stay unused: optimizer state 'exp_avg' of 9 parameters, "
        "optimizer state 'exp_avg_sq' of 9 parameters; " in momentum
    )
    plain = told("", "exp_avg", "exp_avg_sq")
    assert (
        "the checkpoint is Adam's (exp_avg, exp_avg_sq), and the optimizer here keeps none of that; load_opt" in plain
    )
    assert len(re.findall(r"'p\d'", plain)) <= limits.REFUSAL_ITEMS_COUNT


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ucp.save(state_dict(a=torch.ones(2, 3), b=torch.ones(4)), tmp_path / "saved")
    return tmp_path / "saved"


def test_reports_have_the_same_fields(saved: Path) -> None:
    """Of a state dict, of a model with its optimizer, and of any other target."""
    state = state_dict(a=torch.zeros(2, 3))
    report = ucp.load(state, saved)
    model = torch.nn.Module()
    model.a, model.b = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))
    training = ucp.load_training(saved, model=model)
    for one, tensors, unused in (
        (report, 2, ("b",)),
        (training.tensors, 2, ("a:exp_avg", "b:exp_avg")),
    ):
        assert type(one) is LoadReport
        assert (one.path, one.tensors, one.left, one.read_once) == (str(saved), tensors, (), False)
        assert set(one.unused) == set(unused)
        assert (one.source, one.target) == ("universal dp=1,zero=0", "dp=1,zero=0")
        assert set(one.seconds) == {"open", "plan", "read", "apply", "prove", "wait"}
        assert str(one).startswith(f"restored {tensors} tensors (")
        assert str(one).endswith(f"({saved})")
    assert report.nbytes == 2 * 6 * 4
    assert report.bytes_read >= report.nbytes


def test_patterns_may_be_flat_names_or_parameters_names(saved: Path) -> None:
    """allow_missing and allow_unused take the same spellings."""
    for pattern in ("model.c", "c", "model.[c-z]"):
        state = {"model": {"a": torch.zeros(2, 3), "c": torch.full((2,), 7.0)}}
        assert ucp.load(state, saved, allow_missing=[pattern]).left == ("model.c",)
        assert (state["model"]["a"].sum(), state["model"]["c"].sum()) == (6, 14)
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.zeros(2, 3))
    for pattern in ("b", "model.b", "[b]"):
        assert "b" in ucp.load_training(saved, model=model, allow_unused=[pattern]).tensors.unused
    with pytest.raises(Mismatch, match=r"1 of the checkpoint would stay unused: b; .*allow_unused=\[\.\.\.\]"):
        ucp.load_training(saved, model=model, allow_unused=["a", "model.c"])


def test_reading_once_is_never_auto(saved: Path) -> None:
    state = {"model": {"a": torch.zeros(2, 3)}}
    with pytest.raises(BadArgument, match="read_once is True, False or 'adaptive'; found 'auto'"):
        ucp.load(state, saved, read_once="auto")
    with pytest.raises(BadArgument, match="read_once"):
        load(catalog({}), target(), Wish(), read_once="once")
    assert not state["model"]["a"].any()


def adams() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(4)))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_another_optimizers_states_are_the_first_reason(tmp_path: Path) -> None:
    """And at most five names follow; what is advised is tried."""
    model, optimizer = adams()
    ucp.save_training(tmp_path / "adam", model=model, optimizer=optimizer, step=1)
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(Mismatch) as refused:
        ucp.load_training(tmp_path / "adam", model=model, optimizer=momentum)
    text = str(refused.value)
    reason = "the checkpoint is Adam's (exp_avg, exp_avg_sq), and the optimizer here wants momentum_buffer; leave "
    assert f"not what the checkpoint has; {reason}optimizer= out to load the weights alone; " in text
    assert "8 are not in the checkpoint: " in text
    assert text.count("momentum_buffer'") == limits.REFUSAL_ITEMS_COUNT == 5
    assert ", and 3 more; " in text
    ucp.load_training(tmp_path / "adam", model=model)


def test_the_engines_words_name_its_own_way_out() -> None:
    from ucp.deepspeed.live import WORDS

    found = Findings(WORDS, missing=[Item("parameter", "a", (2,), "momentum_buffer")])
    found.unused.append(Item("parameter", "a", (2,), "exp_avg"))
    text = (
        "the checkpoint is Lion's (exp_avg), and the optimizer here wants momentum_buffer; load_optimizer_states=False"
    )
    assert found.cause({"exp_avg"}).startswith(text)
    assert found.cause(()).startswith("the checkpoint has no optimizer's states, and the optimizer here wants momentum")
    assert Findings(WORDS, missing=[Item("parameter", "b", (2,)), Item("parameter", "b", (2,), "x")]).cause({"x"}) == ""


@pytest.mark.parametrize("more", ["here", "there"])
def test_what_is_advised_helps(tmp_path: Path, more: str) -> None:
    """The names that a refusal gives, given to the arguments that it names, load."""
    small, large = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Sequential(*(torch.nn.Linear(2, 2),) * 1)
    large.append(torch.nn.Linear(2, 2))
    saved, live = (small, large) if more == "here" else (large, small)
    ucp.save_training(tmp_path / "saved", model=saved, step=1)
    with pytest.raises(Mismatch) as refused:
        ucp.load_training(tmp_path / "saved", model=live)
    text = str(refused.value)
    names = re.findall(r"1\.(?:weight|bias)", text)
    assert sorted(names) == ["1.bias", "1.weight"]
    argument = "allow_missing" if more == "here" else "allow_unused"
    assert f"{argument}=[...]" in text
    ucp.load_training(tmp_path / "saved", model=live, **{argument: names})


def test_a_scheduler_that_is_missing_says_which_rate_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = adams()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    scheduler.step()
    ucp.save_training(tmp_path / "saved", model=model, optimizer=optimizer, lr_scheduler=scheduler, step=1)
    ucp.load_training(tmp_path / "saved", model=model, optimizer=optimizer)
    assert "scheduler's state is not used: none was passed, so the learning rate stays at 0.0005" in caplog.text
    assert optimizer.param_groups[0]["lr"] == 0.0005


def test_weights_alone_do_not_pass_for_a_training_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An optimizer that is given is restored or refused; where that is allowed it stays as it is."""
    model, _ = adams()
    ucp.save({"model": model.state_dict()}, tmp_path / "weights")
    other, live = adams()
    before = {name: value.clone() for name, value in live.state[other[0].weight].items()}
    with pytest.raises(
        Mismatch, match="it has weights alone, and an optimizer would stay as it is; leave optimizer= out"
    ):
        ucp.load_training(tmp_path / "weights", model=other, optimizer=live)
    assert not torch.equal(other[0].weight, model[0].weight)
    ucp.load_training(tmp_path / "weights", model=other, optimizer=live, allow_missing=["*:*"])
    assert torch.equal(other[0].weight, model[0].weight)
    assert all(torch.equal(value, live.state[other[0].weight][name]) for name, value in before.items())
    assert "it has weights alone, so the optimizer stays as it is" in caplog.text
    ucp.load_training(tmp_path / "weights", model=other)
