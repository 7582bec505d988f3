"""Model folders as they are written: against transformers' save_pretrained, torch's rounding, and peft's own files."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ucp
from tests.formats import raw
from tests.formats.huggingface import engine_jobs
from tests.formats.huggingface.test_read import INDEX, module_of
from tests.slow_cases import slow_but
from tests.spec.models import MODELS
from ucp.cli import convert as command
from ucp.errors import BadArgument, Mismatch, Unsupported
from ucp.formats.huggingface import adapter

EVERY = ("gpt2", "gpt_neox", "llama-bias-tied", "mixtral", "qwen3_moe", "deepseek_v3", "t5", "phi3")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Names, types, shapes and bits."""
    return a.keys() == b.keys() and all(
        (t.dtype, t.shape) == (b[n].dtype, b[n].shape)
        and torch.equal(t.reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8))
        for n, t in a.items()
    )


def all_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def folder_of(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A model folder without a config."""
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A model folder as save_pretrained leaves it."""
    module_of("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("model", slow_but(("gpt2", "mixtral", "t5"), EVERY))
def test_file_by_file_as_save_pretrained_writes(model: str, tmp_path: Path) -> None:
    """From the universal form, whose names are the module's own."""
    more = {"num_experts_per_tok": 2} if model.endswith("moe") else {}
    module = engine_jobs.plain(module_of(model, **more))
    module.save_pretrained(tmp_path / "theirs")
    ucp.convert(tmp_path / "theirs", tmp_path / "universal")
    assert model not in ("mixtral", "qwen3_moe") or any(
        name.endswith("experts.gate_up_proj") for name in all_of(tmp_path / "universal")
    )
    ucp.convert(tmp_path / "universal", tmp_path / "ours", to="huggingface", like=tmp_path / "theirs")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == sorted(
        p.name for p in (tmp_path / "theirs").iterdir()
    )
    assert same(all_of(tmp_path / "ours"), all_of(tmp_path / "theirs"))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    with safe_open(tmp_path / "ours/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    loaded = engine_jobs.plain(MODELS[model].module.from_pretrained(tmp_path / "ours"))
    assert torch.equal(engine_jobs.logits(model, loaded), engine_jobs.logits(model, module))


def test_shards_and_their_index(llama: Path, tmp_path: Path) -> None:
    report = ucp.convert(llama, tmp_path / "ours", to="huggingface", max_shard_size=12_000)
    files = sorted((tmp_path / "ours").glob("model-*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{k:05d}-of-{len(files):05d}.safetensors" for k in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 12_000 or len(load_file(f)) == 1 for f in files)
    index = json.loads((tmp_path / "ours" / INDEX).read_text())
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in all_of(llama).values())
    assert same(all_of(tmp_path / "ours"), all_of(llama))
    assert report.files == len(list((tmp_path / "ours").iterdir()))
    loaded = MODELS["llama"].module.from_pretrained(tmp_path / "ours")
    assert torch.equal(engine_jobs.logits("llama", loaded), engine_jobs.logits("llama", module_of("llama")))


SPECIAL = [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 65519.0, 65520.0, 3e38, 1e-40, 6e-8, float("inf"), float("-inf")]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", None])
def test_element_types_are_torchs_own(dtype: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "a": torch.cat([torch.tensor(SPECIAL), torch.randn(500), torch.tensor([float("nan")])]),
        "scalar": torch.tensor(7.03125),
        "half": torch.randn(5, 3).half(),
        "brain": torch.randn(5, 3).bfloat16(),
        "count": torch.tensor(2**40 + 1),
        "table": torch.randint(-100, 100, (3, 4), dtype=torch.int8),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
    }
    ucp.convert(folder_of(tmp_path / "a", tensors), tmp_path / "b", to="huggingface", dtype=dtype)
    target = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.get(dtype or "")
    expected = {n: t.to(target) if target and t.is_floating_point() else t for n, t in tensors.items()}
    assert same(all_of(tmp_path / "b"), expected)


def test_types_that_cannot_be_rounded_are_refused(tmp_path: Path) -> None:
    for k, tensor in enumerate((torch.zeros(3, dtype=torch.float64), torch.zeros(3).to(torch.float8_e4m3fn))):
        source = folder_of(tmp_path / f"{k}", {"w": tensor})
        with pytest.raises(Mismatch, match=r"'w' .* would lose bits"):
            ucp.convert(source, tmp_path / "out", to="huggingface", dtype="bf16")
        ucp.convert(source, tmp_path / f"{k}-out", to="huggingface")
        assert same(all_of(tmp_path / f"{k}-out"), {"w": tensor})
    with pytest.raises(BadArgument, match="element type 'int4' is not known; known are bf16"):
        ucp.convert(source, tmp_path / "out", to="huggingface", dtype="int4")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_says_the_type_of_the_weights(llama: Path, tmp_path: Path, key: str) -> None:
    config = json.loads((llama / "config.json").read_text())
    config[key] = config.pop("dtype")
    (llama / "config.json").write_text(json.dumps(config))
    ucp.convert(llama, tmp_path / "b", to="huggingface", dtype="bf16")
    assert json.loads((tmp_path / "b/config.json").read_text()) == {**config, key: "bfloat16"}
    loaded = MODELS["llama"].module.from_pretrained(tmp_path / "b")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    ucp.convert(tmp_path / "b", tmp_path / "c", to="huggingface")
    assert (tmp_path / "c/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()


def test_what_is_carried_over_and_what_is_not(llama: Path, tmp_path: Path) -> None:
    kept = ("tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "modeling_own.py")
    left = ("pytorch_model.bin", "training_args.bin", "trainer_state.json", "ucp.json", "optimizer.pt", "README.md")
    like = tmp_path / "like"
    shutil.copytree(llama, like)
    for name in (*kept, *left, INDEX, "adapter_config.json"):
        (like / name).write_bytes(name.encode())
    (like / "folder.json").mkdir()
    ucp.convert(llama, tmp_path / "ours", to="huggingface", like=like)
    own = {"config.json", "generation_config.json", "model.safetensors"}
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {*kept, *own}
    assert all((tmp_path / "ours" / name).read_bytes() == name.encode() for name in kept)


def test_a_like_that_is_none(llama: Path, tmp_path: Path) -> None:
    def convert(like: Path) -> None:
        ucp.convert(llama, tmp_path / "ours", to="huggingface", like=like)

    with pytest.raises(BadArgument, match="nowhere: is no folder"):
        convert(tmp_path / "nowhere")
    like = tmp_path / "like"
    like.mkdir()
    with pytest.raises(BadArgument, match=r"like/config\.json: there is no such file"):
        convert(like)
    (like / "config.json").write_text("[]")
    with pytest.raises(BadArgument, match="is not a JSON object"):
        convert(like)
    (like / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    with pytest.raises(Unsupported, match="is of a quantized model"):
        convert(like)
    assert not (tmp_path / "ours").exists()


def test_a_config_of_another_model(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "like")
    path = tmp_path / "like/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 105}))
    message = r"like/config\.json: makes 'lm_head\.weight' \[105, 24\], and the checkpoint has it as \[101, 24\]"
    with pytest.raises(Mismatch, match=message):
        ucp.convert(llama, tmp_path / "ours", to="huggingface", like=tmp_path / "like")


def test_without_a_config_a_warning_says_what_is_not_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = folder_of(tmp_path / "a", {"w": torch.ones(2)})
    with caplog.at_level(logging.WARNING):
        ucp.convert(source, tmp_path / "b", to="huggingface")
    assert "'--like' would give them" in caplog.text
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["model.safetensors"]


def test_what_the_family_has_and_the_checkpoint_lacks_is_told(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = all_of(llama)
    del tensors["lm_head.weight"]
    source = folder_of(tmp_path / "a", {**tensors, "score.weight": torch.ones(2, 24)})
    with caplog.at_level(logging.WARNING):
        ucp.convert(source, tmp_path / "b", to="huggingface", like=llama)
    assert "the checkpoint has no 'lm_head.weight', which a model of this family has" in caplog.text
    assert "1 parameters that" in caplog.text
    assert "such as 'score.weight'" in caplog.text
    assert same(all_of(tmp_path / "b"), all_of(source))


@pytest.mark.parametrize(("tied", "family"), [(True, "llama"), (False, "llama"), (False, "unheard_of")])
def test_tied_parameters_are_stored_once_where_the_config_ties_them(tied: bool, family: str, tmp_path: Path) -> None:
    """The owner is the checkpoint's choice; the file has the config's."""
    shapes = {"lm_head.weight": (5, 4), "model.norm.weight": (4,)}
    aliases = {"lm_head.weight": ("model.embed_tokens.weight",)}
    made = raw.make(tmp_path / "raw", shapes=shapes, aliases=aliases)
    source = raw.virtual_checkpoint(tmp_path / "source", made)
    like = tmp_path / "like"
    like.mkdir()
    sizes = {"hidden_size": 4, "num_attention_heads": 2, "intermediate_size": 3, "vocab_size": 5}
    (like / "config.json").write_text(json.dumps({"model_type": family, "tie_word_embeddings": tied, **sizes}))
    ucp.convert(source, tmp_path / "ours", to="huggingface", like=like)
    found = all_of(tmp_path / "ours")
    names = {"model.embed_tokens.weight"} if tied else {"model.embed_tokens.weight", "lm_head.weight"}
    assert {n for n in found if "weight" in n} - {"frozen.weight", "model.norm.weight"} == names
    for name in names:
        assert torch.equal(found[name], made.tensor("lm_head.weight", "param"))


def test_experts_that_the_module_has_apart_are_written_as_they_are(tmp_path: Path, caplog: Any) -> None:
    """The names of transformers 4's modules are those of the files."""
    module_of("mixtral").save_pretrained(tmp_path / "theirs")
    source = folder_of(tmp_path / "source", all_of(tmp_path / "theirs"))
    with caplog.at_level(logging.WARNING):
        ucp.convert(source, tmp_path / "ours", to="huggingface", like=tmp_path / "theirs")
    assert caplog.text == ""
    assert same(all_of(tmp_path / "ours"), all_of(tmp_path / "theirs"))


def test_a_base_model_trained_alone(tmp_path: Path) -> None:
    module = module_of("gpt2")
    module.config.save_pretrained(tmp_path / "like")
    source = folder_of(tmp_path / "source", {n: t.clone() for n, t in module.transformer.state_dict().items()})
    ucp.convert(source, tmp_path / "ours", to="huggingface", like=tmp_path / "like")
    loaded = MODELS["gpt2"].module.from_pretrained(tmp_path / "ours")
    assert torch.equal(engine_jobs.logits("gpt2", loaded), engine_jobs.logits("gpt2", module))


def as_megatron(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """What Megatron-DeepSpeed's pipeline of a GPT-2 of 2 layers, 4 heads of 6, calls a parameter; by hand."""
    _, *parts = name.split(".")
    kinds = {"wte": "word", "wpe": "position", "ln_1": "input", "ln_2": "post_attention"}
    if parts[0] in ("wte", "wpe"):
        return f"tied_modules.embed.{kinds[parts[0]]}_embeddings.weight", tensor
    if parts[0] == "ln_f":
        return f"5.{parts[1]}", tensor
    _, layer, kind, *rest = parts
    stem = f"{int(layer) + 2}"
    if kind.startswith("ln_"):
        return f"{stem}.{kinds[kind]}_layernorm.{rest[0]}", tensor
    if rest[-1] == "weight":
        tensor = tensor.T  # a Linear, not a Conv1D
    if rest[0] == "c_attn":
        # All of q, then k, then v; there each head has its own three.
        tensor = tensor.reshape(3, 4, 6, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
        return f"{stem}.self_attention.query_key_value.{rest[1]}", tensor
    new = {"attn.c_proj": "self_attention.dense", "mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h"}
    return f"{stem}.{new[f'{kind}.{rest[0]}']}.{rest[1]}", tensor


def test_a_pipelines_names_and_arrangement_become_the_models_own(tmp_path: Path) -> None:
    module = module_of("gpt2")
    module.save_pretrained(tmp_path / "theirs")
    tensors = dict(as_megatron(n, t) for n, t in all_of(tmp_path / "theirs").items())
    source = folder_of(tmp_path / "source", {n: t.contiguous() for n, t in tensors.items()})
    ucp.convert(source, tmp_path / "ours", to="huggingface", like=tmp_path / "theirs")
    assert same(all_of(tmp_path / "ours"), all_of(tmp_path / "theirs"))


def test_names_lose_what_wrappers_put_into_them(tmp_path: Path) -> None:
    tensors = {"module._orig_mod.a.weight": torch.ones(2), "module._orig_mod.b": torch.zeros(3)}
    ucp.convert(folder_of(tmp_path / "a", tensors), tmp_path / "b", to="huggingface")
    assert set(all_of(tmp_path / "b")) == {"a.weight", "b"}


def test_the_command(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ["--to", "huggingface", str(llama)]
    dest = tmp_path / "ours"
    options = ["--dtype", "bf16", "--max-shard-size", "6KB", "--like", str(llama)]
    assert command.main([*source, str(dest), *options]) == 0
    assert same(all_of(dest), {n: t.bfloat16() for n, t in all_of(llama).items()})
    assert len(list(dest.glob("model-*"))) > 2
    assert "from huggingface (dp=1,zero=0) to huggingface" in capsys.readouterr().out
    for flag, value in (("--dtype", "bf16"), ("--max-shard-size", "1GB"), ("--like", str(llama))):
        assert command.main([str(llama), str(tmp_path / "x"), flag, value]) == 2
        name = flag.strip("-").replace("-", "_")
        targets = "'megatron' or 'huggingface'" if name == "dtype" else "'huggingface'"
        assert f"{name} is for {targets} only, not for 'universal'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:Adapter 'default'")
class TestAdapters:
    def make(self, tmp_path: Path, **config: Any) -> tuple[Any, Path, Path]:
        """A model with a LoRA adapter, its whole state dict as a source, and the folder that peft saves."""
        import peft

        torch.manual_seed(1)
        base = module_of("llama", attention_bias=True)
        module: Any = peft.get_peft_model(base, peft.LoraConfig(r=3, init_lora_weights=False, **config))
        tensors = {n: t.clone() for n, t in module.state_dict().items()}
        module.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        like = tmp_path / "like"
        like.mkdir()
        shutil.copy(tmp_path / "theirs/adapter_config.json", like)
        return module, folder_of(tmp_path / "source", tensors), like

    @pytest.mark.parametrize(
        "config",
        [
            {"target_modules": ["q_proj", "down_proj"]},
            {"target_modules": ["v_proj"], "bias": "all"},
            {"target_modules": ["v_proj"], "bias": "lora_only", "lora_bias": True},
            {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
            {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
        ],
    )
    def test_names_and_values_are_pefts(self, config: dict[str, Any], tmp_path: Path) -> None:
        _, source, like = self.make(tmp_path, **config)
        ucp.convert(source, tmp_path / "ours", to="huggingface", like=like)
        assert {p.name for p in (tmp_path / "ours").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert same(all_of(tmp_path / "ours"), all_of(tmp_path / "theirs"))
        assert (tmp_path / "ours/adapter_config.json").read_bytes() == (like / "adapter_config.json").read_bytes()

    def test_a_parameter_that_was_trained_beside_it_would_be_lost(self, tmp_path: Path) -> None:
        _, source, like = self.make(tmp_path, target_modules=["q_proj"])
        name = "base_model.model.lm_head.weight"
        with ucp.open(source) as checkpoint:
            catalog = checkpoint.catalog
            trained = replace(catalog.parameters[name], kind="parameter")
        with pytest.raises(Mismatch, match=f"'{name}' was trained, but is no part of a LoRA adapter"):
            adapter.select(replace(catalog, parameters={**catalog.parameters, name: trained}), like)

    def test_what_is_no_lora_adapter_is_refused(self, llama: Path, tmp_path: Path) -> None:
        module, source, like = self.make(tmp_path, target_modules=["q_proj"])

        def refused(kind: type[Exception], message: str, source: Path = source, like: Path = like) -> None:
            with pytest.raises(kind, match=message):
                ucp.convert(source, tmp_path / "ours", to="huggingface", like=like)
            assert not (tmp_path / "ours").exists()

        refused(Unsupported, "is part of an adapter; for a PEFT adapter folder, give '--like'", like=llama)
        refused(Mismatch, "asks for a LoRA adapter, and the checkpoint has none", source=llama)
        module.add_adapter("other", module.peft_config["default"])
        refused(
            Unsupported,
            r"several adapters \(default, other\)",
            folder_of(tmp_path / "two", {n: t.clone() for n, t in module.state_dict().items()}),
        )
        (like / "adapter_config.json").write_text('{"peft_type": "IA3"}')
        refused(Unsupported, "peft_type IA3 with bias 'none' is not supported")
