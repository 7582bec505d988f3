"""A format that another package registers does all that a built-in one does, with no line changed in this package."""

from __future__ import annotations

import inspect
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ucp
from tests.formats import raw
from ucp import formats
from ucp.cli import convert as convert_command
from ucp.cli import main as commands
from ucp.errors import BadArgument, DamagedCheckpoint, NotACheckpoint

ROOT = Path(ucp.__file__).resolve().parents[1]
TOY = Path(__file__).with_name("npz_toy.py")


def distribution(site: Path, name: str, entry: str, source: str | None = None) -> None:
    """What an installer leaves of a package of one module that registers a format."""
    (site / f"{name}-1.0.dist-info").mkdir(parents=True)
    (site / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (site / f"{name}-1.0.dist-info" / "entry_points.txt").write_text(f"[{formats.GROUP}]\n{entry}\n")
    if source is not None:
        (site / f"{name}.py").write_text(source)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for packages; formats are looked for again, and forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    formats.registered.cache_clear()
    before = set(sys.modules)
    yield folder
    formats.registered.cache_clear()
    for name in [name for name in sys.modules if name not in before and name.startswith("toy_")]:
        del sys.modules[name]


@pytest.fixture
def installed(site: Path) -> Path:
    distribution(site, "toy_npz", "npz = toy_npz:FORMAT", TOY.read_text())
    return site


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 10).reshape(2, 5)).square().sum().backward()
        optimizer.step()


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    """A checkpoint of the toy format, of a model that is trained, and what it was made of."""
    model, optimizer = trained(3)
    ucp.save_training(tmp_path / "saved", model=model, optimizer=optimizer, step=3)
    (saved,) = [p for p in (tmp_path / "saved", *(tmp_path / "saved").iterdir()) if (p / "ucp.json").is_file()]
    ucp.convert(saved, tmp_path / "run" / "step3", to="npz", note="a toy")
    return tmp_path / "run", model, optimizer


def test_it_is_small() -> None:
    assert len(TOY.read_text().splitlines()) < 120


