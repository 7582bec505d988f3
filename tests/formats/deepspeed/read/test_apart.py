"""States of other shapes than the weights in a stage-0 file: whole, by the parameter's name, and into such a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.deepspeed import apart_jobs as jobs
from ucp.errors import Unsupported

OLDER = Path(__file__).parents[1] / "older" / "0.14.4-z0-bf16"


def written(folder: Path, name: str, masters: bool, shuffled: bool = False) -> tuple[Any, torch.optim.Optimizer]:
    """A model file as DeepSpeed 0.14.4 has it, with this optimizer's real states in it."""
    (file,) = OLDER.glob("*/*model_states.pt")
    raw = torch.load(file, weights_only=False)
    model = jobs.model(name, 1)
    optimizer = jobs.optimizer_of(name, model)
    for _ in range(3):
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found: Any = optimizer.state_dict()
    if shuffled:
        found["state"][0], found["state"][2] = found["state"][2], found["state"][0]
    raw |= {
        "module": model.state_dict(),
        "buffer_names": [],
        "shared_params": {},
        "optimizer": found,
        "param_shapes": None,
    }
    if masters:
        whole = [p.detach().clone() for p in model.parameters()]
        raw["module"] = {key: value.bfloat16() for key, value in model.state_dict().items()}
        raw["optimizer"] = {"optimizer_state_dict": found, "fp32_groups": [whole]}
    (folder / "t").mkdir(parents=True)
    torch.save(raw, folder / "t" / file.name)
    (folder / "latest").write_text("t")
    return model, optimizer


def parts(value: Any) -> list[tuple[str, torch.Tensor]]:
    listed = enumerate(value) if isinstance(value, list) else ((None, value),)
    return [("" if i is None else f".{i}", one) for i, one in listed if isinstance(one, torch.Tensor) and one.dim()]


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("name", ["Adafactor", "transformers' Adafactor", "SOAP"])
def test_read_and_written_again(tmp_path: Path, name: str, masters: bool) -> None:
    model, optimizer = written(tmp_path / "theirs", name, masters)
    apart = 0
    with ucp.open(tmp_path / "theirs") as checkpoint:
        for owner, p in model.named_parameters():
            for state, value in optimizer.state[p].items():
                for number, one in parts(value):
                    alike = one.shape == p.shape and not number
                    where = (owner, state) if alike else (f"optim.state.{owner}.{state}{number}", "param")
                    assert torch.equal(checkpoint.read(*where), one), where
                    apart += not alike
    assert apart
    ucp.convert(tmp_path / "theirs", tmp_path / "again", to="deepspeed", layout="dp=2,zero=0")
    (file,) = (tmp_path / "again").glob("*/*model_states.pt")
    again = torch.load(file, weights_only=False)
    assert again["module"].keys() == model.state_dict().keys()
    states = again["optimizer"].get("optimizer_state_dict", again["optimizer"])["state"]
    for k, p in enumerate(model.parameters()):
        for state, value in optimizer.state[p].items():
            assert [
                torch.equal(a, b) for (_, a), (_, b) in zip(parts(value), parts(states[k][state]), strict=True)
            ] == [True] * len(parts(value))
    with pytest.raises(Unsupported, match=r"has shape \[.*choose zero=0"):
        ucp.convert(tmp_path / "theirs", tmp_path / "no", to="deepspeed", layout="dp=2,zero=2")
    assert not (tmp_path / "no").exists()


def test_states_of_another_parameter_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "theirs", "Adafactor", False, shuffled=True)
    with pytest.raises(Unsupported, match="does not name the optimizer's parameters"):
        ucp.open(tmp_path / "theirs")
