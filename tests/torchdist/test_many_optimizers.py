"""Optimizers of four packages resume as torch's own load_state_dict lets them: losses of further steps are equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prodigyopt
import pytest
import pytorch_optimizer
import schedulefree
import torch
from torch import nn

import ucp
from ucp.errors import Mismatch, Unsupported

Make = Callable[[Any], torch.optim.Optimizer]

TORCH = ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")
OTHERS = (
    "AdEMAMix",
    "Adan",
    "Lamb",
    "SOAP",
    "Lion",
    "AdaBelief",
    "AdamP",
    "AdaPNM",
    "CAME",
    "ADOPT",
    "MARS",
    "StableAdamW",
    "Shampoo",
    "DAdaptAdam",
    "ScheduleFreeAdamW",
    "GaLore",
)
FREE = ("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree")


def maker(name: str) -> Make:
    if name in TORCH:
        return lambda params: getattr(torch.optim, name)(params, lr=1e-2)
    if name in FREE:
        return lambda params: getattr(schedulefree, name)(params, lr=1e-2)
    if name == "Prodigy":
        return lambda params: prodigyopt.Prodigy(params)
    return lambda params: getattr(pytorch_optimizer, name)(params)


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def train(module: nn.Module, optimizer: Any, steps: range) -> list[float]:
    if isinstance(optimizer, tuple(getattr(schedulefree, name) for name in FREE)):
        optimizer.train()
    losses = []
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        loss = (module(torch.randn(16, 6, generator=draw)) - torch.randn(16, 3, generator=draw)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


@pytest.mark.parametrize("name", [*TORCH, *OTHERS, *FREE, "Prodigy"])
def test_the_next_steps_are_those_of_torchs_own_way(tmp_path: Path, name: str) -> None:
    make = maker(name)
    source = model()
    optimizer = make(source.parameters())
    train(source, optimizer, range(3))
    ucp.save_training(tmp_path / "saved", model=source, optimizer=optimizer, step=3)
    weights, states = copy.deepcopy(source.state_dict()), copy.deepcopy(optimizer.state_dict())

    plain = model()
    plain.load_state_dict(weights)
    reference = make(plain.parameters())
    reference.load_state_dict(states)

    for trained in (0, 2):  # into a new optimizer, and into one that has stepped
        live = model()
        resumed = make(live.parameters())
        train(live, resumed, range(10, 10 + trained))
        ucp.load_training(tmp_path / "saved", model=live, optimizer=resumed)
        assert options(resumed) == options(optimizer)
        if trained == 0:
            assert train(live, resumed, range(3, 6)) == train(plain, reference, range(3, 6))


@pytest.mark.parametrize("name", ["AdEMAMix", "AdamWScheduleFree", "Prodigy", "AdamW"])
def test_an_optimizer_that_has_not_stepped(tmp_path: Path, name: str) -> None:
    """Saving and loading leave it as one that has not: its first steps are those of a new one."""
    make = maker(name)
    truth = model()
    expected = train(truth, make(truth.parameters()), range(3))
    source = model()
    optimizer = make(source.parameters())
    if name in FREE:
        optimizer.train()  # type: ignore[attr-defined]
        assert optimizer.state  # of empty entries
    before = options(optimizer)
    ucp.save_training(tmp_path / "saved", model=source, optimizer=optimizer)
    assert options(optimizer) == before
    assert not any(optimizer.state.values())
    live = model()
    resumed = make(live.parameters())
    ucp.load_training(tmp_path / "saved", model=live, optimizer=resumed)
    assert train(live, resumed, range(3)) == expected


@pytest.mark.parametrize("name", FREE)
def test_schedule_free_that_was_switched_to_training(tmp_path: Path, name: str) -> None:
    """Its states have empty entries then, and what the checkpoint has is loaded, not left."""
    make = maker(name)
    source = model()
    optimizer = make(source.parameters())
    train(source, optimizer, range(3))
    ucp.save_training(tmp_path / "saved", model=source, optimizer=optimizer)
    live = model()
    resumed = make(live.parameters())
    resumed.train()  # type: ignore[attr-defined]
    report = ucp.load_training(tmp_path / "saved", model=live, optimizer=resumed)
    assert not report.tensors.plan.unused
    assert train(live, resumed, range(3, 6)) == train(source, optimizer, range(3, 6))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Lion", "AdaBelief"])
def test_parameters_that_are_trained_only_from_the_resume_on(tmp_path: Path, name: str) -> None:
    """Their states are those of an optimizer that has not stepped: the first update is a new optimizer's."""
    make = maker(name)
    source = model()
    source[0].requires_grad_(False)
    optimizer = make(source[2].parameters())
    train(source, optimizer, range(3))
    ucp.save_training(tmp_path / "saved", model=source, optimizer=optimizer)
    live = model()
    resumed = make(live.parameters())
    ucp.load_training(tmp_path / "saved", model=live, optimizer=resumed, allow_missing=["0.*:*"])
    for parameter in live[0].parameters():
        assert not resumed.state.get(parameter)
    for parameter in live[2].parameters():
        assert resumed.state[parameter]
    if name.startswith("Adam"):
        train(live, resumed, range(3, 4))
        assert {int(resumed.state[p]["step"]) for p in live[0].parameters()} == {1}
        assert {int(resumed.state[p]["step"]) for p in live[2].parameters()} == {4}


def saved_with(folder: Path, group: dict[str, Any], state: dict[str, Any]) -> torch.optim.Optimizer:
    """An Adam that has stepped and keeps this besides, saved."""
    module = model()
    optimizer = torch.optim.Adam(module.parameters())
    train(module, optimizer, range(3))
    optimizer.param_groups[0].update(group)
    for parameter in module.parameters():
        optimizer.state[parameter].update(copy.deepcopy(state))
    ucp.save_training(folder, model=module, optimizer=optimizer)
    return optimizer