def test_written_and_read_by_numpy(run: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    folder, model, optimizer = run
    with np.load(folder / "step3" / "tensors.npz") as found:
        arrays = {name: found[name] for name in found.files}
    for name, parameter in model.named_parameters():
        assert np.array_equal(arrays[f"{name}:param"], parameter.detach().numpy())
        for state in ("exp_avg", "exp_avg_sq"):
            assert np.array_equal(arrays[f"{name}:{state}"], optimizer.state[parameter][state].numpy())
    assert json.loads((folder / "step3" / "facts.json").read_text())["note"] == "a toy"


def test_opened_and_converted_back(run: tuple[Path, nn.Module, torch.optim.Optimizer], tmp_path: Path) -> None:
    folder, model, _ = run
    report = ucp.convert(folder, tmp_path / "universal")
    assert (report.source_format, report.to) == ("npz", "universal")
    ucp.convert(folder, tmp_path / "pointer", virtual=True)
    for path in (folder, folder / "step3", tmp_path / "universal", tmp_path / "pointer"):
        with ucp.open(path) as checkpoint:
            assert checkpoint.format == ("npz" if path in (folder, folder / "step3") else "universal")
            assert checkpoint.training_state.global_steps == 3
            for name, parameter in model.named_parameters():
                assert torch.equal(checkpoint.read(name), parameter.detach())
                assert torch.equal(checkpoint.read(name, region=(slice(1, 3),)), parameter.detach()[1:3])


def test_resumed(run: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    """Training goes on as it would have without the checkpoint."""
    folder, model, optimizer = run
    resumed, its = trained(1)
    report = ucp.load_training(folder, model=resumed, optimizer=its)
    assert report.step == 3
    train(model, optimizer, 2)
    train(resumed, its, 2)
    for left, right in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)


def test_weights_alone_are_loaded(run: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    folder, model, _ = run
    weights = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    ucp.load(weights, folder)
    for name, value in model.state_dict().items():
        assert torch.equal(weights[name], value)


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = commands.main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_looked_at(
    run: tuple[Path, nn.Module, torch.optim.Optimizer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model, _ = run
    elements = sum(p.numel() for p in model.parameters())
    _, found = command(capsys, "ls", folder)
    (entry,) = found["checkpoints"]
    assert (entry["format"], entry["step"], entry["whole"]) == ("npz", 3, True)
    _, found = command(capsys, "inspect", folder)
    assert (found["format"], found["elements"], found["holders"][0]["name"]) == ("npz", elements, "tensors.npz")
    code, found = command(capsys, "verify", folder)
    assert (code, found["whole"], found["checked"]["digested_by_zip"] > 0) == (0, True, True)
    _, found = command(capsys, "plan", folder, "--layout", "dp=2,zero=1")
    assert (found["bytes"], len(found["ranks"])) == (3 * 4 * elements, 2)
    code, found = command(capsys, "diff", folder, folder / "step3")
    assert code == 0
    _, found = command(capsys, "report", folder, "-o", tmp_path / "page.html", "--plan-layout", "dp=2,zero=1")
    assert found["whole"]
    assert "tensors.npz" in (tmp_path / "page.html").read_text()


def test_damage_is_found(
    run: tuple[Path, nn.Module, torch.optim.Optimizer], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model, _ = run
    file = folder / "step3" / "tensors.npz"
    content = bytearray(file.read_bytes())
    at = content.index(model[0].weight.detach().numpy().tobytes())
    content[at] ^= 1
    file.write_bytes(content)
    code, found = command(capsys, "verify", folder)
    assert (code, found["findings"][0]["kind"]) == (1, "digest")
    file.write_bytes(content[:-30])
    code, found = command(capsys, "verify", folder)
    assert code == 1


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, "it lacks 'parameters'"),
        ({"parameters": {"0.weight": 1}}, "TypeError"),
        ({"parameters": {"nobody": ["frozen", {}, []]}}, "it lacks "),
        ([], "TypeError"),
    ],
)
def test_what_its_reader_does_not_expect_is_damage_of_the_files(
    run: tuple[Path, nn.Module, torch.optim.Optimizer], capsys: pytest.CaptureFixture[str], facts: Any, reason: str
) -> None:
    """Whatever another package's reader raises: the one block that all formats are read in turns it into an error."""
    folder = run[0] / "step3"
    (folder / "facts.json").write_text(json.dumps(facts))
    with pytest.raises(DamagedCheckpoint, match=re.escape(reason)) as caught:
        ucp.open(folder)
    assert str(caught.value).startswith(f"{folder}: as a checkpoint of the format 'npz' it is not what is written")
    assert commands.main(["inspect", str(folder)]) == 2
    assert commands.main(["verify", str(folder)]) == 1
    capsys.readouterr()


def test_the_command_in_a_process_of_its_own(installed: Path, tmp_path: Path) -> None:
    """Found through its package's metadata alone, and its option given as one of another package's formats."""
    ucp.save({"weight": torch.arange(6.0)}, tmp_path / "source")
    arguments = [tmp_path / "source", tmp_path / "out", "--to", "npz", "--option", "note=from a shell"]
    done = subprocess.run(
        [sys.executable, "-m", "ucp.cli.convert", *map(str, arguments)],
        env={"PYTHONPATH": f"{installed}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "to npz in" in done.stdout
    assert json.loads((tmp_path / "out" / "facts.json").read_text())["note"] == "from a shell"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nte": "a"}, r"'npz' takes no option 'nte'; did you mean 'note'\?"),
        ({"note": 3}, "note: a text is expected, and it is 3"),
        ({"layout": "dp=2"}, "a layout is for 'deepspeed' or 'megatron' only: 'npz' checkpoints have none"),
        ({"virtual": True}, "the virtual form exists in the universal format only, not in 'npz'"),
        ({"note": "a", "options": {"note": "b"}}, "'note' is given twice"),
    ],
)
def test_its_options_are_checked(installed: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    raw.write_consolidated(tmp_path / "source", raw.make(tmp_path / "raw").catalog)
    with pytest.raises(BadArgument, match=message):
        ucp.convert(tmp_path / "source", tmp_path / "out", to="npz", **options)


def test_options_of_the_shell(capsys: pytest.CaptureFixture[str], installed: Path) -> None:
    for pair, message in (("note", "write NAME=VALUE"), ("tone=1", "with the name of an option; known are")):
        assert convert_command.main(["a", "b", "--to", "npz", "--option", pair]) == 2
        assert message in capsys.readouterr().err


def test_unknown_folders_are_told_what_was_looked_for(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotACheckpoint, match=r"'\.metadata', a Hugging Face .*, a toy one 'tensors\.npz'"):
        ucp.open(tmp_path / "empty")
    with pytest.raises(BadArgument, match=r"supported are .*'huggingface', 'npz'"):
        ucp.convert(tmp_path / "empty", tmp_path / "out", to="tar")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, r"'npz' of toy_broken \(toy_broken:FORMAT\) can't be loaded: ModuleNotFoundError: No module named"),
        ("import no_such_module", "can't be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
        ("FORMAT = 3", r"is a int, not a ucp\.formats\.base\.Format"),
        ("raise SystemError('boom')", "can't be loaded: SystemError: boom"),
        (TOY.read_text().replace("    sign = ", "    sigh = "), "is left out: Npz has no 'sign'"),
        (TOY.read_text().replace('"npz"', '"dcp"'), "is left out: there is a format or target 'dcp' already"),
    ],
)
def test_a_broken_one_is_a_warning(
    site: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str | None, message: str
) -> None:
    distribution(site, "toy_broken", "npz = toy_broken:FORMAT", source)
    (tmp_path / "empty").mkdir()
    with caplog.at_level(logging.WARNING, "ucp"):
        for _ in range(2):
            with pytest.raises(NotACheckpoint, match="no checkpoint was recognised here"):
                ucp.open(tmp_path / "empty")
    (record,) = caplog.records
    assert re.search(message, record.getMessage())


def test_one_that_fails_to_look_is_a_warning(site: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = TOY.read_text().replace("return folder.has_file(FILE)", "return 1 / 0")
    distribution(site, "toy_blind", "npz = toy_blind:FORMAT", source)
    (tmp_path / "empty").mkdir()
    with caplog.at_level(logging.WARNING, "ucp"), pytest.raises(NotACheckpoint):
        ucp.open(tmp_path / "empty")
    assert "empty: the format 'npz' fails to tell whether it is one of its: division by zero" in caplog.text


def test_others_are_not_asked_where_a_built_in_one_will_do(
    site: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    distribution(site, "toy_broken", "npz = toy_broken:FORMAT", "raise SystemError('boom')")
    raw.write_consolidated(tmp_path / "source", raw.make(tmp_path / "raw").catalog)
    ucp.convert(tmp_path / "source", tmp_path / "out")
    commands.main(["inspect", str(tmp_path / "out")])
    assert "toy_broken" not in sys.modules
    assert caplog.records == []


def test_signatures_show_what_formats_declare() -> None:
    """`convert` takes the formats' options as ``**``, and still says what they are."""
    shown = inspect.signature(ucp.convert).parameters
    assert {"virtual", "ds_config", "max_shard_size", "workers", "tag"} <= shown.keys()
    assert (shown["virtual"].default, shown["resume"].default, shown["like"].default) == (False, True, None)
    with pytest.raises(BadArgument, match=r"'universal' takes no option 'virtul'; did you mean 'virtual'\?"):
        ucp.convert("source", "dest", virtul=True)
