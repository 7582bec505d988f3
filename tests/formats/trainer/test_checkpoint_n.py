"""A Trainer's ``checkpoint-N``, written by transformers: read whole, converted, resumed; its faults refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.formats.foreign_programs import made_by
from ucp.cli import main as commands
from ucp.errors import DamagedCheckpoint, Unsupported

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(foreign: Path) -> Path:
    return made_by("trainer", foreign)


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What model and optimizer held when it was saved."""
    return torch.load(folder / "truth.pt")


def is_the_truth(
    path: Path, truth: dict[str, dict[str, torch.Tensor]], also: frozenset[str] | set[str] = frozenset()
) -> None:
    with ucp.open(path) as opened:
        assert opened.parameters.keys() == truth.keys() | also
        for name, states in truth.items():
            info = opened.parameters[name]
            assert {*info.states, *info.scalars} == states.keys()
            assert info.scalars["step"] == states["step"].item()
            for state in info.states:
                assert torch.equal(opened.read(name, state), states[state]), (name, state)


def test_it_is_read_whole(folder: Path, truth: dict[str, dict[str, torch.Tensor]]) -> None:
    is_the_truth(folder / "checkpoint-2", truth)
    with ucp.open(folder / "checkpoint-2") as opened:
        assert opened.format == "trainer"
        assert opened.parameters["model.embed_tokens.weight"].aliases == ("lm_head.weight",)
        state = opened.training_state
        decayed, others = state.param_groups
        assert (decayed.options["weight_decay"], others.options["weight_decay"]) == (0.1, 0.0)
        assert all("norm" in name for name in others.names)
        assert {*decayed.names, *others.names} == truth.keys()
        assert state.global_steps == state.lr_scheduler["last_epoch"] == 2
        assert state.client_state["trainer_state"]["epoch"] == 0.25
        generators = torch.load(folder / "checkpoint-2/rng_state.pth", weights_only=False)
        (own,) = state.extra["ranks"]
        assert torch.equal(own["rng"]["torch"], generators["cpu"])
        assert list(own["rng"]["python"][1]) == list(generators["python"][1])


def test_the_parent_takes_the_newest_by_its_step(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(folder) as opened:
        assert opened.path.name == "checkpoint-5"
    assert "taking 'checkpoint-5', the newest checkpoint of" in caplog.text
    assert "by the steps that they say" in caplog.text


def test_it_is_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["ls", "--json", str(folder.parent)]) == 0
    found = {e["tag"]: e for e in json.loads(capsys.readouterr().out)["checkpoints"]}
    entry = found["trainer/checkpoint-2"]
    assert (entry["format"], entry["step"], entry["whole"]) == ("trainer", 2, True)


@pytest.mark.parametrize("to", ["universal", "dcp", "deepspeed"])
def test_it_is_converted(folder: Path, truth: dict[str, dict[str, torch.Tensor]], to: str, tmp_path: Path) -> None:
    options = {"layout": "dp=3,zero=3", "ds_config": {}} if to == "deepspeed" else {}
    ucp.convert(folder / "checkpoint-2", tmp_path / "out", to, **options)
    # DCP has no word for tied parameters: both names are entries.
    is_the_truth(tmp_path / "out", truth, also={"lm_head.weight"} if to == "dcp" else set())
    with ucp.open(tmp_path / "out") as opened:
        assert opened.training_state.global_steps == 2
        assert opened.training_state.lr_scheduler["_last_lr"] == [0.006, 0.006]


