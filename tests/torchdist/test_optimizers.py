"""What an optimizer that has not stepped will keep: against what torch itself makes, and what a load makes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict as api
from torch.distributed.checkpoint.state_dict import _init_optim_state

import ucp
from tests.engines.truth import same
from ucp.errors import DamagedCheckpoint, Mismatch
from ucp.torchdist.optimizers import blank_states

Make = Callable[[Any], torch.optim.Optimizer]

TOLD: dict[str, Make] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "AdamW, amsgrad": lambda ps: torch.optim.AdamW(ps, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "AdamW, lr a tensor": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(1e-2), foreach=False),
    "Adam, fused": lambda ps: torch.optim.Adam(ps, lr=1e-2, fused=True),
    "Adam, foreach": lambda ps: torch.optim.Adam(ps, lr=1e-2, foreach=True),
    "SGD, momentum": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, centered=True, momentum=0.5),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=1e-2),
    "RAdam": lambda ps: torch.optim.RAdam(ps, lr=1e-2),
    "Adamax": lambda ps: torch.optim.Adamax(ps, lr=1e-2),
    "Adadelta": lambda ps: torch.optim.Adadelta(ps, lr=1e-2),
    "ASGD": lambda ps: torch.optim.ASGD(ps, lr=1e-2),
    "Rprop": lambda ps: torch.optim.Rprop(ps, lr=1e-2),
}


class Outside(torch.optim.AdamW):
    """An optimizer that is not torch's own."""


NOT_TOLD: dict[str, Make] = {
    "Adafactor, whose states have other shapes": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
    "LBFGS, which wants a closure": lambda ps: torch.optim.LBFGS(ps, lr=1e-2),
    "one from outside": lambda ps: Outside(ps, lr=1e-2),
}


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(3)
    made = [
        torch.randn(4, 6),
        torch.randn(8),
        torch.randn(2, 3, 4, 5),
        torch.randn(0, 3),
        torch.randn(1),
        torch.tensor(2.0),
    ]
    return [
        *map(torch.nn.Parameter, made),
        torch.nn.Parameter(torch.randn(5, 5), requires_grad=False),
        torch.nn.Parameter(torch.randn(6, 2, dtype=torch.bfloat16)),
    ]


@pytest.mark.parametrize("make", TOLD.values(), ids=TOLD)
def test_the_states_are_those_that_torch_makes(make: Make) -> None:
    params = parameters()
    groups = [{"params": params[:2], "weight_decay": 0.5}, {"params": params[2:]}]
    optimizer, other = make(groups), make(copy.deepcopy(groups))
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append(1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = [p.detach().clone() for p in params]
    options = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])

    found = blank_states(optimizer)

    assert found is not None
    assert not called
    assert not optimizer.state
    assert not getattr(optimizer, "_opt_called", False)  # by which a scheduler tells that a step was taken
    assert scheduler.last_epoch == 0
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert options == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    _init_optim_state(other)
    theirs = [p for g in other.param_groups for p in g["params"]]
    assert [p in found for p in params] == [p in other.state for p in theirs]
    for mine, its in zip(params, theirs, strict=True):
        if mine not in found:
            continue
        assert list(found[mine]) == list(other.state[its])
        for key, value in other.state[its].items():
            got = found[mine][key]
            if not isinstance(value, torch.Tensor):
                assert got == value
                continue
            assert (got.shape, got.dtype, got.device, got.stride()) == (
                value.shape,
                value.dtype,
                value.device,
                value.stride(),
            )
            if value.numel() == 1 and key in ("step", "mu_product", "eta", "mu"):
                assert torch.equal(got, value)


@pytest.mark.parametrize("make", NOT_TOLD.values(), ids=NOT_TOLD)
def test_what_stand_ins_do_not_tell(make: Make) -> None:
    assert blank_states(make(parameters()[:1])) is None


@pytest.mark.slow  # imports the most of torch
def test_more_dimensions_than_stand_ins_have() -> None:
    assert blank_states(torch.optim.AdamW([torch.nn.Parameter(torch.zeros([1] * 9))])) is None


def model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))


