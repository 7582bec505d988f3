"""``ucp merge`` as a user types it: what it refuses, in one line each; masks, metrics, and merges that broke off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ucp
from tests.merging.test_combine import SHAPES, damaged, files, read, saved, weights
from ucp.cli.main import main
from ucp.merging import computed, merge
from ucp.storage.digests import CHUNK


def lora(path: Path, rank: int) -> None:
    """An adapter as PEFT writes them, with as much of its configuration as is read."""
    path.mkdir()
    factors = {"A": torch.zeros(rank, 12), "B": torch.zeros(16, rank)}
    named = {f"base_model.model.0.lora_{k}.weight": factor for k, factor in factors.items()}
    save_file(named, path / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": ["0"]}
    (path / "adapter_config.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sources of every kind that a merge refuses."""
    folder = tmp_path_factory.mktemp("sources")
    for k in range(3):
        saved(folder / f"{k}", k)
    state = weights(0)
    ucp.save({"model": {**state, "more.weight": torch.zeros(3)}}, folder / "more")
    ucp.save({"model": {**state, "model.norm.weight": torch.zeros(17)}}, folder / "wide")
    for k in range(2):
        ucp.save({"model": {**state, "count": torch.tensor([k])}}, folder / f"counted{k}")
        ucp.save({"model": {"w": torch.randn(4, 4).to(torch.float8_e4m3fn)}}, folder / f"quantised{k}")
        lora(folder / f"lora{k}", 3 + k)
    for name, value in (("nan", float("nan")), ("inf", float("-inf"))):
        damaged(folder / name, "model.norm.weight", value)
    for name, value in (("large", 1e38), ("half", 65504.0)):
        damaged(folder / name, "model.norm.weight", value)
    for name, is_tied in (("tied", True), ("apart", False)):
        model = torch.nn.ModuleDict({"embed": torch.nn.Linear(4, 4, False), "head": torch.nn.Linear(4, 4, False)})
        if is_tied:
            model["head"].weight = model["embed"].weight
        ucp.save_training(folder / name, model=model)
    saved(folder / "later", 5, steps=4)
    (folder / "bad.yaml").write_text(f"merge: 1\nsources: {{a: '{folder / '0'}'}}\nparameters:\n  '*': 'a + c'\n")
    return folder