def test_a_program_of_its_own_goes_on_with_the_trainers_losses(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder / "checkpoint-2"))
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    others = [p for n, p in model.named_parameters() if "norm" not in n]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": norms, "weight_decay": 0.0}], lr=7.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (5 - step) / 5))
    report = ucp.load_training(folder / "checkpoint-2", model=model, optimizer=optimizer, lr_scheduler=scheduler)
    assert report.step == 2
    row = torch.arange(8).expand(2, 8)
    losses = []
    for _ in range(3):
        loss = model(input_ids=row, labels=row, num_items_in_batch=torch.tensor(14)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == json.loads((folder / "losses.json").read_text())


def changed(folder: Path, tmp_path: Path, change: Callable[[Path], None]) -> Path:
    path = tmp_path / "checkpoint-2"
    shutil.copytree(folder / "checkpoint-2", path)
    change(path)
    return path


def without(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def of_another_step(name: str, step: int = 4) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        other = Path(str(path)).with_name("source") / f"checkpoint-{step}" / name
        shutil.copy(other, path / name)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("optimizer.pt"), "has 'scheduler.pt' and no optimizer; a part is missing"),
        (without("model.safetensors"), "has no model"),
        (
            of_another_step("optimizer.pt"),
            "the optimizer is of step 4, and 'trainer_state.json' of step 2",
        ),
        (
            of_another_step("scheduler.pt"),
            "'scheduler.pt' is of step 4, and 'trainer_state.json' of step 2; parts of two steps",
        ),
        (of_another_step("trainer_state.json"), None),
        (lambda path: (path / "rng_state.pth").rename(path / "rng_state_1.pth"), "no such file of rank 0"),
        (lambda path: (path / "trainer_state.json").write_text("{}"), "has no 'global_step'"),
        (lambda path: (path / "trainer_state.json").write_text("["), "is not valid JSON"),
        (lambda path: (path / "trainer_state.json").write_text(f'{{"global_step": {10**30}}}'), "has no 'global_step'"),
        (lambda path: (path / "optimizer.pt").write_bytes(b"PK" * 99), "optimizer.pt"),
        (lambda path: torch.save({"state": {}}, path / "optimizer.pt"), "holds no optimizer's state dict"),
        (lambda path: torch.save([1], path / "rng_state.pth"), "the states of its random number generators"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], says: str | None
) -> None:
    (tmp_path / "source").symlink_to(folder)
    path = changed(folder, tmp_path, change)
    if says is None:  # steps that were left out for an overflow look so
        with ucp.open(path) as opened:
            assert opened.training_state.global_steps == 4
        return
    with pytest.raises(DamagedCheckpoint, match=says):
        ucp.open(path)
    assert commands.main(["inspect", str(path)]) == 2


def test_numbers_that_nothing_names_are_kept_and_resume_by_the_runs_own_groups(
    folder: Path, truth: dict[str, dict[str, torch.Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = changed(folder, tmp_path, without("config.json"))
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(path) as opened:
        assert not opened.training_state.param_groups
        assert opened.training_state.client_state["optimizer.pt"]["state"][0]["exp_avg"].shape == (32, 16)
    assert "kept as client state and resumes by no name" in caplog.text
    with ucp.open(folder / "checkpoint-2") as opened:
        names = [list(group.names) for group in opened.training_state.param_groups]
    with ucp.open(path, param_names=names) as opened:
        for name in truth:
            assert torch.equal(opened.read(name, "exp_avg_sq"), truth[name]["exp_avg_sq"])


def test_an_adapter_alone_is_named(folder: Path, tmp_path: Path) -> None:
    path = changed(
        folder, tmp_path, lambda path: (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    )
    with pytest.raises(Unsupported, match="holds a PEFT adapter"):
        ucp.open(path)


def test_several_models_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    path = changed(folder, tmp_path, lambda path: torch.save({}, path / "pytorch_model.bin"))
    with pytest.raises(Unsupported, match=r"several models \(model.safetensors, pytorch_model.bin\)"):
        ucp.open(path)


def test_a_config_that_claims_more_layers_than_there_are_is_not_built(folder: Path, tmp_path: Path) -> None:
    def change(path: Path) -> None:
        config: dict[str, Any] = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))

    with ucp.open(changed(folder, tmp_path, change)) as opened:
        assert "optimizer.pt" in opened.training_state.client_state
