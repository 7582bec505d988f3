"""Model folders as checkpoints: what transformers, safetensors and torch wrote, and what is wrong with damaged ones."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ucp
from tests.slow_cases import slow_but
from tests.spec.models import MODELS, names_of
from ucp.errors import DamagedCheckpoint, Mismatch, NotACheckpoint, UnsafePickle, Unsupported

INDEX = "model.safetensors.index.json"
SHARDED = ("llama-bias-tied", "mixtral", "t5")


def module_of(model: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return MODELS[model].make("cpu", **more)


def own(module: nn.Module) -> dict[str, torch.Tensor]:
    """What the module holds, every tensor once."""
    names = names_of(module).shapes
    return {name: tensor for name, tensor in module.state_dict().items() if name in names}


def assert_holds(folder: Path, module: nn.Module) -> None:
    with ucp.open(folder) as checkpoint:
        expected = own(module)
        assert set(checkpoint.parameters) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.read(name), tensor), name
            assert checkpoint.read(name).dtype == tensor.dtype
        for alias, owner in names_of(module).aliases.items():
            assert alias in checkpoint.parameters[owner].aliases
            assert torch.equal(checkpoint.read(alias), expected[owner])


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    module_of("llama").save_pretrained(tmp_path / "model", max_shard_size="12KB")
    assert len(list((tmp_path / "model").glob("model-*"))) > 2
    return tmp_path / "model"


def edit_index(folder: Path, **changes: Any) -> dict[str, Any]:
    path = folder / INDEX
    body = json.loads(path.read_text())
    body.update(changes)
    path.write_text(json.dumps(body))
    return body


@pytest.mark.parametrize(
    "model",
    slow_but(
        ("llama-bias-tied", "mixtral"),
        ("gpt2", "gpt_neox", "llama-bias-tied", "mixtral", "qwen3_moe", "deepseek_v3", "t5"),
    ),
)
def test_what_transformers_writes_has_the_modules_own_names(model: str, tmp_path: Path) -> None:
    module = module_of(model)
    module.save_pretrained(tmp_path, **({"max_shard_size": "10KB"} if model in SHARDED else {}))
    assert (tmp_path / INDEX).is_file() == (model in SHARDED)
    assert_holds(tmp_path, module)
    with ucp.open(tmp_path) as checkpoint:
        assert (checkpoint.format, str(checkpoint.layout)) == ("huggingface", "dp=1,zero=0")
        assert checkpoint.catalog.writer.startswith("transformers 5")
        assert {state for info in checkpoint.parameters.values() for state in info.states} == {"param"}


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_with_tied_parameters(legacy: bool, tmp_path: Path) -> None:
    module = module_of("t5")
    module.config.save_pretrained(tmp_path)
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert_holds(tmp_path, module)


def test_several_torch_files(tmp_path: Path) -> None:
    module = module_of("mixtral")
    module.save_pretrained(tmp_path / "theirs")
    tensors = list(load_file(tmp_path / "theirs/model.safetensors").items())
    folder = tmp_path / "model"
    folder.mkdir()
    module.config.save_pretrained(folder)
    files = [f"pytorch_model-{k:05d}-of-00003.bin" for k in (1, 2, 3)]
    for k, file in enumerate(files):
        torch.save(dict(tensors[k::3]), folder / file)
    weight_map = {name: files[k % 3] for k, (name, _) in enumerate(tensors)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_holds(folder, module)
    (folder / files[2]).unlink()
    with pytest.raises(DamagedCheckpoint, match=r"pytorch_model-00003-of-00003\.bin: is missing"):
        ucp.open(folder)


def test_pickles_are_read_with_the_allow_list(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2), "evil": os.getcwd}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafePickle):
        ucp.open(tmp_path)
    torch.save({"w": torch.zeros(2), "epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Unsupported, match=r"pytorch_model\.bin: 'epoch' is a int, not a tensor"):
        ucp.open(tmp_path)
    torch.save([torch.zeros(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(DamagedCheckpoint, match="holds a list, not a state dict"):
        ucp.open(tmp_path)


class TestDamage:
    def test_a_lost_shard(self, sharded: Path) -> None:
        last = sorted(sharded.glob("model-*"))[-1]
        last.unlink()
        with pytest.raises(DamagedCheckpoint, match=f"{last.name}: is missing, and '{INDEX}' lists tensors in it"):
            ucp.open(sharded)

    def test_a_lost_shard_that_the_index_has_forgotten_too(self, sharded: Path) -> None:
        last = sorted(sharded.glob("model-*"))[-1]
        last.unlink()
        weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
        edit_index(sharded, weight_map={n: f for n, f in weight_map.items() if f != last.name})
        with pytest.raises(DamagedCheckpoint, match=f"lists no tensor in '{last.name}', though it lists some in"):
            ucp.open(sharded)

    def test_a_lost_index(self, sharded: Path) -> None:
        (sharded / INDEX).unlink()
        with pytest.raises(NotACheckpoint, match="an index of several"):
            ucp.open(sharded)

    def test_a_truncated_shard(self, sharded: Path) -> None:
        last = sorted(sharded.glob("model-*"))[-1]
        last.write_bytes(last.read_bytes()[:-1])
        with pytest.raises(DamagedCheckpoint, match=f"{last.name}: the file is truncated"):
            ucp.open(sharded)

    def test_tensors_that_are_elsewhere_or_not_listed(self, sharded: Path) -> None:
        weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
        edit_index(sharded, weight_map={**weight_map, "model.norm.weight": files[0]})
        with pytest.raises(DamagedCheckpoint, match=r"lists 'model\.norm\.weight' in it, but it has no such tensor"):
            ucp.open(sharded)
        edit_index(sharded, weight_map={n: f for n, f in weight_map.items() if n != "model.norm.weight"})
        with pytest.raises(DamagedCheckpoint, match=r"it holds 'model\.norm\.weight', but '.*' does not list that"):
            ucp.open(sharded)

    def test_files_of_two_models(self, sharded: Path) -> None:
        stray = sharded / "model-00002-of-00002.safetensors"
        shutil.copy(sorted(sharded.glob("model-*"))[0], stray)
        with pytest.raises(DamagedCheckpoint, match=f"lists no tensor in '{stray.name}', which is in the folder"):
            ucp.open(sharded)
        stray.rename(sharded / "model.safetensors")
        with pytest.raises(DamagedCheckpoint, match=f"holds 'model.safetensors' and '{INDEX}', two models"):
            ucp.open(sharded)
        (sharded / INDEX).unlink()
        with pytest.raises(DamagedCheckpoint, match=f"no '{INDEX}' says which of them is the model"):
            ucp.open(sharded)

    @pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "", 3])
    def test_an_index_that_leads_elsewhere(self, sharded: Path, place: Any) -> None:
        edit_index(sharded, weight_map={"w": place})
        with pytest.raises(DamagedCheckpoint, match="which is no name of a file in this folder"):
            ucp.open(sharded)

    def test_an_index_that_is_none(self, sharded: Path) -> None:
        edit_index(sharded, weight_map={})
        with pytest.raises(DamagedCheckpoint, match="has no 'weight_map'"):
            ucp.open(sharded)
        (sharded / INDEX).write_text("{")
        with pytest.raises(DamagedCheckpoint, match=f"{INDEX}: is not valid JSON"):
            ucp.open(sharded)

    def test_a_total_size_that_is_wrong_is_told(self, sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
        edit_index(sharded, metadata={"total_size": 7})
        with caplog.at_level(logging.WARNING):
            ucp.open(sharded).close()
        assert "'total_size' is 7, and the tensors it lists have" in caplog.text

    def test_a_missing_expert_and_another_models_config(self, tmp_path: Path) -> None:
        module_of("mixtral").save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        lost = "model.layers.1.block_sparse_moe.experts.4.w3.weight"
        save_file({n: t for n, t in tensors.items() if n != lost}, tmp_path / "model.safetensors")
        with pytest.raises(
            DamagedCheckpoint, match=f"made of 10 parameters .* 1 of them are not there, such as '{lost}'"
        ):
            ucp.open(tmp_path)
        save_file(tensors, tmp_path / "model.safetensors")
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 21}))
        with pytest.raises(Mismatch, match="the spec's sizes are another model's"):
            ucp.open(tmp_path)


class TestWhichFormat:
    def test_a_manifest_comes_first(self, tmp_path: Path) -> None:
        module_of("gpt2").save_pretrained(tmp_path / "model")
        ucp.convert(tmp_path / "model", tmp_path / "universal")
        with ucp.open(tmp_path / "universal") as checkpoint:
            assert checkpoint.format == "universal"
        (tmp_path / "universal/optimizer.exp_avg.safetensors.index.json").touch()
        (tmp_path / "universal/ucp.json").unlink()
        with pytest.raises(NotACheckpoint):
            ucp.open(tmp_path / "universal")

    @pytest.mark.parametrize("beside", ["latest", "global_step7"])
    def test_weights_beside_a_training_checkpoint_are_not_taken_for_it(self, beside: str, tmp_path: Path) -> None:
        module_of("gpt2").save_pretrained(tmp_path)
        (tmp_path / beside).touch()
        with pytest.raises(NotACheckpoint):
            ucp.open(tmp_path)

    def test_a_folder_of_them_has_no_newest_to_resume_from(self, tmp_path: Path) -> None:
        module_of("gpt2").save_pretrained(tmp_path / "one")
        with pytest.raises(NotACheckpoint):
            ucp.open(tmp_path)
        with ucp.open(tmp_path, tag="one") as checkpoint:
            assert checkpoint.format == "huggingface"


def test_copies_of_tied_parameters_are_one_if_they_are_equal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = module_of("llama-bias-tied")
    module.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, "lm_head.weight": embedding}, tmp_path / "model.safetensors")
    assert_holds(tmp_path, module)
    tensors |= {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding.clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_holds(tmp_path, module)
    tensors["lm_head.weight"] = embedding + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING), ucp.open(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("lm_head.weight"), embedding + 1)
        assert torch.equal(checkpoint.read("model.embed_tokens.weight"), embedding)
    assert "are tied by the config, but differ" in caplog.text


@pytest.mark.parametrize("model", ["gpt2", "mixtral"])
def test_a_base_model_saved_alone_has_the_whole_models_names(model: str, tmp_path: Path) -> None:
    module = module_of(model)
    module.base_model.save_pretrained(tmp_path)
    with ucp.open(tmp_path) as checkpoint:
        expected = {n: t for n, t in own(module).items() if n != "lm_head.weight"}
        assert set(checkpoint.parameters) == set(expected)
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("model", ["gpt2", "mixtral", "t5"])
def test_the_weights_go_into_a_state_dict(model: str, tmp_path: Path) -> None:
    """All names of tied parameters, and stacked experts, whoever cuts them afterwards."""
    module = module_of(model)
    module.save_pretrained(tmp_path)
    torch.manual_seed(1)
    state_dict = MODELS[model].make("cpu").state_dict()
    ucp.load({"model": state_dict}, tmp_path)
    assert state_dict.keys() == module.state_dict().keys()
    assert all(torch.equal(state_dict[name], tensor) for name, tensor in module.state_dict().items())


def test_other_forms_and_formats_hold_the_same(tmp_path: Path) -> None:
    module = module_of("mixtral")
    module.save_pretrained(tmp_path / "model")
    for to, options in (("universal", {}), ("universal", {"virtual": True}), ("dcp", {})):
        dest = tmp_path / f"{to}{len(options)}"
        ucp.convert(tmp_path / "model", dest, to, **options)
        with ucp.open(dest) as checkpoint:
            assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in own(module).items())
    for to in ("deepspeed", "deepspeed-universal"):
        with pytest.raises(Unsupported, match="the source has no optimizer param groups"):
            ucp.convert(tmp_path / "model", tmp_path / "x", to, "dp=2,zero=3" if to == "deepspeed" else None)
        assert not (tmp_path / "x").exists()


def test_a_family_that_no_spec_knows_keeps_its_names(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(3, 2), "b": torch.arange(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    for config in (None, {"model_type": "unheard_of"}, {}):
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        with ucp.open(tmp_path) as checkpoint:
            assert {name: checkpoint.read(name).tolist() for name in checkpoint.parameters} == {
                name: tensor.tolist() for name, tensor in tensors.items()
            }


def test_a_spec_of_the_callers_fuses_what_the_files_have_apart(tmp_path: Path) -> None:
    """The files of a Llama as the fused parameters of a Phi-3, by a spec that says how."""
    module = module_of("llama")
    module.save_pretrained(tmp_path / "model")
    layer = "model.layers.{i}"
    text = (
        (Path(ucp.__file__).parent / "specs/phi3.yaml").read_text().replace("model: phi3", "model: llama")
        + f"""