def resumed_with(folder: Path, group: dict[str, Any], state: dict[str, Any], trained: int = 0) -> torch.optim.Optimizer:
    module = model()
    optimizer = torch.optim.Adam(module.parameters())
    train(module, optimizer, range(trained))
    optimizer.param_groups[0].update(group)
    if state:
        for parameter in module.parameters():
            optimizer.state[parameter].update(copy.deepcopy(state))
    ucp.load_training(folder, model=module, optimizer=optimizer)
    return optimizer


ONE = torch.tensor(1.0)
TWO = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize("trained", [0, 2])
@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({"h": [1, 2]}, {"h": []}),
        ({"h": []}, {"h": [1, 2]}),
        ({"h": [[1], [2]]}, {"h": []}),
        ({"h": (1,)}, {"h": ()}),
        ({"h": 3}, {}),
        ({"h": 3}, {"h": {}}),
        ({"h": [1, 2]}, {}),
        ({"h": ONE}, {}),
        ({"h": "a tag"}, {}),
    ],
    ids=str,
)
def test_options_as_torchs_own_way_restores_them(
    tmp_path: Path, there: dict[str, Any], here: dict[str, Any], trained: int
) -> None:
    source = saved_with(tmp_path / "saved", there, {})
    resumed = resumed_with(tmp_path / "saved", here, {}, trained)
    assert options(resumed) == options(source)
    assert type(resumed.param_groups[0]["h"]) is type(there["h"])


def test_options_of_an_optimizer_that_has_not_stepped(tmp_path: Path) -> None:
    module = model()
    optimizer = torch.optim.Adam(module.parameters())
    optimizer.param_groups[0]["tag"] = "a"
    ucp.save_training(tmp_path / "saved", model=module, optimizer=optimizer)
    resumed = resumed_with(tmp_path / "saved", {}, {})
    assert options(resumed) == options(optimizer)
    assert not resumed.state


@pytest.mark.parametrize(
    ("there", "here", "text"),
    [
        ([ONE, TWO], [], r"param_groups\.0\.h' is a list or mapping with other entries: h\.0, h\.1 in the .* h here"),
        ([], [ONE], r"other entries: h in the checkpoint and h\.0 here"),
        ([ONE], [ONE, ONE], r"other entries: h\.0 in the checkpoint and h\.0, h\.1 here"),
        ([ONE, ONE], [ONE], r"other entries: h\.0, h\.1 in the checkpoint and h\.0 here"),
        ({"a": 1}, {}, r"other entries: h\.a in the checkpoint and h here"),
        ([ONE], None, r"other entries: h\.0 in the checkpoint and h here"),
    ],
    ids=str,
)
def test_options_that_cannot_be_restored_are_refused(tmp_path: Path, there: Any, here: Any, text: str) -> None:
    saved_with(tmp_path / "saved", {"h": there}, {})
    with pytest.raises(Mismatch, match=text):
        resumed_with(tmp_path / "saved", {} if here is None else {"h": here}, {})


def test_states_that_are_lists(tmp_path: Path) -> None:
    """One that is empty here is restored from plain values, and refused by these words where tensors are in it."""
    source = saved_with(tmp_path / "plain", {}, {"h": [1, 2]})
    resumed = resumed_with(tmp_path / "plain", {}, {"h": []}, trained=2)
    assert [s["h"] for s in resumed.state.values()] == [s["h"] for s in source.state.values()] == [[1, 2]] * 4
    with pytest.raises(Mismatch, match=r"4 of the checkpoint would stay unused: 0\.bias:h, "):
        resumed_with(tmp_path / "plain", {}, {})
    saved_with(tmp_path / "tensors", {}, {"h": [TWO]})
    text = r"4 do not fit: 'optim\.state\.0\.weight\.h' is empty here and filled in the checkpoint \('.*\.weight\.h\.0'"
    with pytest.raises(Mismatch, match=text) as caught:
        resumed_with(tmp_path / "tensors", {}, {"h": []}, trained=2)
    assert "not in the checkpoint" not in str(caught.value)


def test_a_list_beside_the_optimizer(tmp_path: Path) -> None:
    ucp.save({"model": {"a": TWO.clone()}, "seen": [TWO.clone()]}, tmp_path / "saved")
    with pytest.raises(Mismatch, match=r"'seen' is empty here and filled in the checkpoint \('seen\.0'"):
        ucp.load({"model": {"a": TWO.clone()}, "seen": []}, tmp_path / "saved")


def test_lbfgs_is_refused_when_saving_and_when_loading(tmp_path: Path) -> None:
    module = model()
    optimizer = torch.optim.LBFGS(module.parameters())
    with pytest.raises(Unsupported, match="LBFGS is not supported: it steps by a closure"):
        ucp.save_training(tmp_path / "saved", model=module, optimizer=optimizer)
    assert not (tmp_path / "saved").exists()
    ucp.save_training(tmp_path / "saved", model=module)
    with pytest.raises(Unsupported, match="LBFGS is not supported"):
        ucp.load_training(tmp_path / "saved", model=module, optimizer=optimizer)


def test_what_a_state_dict_by_name_does_not_have_is_refused(tmp_path: Path) -> None:
    module = model()
    optimizer = pytorch_optimizer.Ranger21(module.parameters(), num_iterations=100)
    with pytest.raises(Unsupported, match=r"Ranger21 is not supported: its state_dict\(\) keeps 'current_lr'"):
        ucp.save_training(tmp_path / "saved", model=module, optimizer=optimizer)