# What is typed after ``ucp merge`` (``/name`` is a source, ``OUT`` the destination), and what the one line has to name.
REFUSED = [
    ("/0 /more OUT", ["'more.weight'", "lacks", "one model"]),
    ("/0 /wide OUT", ["'model.norm.weight'", "[16]", "[17]"]),
    ("/0 /1 OUT --weights 1,-1", ["sum to 0", "normalis"]),
    ("/0 /nan OUT", ["'model.norm.weight'", "nan", "element 7", "allow_nonfinite"]),
    ("/0 /inf OUT", ["'model.norm.weight'", "-inf", "element 7"]),
    ("/0 /nan OUT --method ties --base /1 --density 0.1", ["'model.norm.weight'", "/nan'", "nan", "element 7"]),
    ("/large /large OUT --weights 5,5 --no-normalize", ["would be inf", "element 7", "float32", "allow_nonfinite"]),
    ("/half /half OUT --weights 1,1 --no-normalize --dtype fp16", ["would be inf", "element 7", "float16", "dtype"]),
    ("/0 /1 OUT --weights 2,-1 --optimizer average", ["exp_avg_sq", "negative"]),
    ("/0 /later OUT --optimizer average", ["step", "3", "4", "step max"]),
    ("/0 /1 /2 OUT --method slerp --t 0.5", ["slerp", "between 2", "found 3"]),
    ("/0 /1 OUT --method slerp", ["needs 't'"]),
    ("/0 /1 OUT --method ties --density 0.4", ["ties", "needs a base"]),
    ("/0 /1 OUT --method task", ["task", "needs a base"]),
    ("/0 /1 OUT --base /2", ["linear", "takes no base"]),
    ("/0 /1 OUT --method ties --base /2 --density 0", ["density", "above 0"]),
    ("/lora0 /lora1 OUT --adapter-merge factors", ["rank 3", "4 and 1.5", "factors"]),
    ("/tied /apart OUT", ["'head.weight'", "tied", "stored alike"]),
    ("/quantised0 /quantised1 OUT", ["'w'", "float8_e4m3fn", "quantised"]),
    ("/counted0 /counted1 OUT", ["'count'", "int64", "from=N"]),
    ("/counted0 /counted1 OUT --buffers from=3", ["buffers", "0 to 1, found 2"]),
    ("/counted0 /counted1 OUT --buffers 1", ["--buffers 1", "from=N"]),
    ("/0 /1 OUT --optimizer from=9", ["9|8", "0 to 1|source"]),
    ("/0 /1 OUT --weights 1,2,3", ["3 weights", "2 checkpoints"]),
    ("/0 /1 OUT --weights nan,1", ["finite"]),
    ("/0 /1 OUT --method mwa --penalty 1 --metric loss=1", ["one metric for each of 2", "found 1"]),
    ("/0 /1 OUT --method mwa --penalty 1", ["says no loss", "trainer_state.json", "--metric"]),
    ("/0 /1 OUT --method mwa --penalty 1 --metric rouge=1,2", ["rouge", "loss"]),
    ("/0 /1 OUT --method ema", ["'ema' needs 'beta'"]),
    ("/0 /1 OUT --method mean", ["no method 'mean'", "linear"]),
    ("/0 /1 OUT --mask /2", ["linear", "takes no masks"]),
    ("/0 /1 OUT --method task --base /2 --mask /0", ["1 masks", "2 checkpoints"]),
    ("/0 /1 OUT --dtype int8", ["int8"]),
    ("/0 /1 OUT --max-memory 1MiB", ["memory limit", "1048576"]),
    ("/0 /gone OUT", ["gone", "no such"]),
    ("/0@step9 /1 OUT", ["step9"]),
    ("/0 /1 /1", ["1", "exist|overwrite"]),
    ("OUT --recipe /bad.yaml", ["bad.yaml:4", "'c'|c "]),
]


@pytest.mark.parametrize(("typed", "wanted"), REFUSED, ids=[typed for typed, _ in REFUSED])
def test_refusals(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], typed: str, wanted: list[str]
) -> None:
    before = sorted(there.rglob("*"))
    words = [f"{there}{word}" if word.startswith("/") else word for word in typed.split()]
    code = main(["merge", *(str(tmp_path / "out") if word == "OUT" else word for word in words)])
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    lines = [line for line in said.err.splitlines() if line.strip() and not line.startswith(" ")]
    assert len(lines) == 1, said.err
    for text in wanted:
        assert any(part in lines[0] for part in text.split("|")), lines[0]
    assert (list(tmp_path.iterdir()), sorted(there.rglob("*"))) == ([], before)


def test_masks_say_which_elements_of_a_difference_count(there: Path, tmp_path: Path) -> None:
    masks = []
    for k in range(2):
        draw = torch.Generator().manual_seed(70 + k)
        masks.append({name: torch.rand(shape, generator=draw) < 0.5 for name, shape in SHAPES.items()})
        ucp.save({"model": masks[-1]}, tmp_path / f"mask{k}")
    typed = ["merge", *(str(there / f"{k}") for k in (1, 2)), str(tmp_path / "out"), "--method", "task", "--weights"]
    typed += ["0.6,0.3", "--base", str(there / "0"), "--scale", "0.5"]
    assert main([*typed, "--mask", str(tmp_path / "mask0"), "--mask", str(tmp_path / "mask1"), "--quiet"]) == 0
    x = [{name: tensor.double().numpy() for name, tensor in weights(k).items()} for k in range(3)]
    for name, found in read(tmp_path / "out").items():
        terms = [w * (x[k][name] - x[0][name]) * masks[k - 1][name].numpy() for k, w in ((1, 0.6), (2, 0.3))]
        assert np.array_equal(found, (x[0][name] + 0.5 * (terms[0] + terms[1])).astype(np.float32)), name


