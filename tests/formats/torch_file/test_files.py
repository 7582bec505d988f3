"""One file of torch.save's: roles by what entries are, numbers by the module's order, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import ucp
from ucp.cli import convert as convert_command
from ucp.cli import main as commands
from ucp.errors import BadArgument, DamagedCheckpoint, NotACheckpoint, UnsafePickle, Unsupported
from ucp.inspection.listing import listing
from ucp.inspection.verify import verify


def trained(groups: int = 1, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    parameters = list(model.parameters())
    halves = [parameters] if groups == 1 else [parameters[:3], parameters[3:]]
    optimizer = torch.optim.AdamW([{"params": half} for half in halves], lr=1e-2)
    for _ in range(steps):
        model(torch.randn(4, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def is_saved(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **opening: Any) -> None:
    with ucp.open(path, **opening) as opened:
        assert opened.format == "torch-file"
        for name, tensor in model.state_dict().items():
            assert torch.equal(opened.read(name), tensor), name
        for name, parameter in model.named_parameters():
            for state, tensor in optimizer.state[parameter].items():
                if state == "step":
                    assert opened.parameters[name].scalars["step"] == tensor.item()
                else:
                    assert torch.equal(opened.read(name, state), tensor), (name, state)


KEYS = [
    ("model", "optimizer"),
    ("state_dict", "optimizer_states"),
    ("model_state_dict", "optimizer_state_dict"),
    ("module", "optim"),
    ("generator", "opt"),
]


@pytest.mark.parametrize(("model_key", "optimizer_key"), KEYS)
def test_entries_are_found_by_what_they_are(tmp_path: Path, model_key: str, optimizer_key: str) -> None:
    model, optimizer = trained()
    states: Any = optimizer.state_dict()
    body = {
        model_key: model.state_dict(),
        optimizer_key: [states] if optimizer_key.endswith("states") else states,
        "scheduler": {"last_epoch": 2},
        "step": 2,
        "note": "one key more",
        "table": torch.arange(3),
    }
    torch.save(body, tmp_path / "run.pt")
    is_saved(tmp_path / "run.pt", model, optimizer)
    with ucp.open(tmp_path / "run.pt") as opened:
        state = opened.training_state
        assert (state.global_steps, state.lr_scheduler) == (2, {"last_epoch": 2})
        assert state.client_state["note"] == "one key more"
    verdict = verify(tmp_path / "run.pt")
    assert not [finding for finding in verdict.findings if finding.fault]
    with ucp.open(tmp_path / "run.pt") as opened:
        state = opened.training_state
        assert torch.equal(state.client_state["table"], torch.arange(3))


@pytest.mark.parametrize("wrapped", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wrappers_put_into_names_is_left_out(tmp_path: Path, wrapped: str) -> None:
    model, optimizer = trained()
    weights = {f"{wrapped}{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": weights, "optimizer": optimizer.state_dict()}, tmp_path / "run.pth")
    is_saved(tmp_path / "run.pth", model, optimizer)


def test_a_state_dict_alone_and_the_older_form(tmp_path: Path) -> None:
    model, _ = trained()
    torch.save(model.state_dict(), tmp_path / "weights.bin", _use_new_zipfile_serialization=False)
    with ucp.open(tmp_path / "weights.bin") as opened:
        assert torch.equal(opened.read("0.weight"), model.state_dict()["0.weight"])
        assert not opened.training_state.param_groups


def test_tied_parameters_are_one(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Linear(3, 5, bias=False), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model["head"](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    with ucp.open(tmp_path / "run.pt") as opened:
        assert opened.parameters["embed.weight"].aliases == ("head.weight",)
        assert opened.parameters["embed.weight"].states.keys() == {"param", "momentum_buffer"}


def test_groups_that_leave_it_open_are_told_by_names_or_the_live_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = trained(groups=2)
    path = tmp_path / "run.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    with ucp.open(path) as opened:
        assert "optimizer" in opened.training_state.client_state
        assert not opened.training_state.param_groups
    assert "several param groups have parameters of shape" in caplog.text
    names = [name for name, _ in model.named_parameters()]
    is_saved(path, model, optimizer, param_names=[names[:3], names[3:]])
    live, other = trained(groups=2, steps=0)
    ucp.load_training(path, model=live, optimizer=other, rng=False)
    assert torch.equal(other.state[live[3].weight]["exp_avg"], optimizer.state[model[3].weight]["exp_avg"])
    weights_only, fresh = trained(groups=1, steps=0)
    with pytest.raises(Unsupported, match="the names and groups that are given don't tell which they are"):
        ucp.load_training(path, model=weights_only, optimizer=fresh, rng=False)


def test_recorded_names_decide(tmp_path: Path) -> None:
    model, _ = trained()
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": named[4:]}, {"params": named[:4]}])
    model(torch.randn(4, 4)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    is_saved(tmp_path / "run.pt", model, optimizer)


def test_keys_say_what_is_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = trained()
    one, other = model.state_dict(), {name: tensor + 1 for name, tensor in model.state_dict().items()}
    body = {"model": one, "net": other, "deep": {"ema": other}, "optimizer": optimizer.state_dict()}
    path = tmp_path / "run.pt"
    torch.save(body, path)
    with pytest.raises(BadArgument, match=r"several models \(model, net\).*--model-key model"):
        ucp.open(path)
    is_saved(path, model, optimizer, options={"model_key": "model"})
    with ucp.open(path, options={"model_key": "deep.ema"}) as opened:
        assert torch.equal(opened.read("0.weight"), other["0.weight"])
    for key in ("nothing", "deep", "model.0"):
        with pytest.raises(BadArgument, match="--model-key"):
            ucp.open(path, options={"model_key": key})
    torch.save({**body, "optim": optimizer.state_dict()}, path)
    assert convert_command.main([str(path), str(tmp_path / "out"), "--model-key", "net"]) == 2
    assert "several optimizers (optimizer, optim)" in capsys.readouterr().err
    keys = ["--model-key", "net", "--optimizer-key", "optim"]
    assert commands.main(["inspect", str(path), *keys]) == 0
    assert convert_command.main([str(path), str(tmp_path / "out"), *keys]) == 0
    with ucp.open(tmp_path / "out") as opened:
        assert torch.equal(opened.read("0.weight"), other["0.weight"])
        assert "exp_avg" in opened.parameters["0.weight"].states


def test_names_of_numbered_groups_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers of one shape in two param groups, of which no order tells which is in which."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    groups = [["1.weight", "0.bias"], ["0.weight", "1.bias"]]
    own = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": [own[name] for name in group]} for group in groups])
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    path, names, out = tmp_path / "run.pt", tmp_path / "groups.json", tmp_path / "out"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    with ucp.open(path) as opened:
        assert "exp_avg" not in opened.parameters["0.weight"].states
    names.write_text(json.dumps(groups))
    assert commands.main(["inspect", str(path), "--param-names", str(names)]) == 0
    assert convert_command.main([str(path), str(out), "--param-names", str(names)]) == 0
    merged = ["merge", str(path), str(path), str(tmp_path / "merged"), "--optimizer", "from=1"]
    assert commands.main([*merged, "--param-names", str(names)]) == 0
    for place in (out, tmp_path / "merged"):
        with ucp.open(place) as opened:
            for name, parameter in own.items():
                assert torch.equal(opened.read(name, "exp_avg"), optimizer.state[parameter]["exp_avg"])
    for text, says in (("{}", "holds no list of lists of names"), ("[[1]]", "such as"), ("[", "is not valid JSON")):
        names.write_text(text)
        assert commands.main(["inspect", str(path), "--param-names", str(names)]) == 2
        assert says in capsys.readouterr().err
    names.unlink()
    assert commands.main(["inspect", str(path), "--param-names", str(names)]) == 2
    assert "groups.json: cannot be read: No such file" in capsys.readouterr().err


def test_client_state_under_deepspeeds_own_keys_is_refused_there(tmp_path: Path) -> None:
    """It took the place of what the engine loads."""
    model, optimizer = trained()
    path = tmp_path / "run.pt"
    body = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "global_steps": 2}
    torch.save(body, path)
    ucp.convert(path, tmp_path / "same", "deepspeed", "dp=2,zero=1", ds_config={})
    with ucp.open(tmp_path / "same") as opened:
        assert opened.training_state.global_steps == 2
    torch.save({**body, "buffer_names": "mine"}, path)
    with pytest.raises(Unsupported, match="has the key 'buffer_names', under which DeepSpeed's model file"):
        ucp.convert(path, tmp_path / "native", "deepspeed", "dp=2,zero=1", ds_config={})
    ucp.convert(path, tmp_path / "out")
    with ucp.open(tmp_path / "out") as opened:
        assert opened.training_state.client_state["buffer_names"] == "mine"


def test_merges_and_repairs_take_the_options_of_reading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = trained()
    one, other = model.state_dict(), {name: tensor + 1 for name, tensor in model.state_dict().items()}
    path = tmp_path / "run.pt"
    torch.save({"model": one, "net": other, "args": Unknown({"lr": 0.1})}, path)
    command = ["merge", str(path), str(path), str(tmp_path / "out")]
    assert commands.main(command) == 2
    assert "--skip-unknown-objects" in capsys.readouterr().err
    assert commands.main([*command, "--skip-unknown-objects"]) == 2
    assert "--model-key model" in capsys.readouterr().err
    assert commands.main([*command, "--skip-unknown-objects", "--model-key", "net"]) == 0
    with ucp.open(tmp_path / "out") as opened:
        assert torch.equal(opened.read("0.weight"), other["0.weight"])
    keys = ["--skip-unknown-objects", "--model-key", "net"]
    assert commands.main(["repair", str(path), str(tmp_path / "fixed"), *keys]) == 2
    assert "lost no file" in capsys.readouterr().err


class Unknown(dict[str, Any]):
    """A program's own class."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rank, self.table = 3, torch.arange(4)