def trained(make: Make, seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    net = model(seed)
    optimizer = make(net.parameters())
    for _ in range(3):
        net(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


RESUMED = {**TOLD, **{k: NOT_TOLD[k] for k in ("Adafactor, whose states have other shapes", "one from outside")}}


@pytest.mark.parametrize("make", RESUMED.values(), ids=RESUMED)
def test_a_new_optimizer_goes_on_as_the_old_one(tmp_path: Path, make: Make) -> None:
    old, stepping = trained(make)
    ucp.save_training(tmp_path / "now", model=old, optimizer=stepping)
    new = model(9)
    optimizer = make(new.parameters())
    ucp.load_training(tmp_path / "now", model=new, optimizer=optimizer)
    assert same(optimizer.state_dict(), stepping.state_dict())
    data = torch.randn(4, 6)
    for net, o in ((old, stepping), (new, optimizer)):
        net(data).square().sum().backward()
        o.step()
    assert same(dict(new.state_dict()), dict(old.state_dict()))
    assert same(optimizer.state_dict(), stepping.state_dict())


def test_states_that_the_checkpoint_lacks_are_those_that_torch_makes(tmp_path: Path) -> None:
    """Where a caller allows it: not what happened to lie in memory."""
    old, stepping = trained(TOLD["AdamW"])
    ucp.save_training(tmp_path / "now", model=old, optimizer=stepping)
    new = model(9)
    optimizer = TOLD["AdamW, amsgrad"](new.parameters())
    with pytest.raises(Mismatch, match="max_exp_avg_sq"):
        ucp.load_training(tmp_path / "now", model=new, optimizer=optimizer)
    assert not optimizer.state
    assert same(dict(new.state_dict()), dict(model(9).state_dict()))
    report = ucp.load_training(tmp_path / "now", model=new, optimizer=optimizer, allow_missing=["*max_exp_avg_sq"])
    assert len(report.tensors.left) >= 4
    for states, saved in zip(optimizer.state.values(), stepping.state.values(), strict=True):
        assert torch.equal(states["exp_avg"], saved["exp_avg"])
        assert not states["max_exp_avg_sq"].any()


def test_damage_leaves_a_new_optimizer_new(tmp_path: Path) -> None:
    old, stepping = trained(TOLD["AdamW"])
    ucp.save_training(tmp_path / "now", model=old, optimizer=stepping)
    (file,) = (tmp_path / "now").glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    new = model(9)
    optimizer = TOLD["AdamW"](new.parameters())
    with pytest.raises(DamagedCheckpoint):
        ucp.load_training(tmp_path / "now", model=new, optimizer=optimizer)
    assert not optimizer.state
    assert same(dict(new.state_dict()), dict(model(9).state_dict()))


def test_states_are_read_into_the_memory_that_they_stay_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new optimizer's, of which nobody has seen anything yet, are not copied."""
    old, stepping = trained(TOLD["AdamW"])
    ucp.save_training(tmp_path / "now", model=old, optimizer=stepping)
    new = model(9)
    optimizer = TOLD["AdamW"](new.parameters())
    asked: list[int] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        out = torch_states(*args, **kwargs)
        asked.extend(s["exp_avg"].data_ptr() for s in out["state"].values())
        return out

    torch_states = api.get_optimizer_state_dict
    monkeypatch.setattr(api, "get_optimizer_state_dict", noted)
    ucp.load_training(tmp_path / "now", model=new, optimizer=optimizer)
    assert asked == [s["exp_avg"].data_ptr() for s in optimizer.state.values()]


class Compared:
    """Equal to nothing. It counts how often it was compared."""

    times = 0

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        Compared.times += 1
        return False


def test_torch_finds_a_parameter_in_its_group_without_looking_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for each state of each parameter, so that thousands of parameters took seconds."""
    old, stepping = trained(TOLD["AdamW"])
    ucp.save_training(tmp_path / "now", model=old, optimizer=stepping)
    new = model(9)
    weights, biases = ([p for p in new.parameters() if (p.dim() > 1) == is_weight] for is_weight in (True, False))
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": biases}])
    seen: list[type] = []
    optimizer.register_load_state_dict_pre_hook(
        lambda _, given: seen.extend(type(group["params"]) for group in given["param_groups"])
    )
    asked: list[int] = []

    def noted(param: Any, value: Any, param_id: Any, param_groups: Any, key: Any = None) -> torch.Tensor:
        Compared.times = 0
        assert not any(Compared() in group["params"] for group in param_groups)
        assert any(param_id in group["params"] for group in param_groups)
        asked.append(Compared.times)
        return torchs(param, value, param_id, param_groups, key)

    torchs = torch.optim.Optimizer._process_value_according_to_param_policy
    monkeypatch.setattr(torch.optim.Optimizer, "_process_value_according_to_param_policy", staticmethod(noted))
    ucp.load_training(tmp_path / "now", model=new, optimizer=optimizer)
    assert asked == [0] * 12
    assert seen == [list, list]
    assert [group["params"] for group in optimizer.param_groups] == [weights, biases]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
    saved = dict(zip(old.parameters(), new.parameters(), strict=True))
    assert same({saved[p]: states for p, states in stepping.state.items()}, dict(optimizer.state))
