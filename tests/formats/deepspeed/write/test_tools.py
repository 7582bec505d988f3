"""DeepSpeed's own tools read what is written: ``zero_to_fp32`` and the converter to its universal format."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ucp
from tests.engines import releases
from tests.formats.deepspeed.write.test_native import ADAMW, BF16, GROUPS, SHAPES, raw_source
from tests.formats.raw import Raw, write_files
from ucp.catalog import Catalog
from ucp.errors import Unsupported
from ucp.formats.deepspeed.write import native, universal_folder
from ucp.parallel.mesh import Layout
from ucp.storage.files import Files
from ucp.transfer.reader import Reader
from ucp.transfer.targets import TargetFile

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def as_the_release_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own tools run here, and programs that are started from here."""
    for name, value in releases.environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("dp", [1, 3, 5])
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_to_fp32(tmp_path: Path, stage: int, dp: int) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    raw = raw_source(tmp_path / "source")
    config = {**ADAMW, **BF16, "zero_optimization": {"sub_group_size": 50}}
    save(raw.catalog, tmp_path / "out", native.plan(raw.catalog, Layout(dp=dp, zero=stage), config))
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "out"))
    for name in SHAPES:
        assert torch.equal(found[name], raw.tensor(name, "param"))
    assert torch.equal(found["tied.weight"], raw.tensor("embed.weight", "param"))
    assert torch.equal(found["frozen.weight"].isnan(), raw.tensor("frozen.weight", "param").isnan())
    assert torch.equal(found["frozen.weight"].nan_to_num(), raw.tensor("frozen.weight", "param").float().nan_to_num())
    assert torch.equal(found["mask"].bool(), raw.tensor("mask", "param"))


@pytest.mark.parametrize("dp", [1, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_converter_to_universal(tmp_path: Path, stage: int, dp: int) -> None:
    """What DeepSpeed's converter makes of a native checkpoint written here is what is written here as universal."""
    from deepspeed.checkpoint.ds_to_universal import main

    if stage == 3 and not releases.is_pinned():
        pytest.skip(releases.without("its converter takes stage 3's padding for elements"))
    raw = raw_source(tmp_path / "source")
    save(raw.catalog, tmp_path / "out", native.plan(raw.catalog, Layout(dp=dp, zero=stage)))
    save(raw.catalog, tmp_path / "ours", universal_folder.plan(raw.catalog))
    arguments = {"input_folder": str(tmp_path / "out" / "tag"), "output_folder": str(tmp_path / "theirs" / "tag")}
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    (tmp_path / "theirs" / "tag").mkdir(parents=True)
    main(argparse.Namespace(**arguments, **options, inject_missing_state=True))
    for names in GROUPS:
        for name in names:
            theirs, ours = (tmp_path / side / "tag" / "zero" / name for side in ("theirs", "ours"))
            assert {path.name for path in theirs.iterdir()} - {"step.pt"} == {"fp32.pt", "exp_avg.pt", "exp_avg_sq.pt"}
            for path in theirs.iterdir():
                wanted, found = (torch.load(p, weights_only=False) for p in (path, ours / path.name))
                if path.name == "step.pt":
                    assert torch.equal(wanted, found)
                    continue
                if isinstance(wanted, dict):
                    assert set(found) == set(wanted) == {"param", "cat_dim"}
                    assert found["cat_dim"] == wanted["cat_dim"]
                    wanted = wanted["param"]
                assert torch.equal(wanted.reshape(-1), found["param"].reshape(-1))
                assert found["param"].shape == SHAPES[name]
    is_read_back(raw, tmp_path / "ours")
    if stage < 3 or dp == 1:
        is_read_back(raw, tmp_path / "theirs" / "tag")
    else:
        with pytest.raises(Unsupported, match=r"'frozen\.weight' is not whole in it"):
            ucp.open(tmp_path / "theirs" / "tag")


def is_read_back(raw: Raw, path: Path) -> None:
    """DeepSpeed's universal folder as a source: every tensor, step, group and name of what it was made of."""
    with ucp.open(path) as opened:
        assert opened.format == "deepspeed-universal"
        source = raw.catalog
        for name, info in source.parameters.items():
            if info.kind != "parameter":
                continue
            assert opened.parameters[name].states.keys() == info.states.keys()
            assert opened.parameters[name].scalars == info.scalars
            assert opened.parameters[name].aliases == info.aliases
            for state in info.states:
                assert torch.equal(opened.read(name, state), raw.tensor(name, state)), (name, state)
        groups = opened.training_state.param_groups
        assert [group.names for group in groups] == [tuple(names) for names in GROUPS]
        assert torch.equal(opened.read("mask").bool(), raw.tensor("mask", "param"))
        assert opened.training_state.global_steps == source.training_state.global_steps


def save(catalog: Catalog, folder: Path, files: list[TargetFile]) -> None:
    (folder / "tag").mkdir(parents=True)
    with Files() as source:
        write_files(Reader(catalog, source), folder / "tag", files)
    (folder / "latest").write_text("tag")


def test_the_script_that_deepspeed_puts_beside_is_there_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = Path(__file__).parents[1] / "older/0.15.4-z1-bf16"
    ucp.convert(older, tmp_path / "native", to="deepspeed", layout="dp=3,zero=3")
    script = tmp_path / "native/zero_to_fp32.py"
    (tmp_path / "model").mkdir()  # before 0.16 the script does not make it
    command = [sys.executable, script, tmp_path / "native", tmp_path / "model", "--safe_serialization"]
    subprocess.run(command, check=True, capture_output=True)
    found, truth = load_file(tmp_path / "model/model.safetensors"), load_file(older / "truth.safetensors")
    assert {f"{name}|param" for name in found} - {"seen|param"} == {key for key in truth if key.endswith("|param")}
    for name in set(found) - {"seen"}:
        assert torch.equal(found[name], truth[f"{name}|param"].float())
    ucp.convert(older, tmp_path / "stage0", to="deepspeed", layout="dp=3,zero=0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ucp.convert(older, tmp_path / "without", to="deepspeed", layout="dp=3,zero=3")
    for folder in ("stage0", "without"):
        assert {path.name for path in (tmp_path / folder).iterdir()} == {"global_step3", "latest"}
