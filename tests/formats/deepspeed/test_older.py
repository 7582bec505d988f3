"""Checkpoints that an older DeepSpeed wrote, in an environment of its own (``older/make.py``), read exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ucp
from ucp.errors import DamagedCheckpoint, Unsupported

OLDER = sorted(p.parent for p in Path(__file__).parent.glob("older/*/truth.safetensors"))


def test_there_are_some() -> None:
    assert {p.name.split("-")[1] for p in OLDER} == {"z0", "z1", "z2", "z3"}


@pytest.mark.parametrize("folder", OLDER, ids=lambda p: p.name)
def test_every_tensor_is_the_engines(folder: Path) -> None:
    truth = load_file(folder / "truth.safetensors")
    with ucp.open(folder) as checkpoint:
        found = {f"{n}|{s}" for n, i in checkpoint.parameters.items() if i.kind != "buffer" for s in i.states}
        assert found == set(truth)
        for key, tensor in truth.items():
            name, state = key.split("|")
            read = checkpoint.read(name, state)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor), key
        assert checkpoint.read("seen").item() == 3
        assert all(i.scalars["step"] == 3 for i in checkpoint.parameters.values() if i.kind == "parameter")
        state = checkpoint.training_state
        made = json.loads((folder / "made_with.json").read_text())
        ranks = made.get("ranks", 2)
        assert (state.global_steps, state.global_samples, state.dp_world_size) == (3, 6 * ranks, ranks)
        assert [g.options["weight_decay"] for g in state.param_groups if g.options][:2] == [0.1, 0.0]
        assert state.client_state == {"note": "older"}
        # None of them says it in its config. DeepSpeed clips by itself since 0.19.3.
        assert state.clip_grad == (1.0 if folder.name.startswith("0.19") else 0.0)


@pytest.mark.parametrize("name", ["0.15.4-z1-bf16", "0.15.4-z2-fp16"])
def test_experts_files_without_an_optimizer_do_not_make_it_stage_0(tmp_path: Path, name: str) -> None:
    """As releases before 0.18 leave them for models with experts, at every stage."""
    source = next(folder for folder in OLDER if folder.name == name)
    shutil.copytree(source, tmp_path / "run")
    beside = tmp_path / "run/global_step3/expp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer": None}, beside)
    truth = load_file(source / "truth.safetensors")
    with ucp.open(tmp_path / "run") as checkpoint:
        assert checkpoint.layout.zero == int(name[8])
        assert torch.equal(checkpoint.read("up.weight", "exp_avg"), truth["up.weight|exp_avg"])
    torch.save({"optimizer": {"state": {}, "param_groups": []}}, beside)
    with pytest.raises(DamagedCheckpoint, match="files of two checkpoints are mixed"):
        ucp.open(tmp_path / "run")


def test_optimizer_files_whose_parameters_nothing_names_are_refused(tmp_path: Path) -> None:
    """As DeepSpeed 0.16 saves models with experts; their weights alone would be half of the checkpoint."""
    shutil.copytree(next(folder for folder in OLDER if folder.name == "0.15.4-z1-bf16"), tmp_path / "run")
    path = tmp_path / "run/global_step3/mp_rank_00_model_states.pt"
    model = torch.load(path, weights_only=False)
    del model["param_shapes"]
    torch.save(model, path)
    with pytest.raises(
        Unsupported, match="has no 'param_shapes', which say what ZeRO's optimizer files beside it hold"
    ):
        ucp.open(tmp_path / "run")


class TestMiCS:
    """Only the first of the groups that hold a copy each saves (``mics_shard_size``)."""

    NAME = "0.18.9-z3-bf16-mics"

    def copy(self, to: Path, **changes: object) -> Path:
        """The checkpoint with its model files' keys and MiCS' size changed."""
        shutil.copytree(next(folder for folder in OLDER if folder.name == self.NAME), to)
        size = changes.pop("mics_shard_size", 2)
        for path in to.glob("global_step3/*_model_states.pt"):
            model = torch.load(path, weights_only=False) | changes
            model["ds_config"]["zero_optimization"]["mics_shard_size"] = size
            torch.save(model, path)
        return to

    def test_its_ranks_are_all_that_trained(self) -> None:
        with ucp.open(next(folder for folder in OLDER if folder.name == self.NAME)) as checkpoint:
            assert str(checkpoint.layout) == "dp=4,zero=3"

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"mics_shard_size": -1}, "2 of 4 model files are missing"),
            ({"mics_shard_size": 1}, "there is a file of rank 1"),
            ({"mics_shard_size": 3}, "4 data-parallel ranks saved, which make no MiCS groups of 3"),
            ({"mics_shard_size": "x"}, "invalid literal"),
            ({"mics_shard_size": 10**12}, "make no MiCS groups"),
            ({"mics_shard_size": 10**12, "dp_world_size": 10**12}, "files are missing"),
        ],
    )
    def test_what_cannot_be(self, tmp_path: Path, changes: dict[str, object], words: str) -> None:
        with pytest.raises(DamagedCheckpoint, match=words):
            ucp.open(self.copy(tmp_path / "run", **changes))

    def test_slices_of_tensor_parallelism(self, tmp_path: Path) -> None:
        run = self.copy(tmp_path / "run", mp_world_size=2)
        for path in list(run.glob("global_step3/*.pt")):
            other = path.with_name(path.name.replace("mp_rank_00", "mp_rank_01"))
            torch.save(torch.load(path, weights_only=False), other)  # its archive says its name
        with pytest.raises(Unsupported, match=r"MiCS .* together with tensor or pipeline parallelism"):
            ucp.open(run)

    @pytest.mark.parametrize("kind", ["model", "optim"])
    def test_a_rank_whose_file_is_missing(self, tmp_path: Path, kind: str) -> None:
        run = self.copy(tmp_path / "run")
        next(run.glob(f"global_step3/*zero_pp_rank_1_*{kind}*")).unlink()
        with pytest.raises(DamagedCheckpoint, match=rf"1 of 2 {kind}\w* files are missing"):
            ucp.open(run)

    @pytest.mark.parametrize("layout", ["dp=3,zero=3", "dp=2,zero=1", "dp=1,zero=0"])
    def test_what_it_becomes_is_no_longer_mics(self, tmp_path: Path, layout: str) -> None:
        """Nor can DeepSpeed since 0.19 read a config that asks for it."""
        run = self.copy(tmp_path / "run")
        ucp.convert(run, tmp_path / "out", to="deepspeed", layout=layout)
        truth = load_file(run / "truth.safetensors")
        with ucp.open(tmp_path / "out") as checkpoint:
            assert str(checkpoint.layout) == layout
            assert "mics_shard_size" not in checkpoint.training_state.config["zero_optimization"]
            assert [key for key, t in truth.items() if not torch.equal(checkpoint.read(*key.split("|")), t)] == []