names:
  huggingface:
    {layer}.self_attn.qkv_proj.weight:
      to:
        - {layer}.self_attn.q_proj.weight
        - {layer}.self_attn.k_proj.weight
        - {layer}.self_attn.v_proj.weight
    {layer}.mlp.gate_up_proj.weight:
      to:
        - {layer}.mlp.gate_proj.weight
        - {layer}.mlp.up_proj.weight
"""
    )
    (tmp_path / "fused.yaml").write_text(text)
    parts = {"qkv_proj": [f"self_attn.{n}_proj" for n in "qkv"], "gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"]}
    with ucp.open(tmp_path / "model", spec=tmp_path / "fused.yaml") as checkpoint:
        for name in checkpoint.parameters:
            kind = name.split(".")[-2]
            if kind in parts:
                stem = ".".join(name.split(".")[:3])
                pieces = [module.state_dict()[f"{stem}.{p}.weight"] for p in parts[kind]]
                assert torch.equal(checkpoint.read(name), torch.cat(pieces))
            else:
                assert torch.equal(checkpoint.read(name), module.state_dict()[name])
        assert sum(name.split(".")[-2] in parts for name in checkpoint.parameters) == 4
    options: dict[str, Any] = {"spec": tmp_path / "fused.yaml", "to": "huggingface"}
    ucp.convert(tmp_path / "model", tmp_path / "again", **options)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("model", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