def test_metrics_by_loss_and_by_step(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command; the other two sources are in `test_combine.test_metrics_from_the_checkpoints`."""
    three = [str(there / f"{k}") for k in range(3)]
    for metric, penalty, wanted in (
        ("loss=2,1,0.5", "1", [1 / 7, 2 / 7, 4 / 7]),
        ("loss=2,1,0.5", "2", [1 / 21, 4 / 21, 16 / 21]),
        ("step=100,200,300", "1", [1 / 6, 2 / 6, 3 / 6]),
        ("loss=2,1,0.5", "0", [1 / 3, 1 / 3, 1 / 3]),
        ("step", "1", [1 / 3, 1 / 3, 1 / 3]),
    ):
        typed = ["merge", *three, str(tmp_path / "out"), "--method", "mwa", "--metric", metric, "--penalty", penalty]
        assert main([*typed, "--plan", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["weights"] == pytest.approx(wanted)


@pytest.fixture
def large(tmp_path: Path) -> list[Path]:
    """Two sources of several windows."""
    out = []
    for k in range(2):
        draw = torch.Generator().manual_seed(k)
        state = {f"layers.{i}.w": torch.randn(512, 1024, generator=draw) for i in range(12)}
        out.append(tmp_path / f"large{k}")
        ucp.save({"model": state}, out[-1])
    return out


def test_what_broke_off_goes_on_with_what_is_there(
    large: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computing = computed.MergedTensor.read_into
    done: list[int] = []

    def counted(self: Any, offset: int, parts: Any) -> None:
        done.append(sum(map(len, parts)))
        computing(self, offset, parts)

    monkeypatch.setattr(computed.MergedTensor, "read_into", counted)

    def stop(so_far: int, total: int) -> None:
        if so_far >= CHUNK:
            raise KeyboardInterrupt

    how: dict[str, Any] = {"weights": (1, 2), "workers": 1, "max_memory": 24 << 20}
    merge(large, tmp_path / "whole", **how)
    whole = sum(done)
    assert whole >= 24 * CHUNK - 4096
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        merge(large, tmp_path / "out", progress=stop, **how)
    assert not (tmp_path / "out").exists()
    done.clear()
    merge(large, tmp_path / "out", **how)
    assert 0 < sum(done) < 0.75 * whole
    assert files(tmp_path / "out") == files(tmp_path / "whole")

    # Another merge to the same place takes nothing of it.
    with pytest.raises(KeyboardInterrupt):
        merge(large, tmp_path / "other", progress=stop, **how)
    done.clear()
    merge(large, tmp_path / "other", **{**how, "weights": (2, 1)})
    assert sum(done) == whole
    merge(large, tmp_path / "turned", **{**how, "weights": (2, 1)})
    assert files(tmp_path / "other") == files(tmp_path / "turned")


def test_a_source_that_changes_after_a_merge_broke_off(large: list[Path], tmp_path: Path) -> None:
    def stop(so_far: int, total: int) -> None:
        if so_far >= CHUNK:
            raise KeyboardInterrupt

    how: dict[str, Any] = {"workers": 1, "max_memory": 24 << 20}
    with pytest.raises(KeyboardInterrupt):
        merge(large, tmp_path / "out", progress=stop, **how)
    shutil.rmtree(large[1])
    ucp.save({"model": {f"layers.{i}.w": torch.full((512, 1024), 3.0) for i in range(12)}}, large[1])
    merge(large, tmp_path / "out", **how)
    merge(large, tmp_path / "fresh", **how)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