def test_unknown_classes_are_refused_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = trained()
    body = {
        "model": model.state_dict(),
        "args": Unknown({"lr": 0.1}),
        "how": Unknown,
        "optimizer": optimizer.state_dict(),
    }
    path = tmp_path / "run.pt"
    torch.save(body, path)
    with pytest.raises(UnsafePickle, match=r"Unknown, which is not on the list.*--skip-unknown-objects"):
        ucp.open(path)
    with ucp.open(path, options={"skip_unknown_objects": True}) as opened:
        kept = opened.training_state.client_state
        assert kept["args"]["rank"] == 3
        assert kept["args"]["lr"] == 0.1
        assert torch.equal(kept["args"]["table"], torch.arange(4))
        assert kept["how"] is None
    assert "objects of tests.formats.torch_file.test_files.Unknown are left out" in caplog.text
    assert convert_command.main([str(path), str(tmp_path / "out"), "--skip-unknown-objects"]) == 0
    is_saved(path, model, optimizer, options={"skip_unknown_objects": True})


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = tmp_path / "run.pt"
    for body, says in (
        ([1, 2], "holds a list"),
        ({}, "no model's state dict"),
        ({"a": 1}, r"the keys 'a' and no model's"),
        (optimizer.state_dict(), "an optimizer's state alone"),
        (torch.arange(3), "holds a TensorRef"),
    ):
        torch.save(body, path)
        with pytest.raises(NotACheckpoint, match=says):
            ucp.open(path)
    path.write_bytes(b"no torch file at all")
    with pytest.raises(DamagedCheckpoint, match=r"not a file that torch\.save wrote"):
        ucp.open(path)
    torch.save({"model": model.state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DamagedCheckpoint):
        ucp.open(path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(NotACheckpoint, match="is a file; a checkpoint is a folder, or a file"):
        ucp.open(tmp_path / "notes.txt")


def test_a_file_that_is_a_part_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A listing of it was empty, and a check called it damaged."""
    _, optimizer = trained()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    for command in ("ls", "verify", "inspect"):
        assert commands.main([command, str(tmp_path / "optimizer.pt")]) == 2
        assert "holds an optimizer's state alone" in capsys.readouterr().err
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "run")
    (file,) = (tmp_path / "run").glob("*.distcp")
    assert commands.main(["ls", str(file)]) == 2
    told = f"is a single file in the folder of a checkpoint ('dcp'); give that folder, '{tmp_path / 'run'}'"
    assert told in capsys.readouterr().err


def test_flat_parameters_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": {"layer._flat_param": torch.arange(8.0)}}, tmp_path / "run.pt")
    with pytest.raises(Unsupported, match=r"'layer\._flat_param' is FSDP1's flat parameter"):
        ucp.open(tmp_path / "run.pt")


def test_an_optimizer_that_contradicts_itself(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = tmp_path / "run.pt"
    for change, says in (
        (lambda o: o["state"].update({99: {}}), "a state of 99, which is in no param group"),
        (lambda o: o["param_groups"][0]["params"].append(0), "twice in one"),
        (lambda o: o["param_groups"][0].update(params=[1.5, None]), "a state of 0|neither numbers nor names"),
    ):
        states = optimizer.state_dict()
        change(states)
        torch.save({"model": model.state_dict(), "optimizer": states}, path)
        with pytest.raises(DamagedCheckpoint, match=says):
            ucp.open(path)


def test_a_folder_of_files_is_a_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (9, 10):
        model, optimizer = trained(steps=step)
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, tmp_path / f"s{step}.pt"
        )
    torch.save([1], tmp_path / "data.pt")
    found = listing(tmp_path)
    assert [(e.tag, e.step, e.whole) for e in found.checkpoints] == [("s9.pt", 9, True), ("s10.pt", 10, True)]
    (tmp_path / "data.pt").unlink()
    with ucp.open(tmp_path) as opened:
        assert opened.path.name == "s10.pt"
    assert "by the steps in their names" in caplog.text
    ucp.convert(tmp_path / "s9.pt", tmp_path / "native", "deepspeed", "dp=2,zero=2", ds_config={})
    with ucp.open(tmp_path) as opened:  # a folder goes before files
        assert opened.format == "deepspeed"
