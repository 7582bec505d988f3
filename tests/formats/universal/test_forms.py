"""The universal format: what is written is what was there, damage is found, and transformers opens the folder."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ucp
from tests.formats import raw
from tests.slow_cases import slow_but
from ucp.catalog import Catalog, ParamGroup, TrainingState
from ucp.errors import BadArgument, DamagedCheckpoint, DigestMismatch, Unsupported
from ucp.formats.shared.training_state import Tensors, encode
from ucp.formats.universal import consolidated, manifest, schema, virtual
from ucp.storage.digests import CHUNK, digest_file
from ucp.storage.torch_pt.values import TensorRef

FAST = ["consolidated 3", "virtual 1"]


@pytest.fixture(scope="module", params=slow_but(FAST, ["consolidated 1", "consolidated 3", "virtual 1", "virtual 3"]))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, raw.Raw]:
    """A checkpoint of each form, made from stage-1 and stage-3 cuts."""
    form, stage = request.param.split()
    folder = tmp_path_factory.mktemp("universal")
    made = raw.make(folder / "source", stage=int(stage), dp=4, aliases={"embed.weight": ("head.weight",)})
    return raw.write_form(form, folder / "checkpoint", made), made


def test_everything_is_there(written: tuple[Path, raw.Raw]) -> None:
    path, made = written
    with ucp.open(path) as checkpoint:
        assert checkpoint.format == "universal"
        assert checkpoint.layout == made.catalog.layout
        assert dict(checkpoint.parameters) == dict(made.catalog.parameters)
        assert checkpoint.training_state == made.catalog.training_state
        for name, state in made.truth:
            found, truth = checkpoint.read(name, state), made.tensor(name, state)
            assert (found.dtype, found.shape) == (truth.dtype, truth.shape)
            # As bytes, since NaNs do not equal themselves.
            assert found.reshape(-1).view(torch.uint8).equal(truth.reshape(-1).view(torch.uint8)), (name, state)
        assert checkpoint.read("head.weight", "exp_avg").equal(made.tensor("embed.weight", "exp_avg"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_region_is_the_slice_of_the_truth(written: tuple[Path, raw.Raw], data: st.DataObject) -> None:
    path, made = written
    name, state = data.draw(st.sampled_from(sorted(made.truth)))
    truth = made.tensor(name, state)
    dims = data.draw(st.integers(0, truth.dim()))
    bound = st.none() | st.integers(-20, 20)
    region = tuple(slice(data.draw(bound), data.draw(bound)) for _ in range(dims))
    with ucp.open(path) as checkpoint:
        found = checkpoint.read(name, state, region)
    expected = truth[region]
    assert found.shape == expected.shape
    assert found.reshape(-1).view(torch.uint8).equal(expected.contiguous().reshape(-1).view(torch.uint8))


def test_the_fragmented_form_is_read(tmp_path: Path) -> None:
    """Many fragments a tensor, in files of the checkpoint's own."""
    folder = tmp_path / "checkpoint"
    made = raw.make(folder, dp=4, stage=3)
    body = schema.encode(
        made.catalog,
        form="fragmented",
        writer="test",
        paths=[Path(file.path).name for file in made.catalog.files],
        mtimes=[None] * len(made.catalog.files),
        digests={k: digest_file(file.path) for k, file in enumerate(made.catalog.files)},
        training_state=encode(made.catalog.training_state, Tensors()),
        source=("test", "test"),
    )
    (folder / manifest.NAME).write_bytes(manifest.frame(body))
    folder.rename(tmp_path / "moved")
    with ucp.open(tmp_path / "moved") as checkpoint:
        assert len(checkpoint.catalog.tensors["embed.weight", "param"].blocks) > 3
        for name, state in made.truth:
            found = checkpoint.read(name, state)
            assert found.reshape(-1).view(torch.uint8).equal(made.tensor(name, state).reshape(-1).view(torch.uint8))
        assert checkpoint.verify() > 0


def test_the_consolidated_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    """Read by the safetensors library, which knows nothing of the manifest."""
    made = raw.make(tmp_path / "source")
    path = raw.write_consolidated(tmp_path / "checkpoint", made.catalog, max_shard=500)
    for stem, state in (("model", "param"), ("optimizer.exp_avg", "exp_avg"), ("optimizer.exp_avg_sq", "exp_avg_sq")):
        index = json.loads((path / f"{stem}.safetensors.index.json").read_text())
        expected = {name for name, s in made.truth if s == state}
        assert set(index["weight_map"]) == expected
        assert index["metadata"]["total_size"] == sum(made.catalog.tensors[n, state].nbytes for n in expected)
        shards = sorted(set(index["weight_map"].values()))
        assert shards == [f"{stem}-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
        found: dict[str, torch.Tensor] = {}
        for shard in shards:
            loaded = safetensors.torch.load_file(path / shard)
            assert {n for n, s in index["weight_map"].items() if s == shard} == set(loaded)
            found.update(loaded)
        for name in expected:
            truth = made.tensor(name, state)
            assert found[name].dtype == truth.dtype
            assert found[name].reshape(-1).view(torch.uint8).equal(truth.reshape(-1).view(torch.uint8))
        if state == "param":
            assert len(shards) > 1  # the limit was low enough to matter
    with ucp.open(path) as checkpoint:
        assert checkpoint.read("embed.weight").equal(made.tensor("embed.weight", "param"))


def test_training_state_comes_back_exactly(tmp_path: Path) -> None:
    blob = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    (tmp_path / "client.bin").write_bytes(b"pad" + blob.numpy().tobytes())
    column = TensorRef(str(tmp_path / "client.bin"), 3 + 4, "float32", (4, 2), (6, 1), "cpu", ("0", 24))
    state = TrainingState(
        param_groups=(
            ParamGroup(("embed.weight",), {"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "foreach": None}),
            ParamGroup(("scale", "temperature"), None),
        ),
        lr_scheduler=collections.OrderedDict(last_batch_iteration=7, lrs=[1e-5]),
        loss_scaler={"dynamic": True, "cur_scale": 65536.0, "raise_error_at_min_scale": True},
        clip_grad=float("inf"),
        global_steps=7,
        global_samples=2**70,
        skipped_steps=1,
        dp_world_size=3,
        global_batch_size=12,
        extra={"data_sampler": {"position": np.arange(5)}},
        client_state={
            "args": argparse.Namespace(lr=1.0, tensors=[torch.tensor([True, False]), column]),
            "column": column,
            "tensor": torch.tensor(2.5, dtype=torch.bfloat16),
            "empty": torch.zeros(0, 3),
            "dtype": torch.float16,
            1: (1, "ü", b"\0"),
            "nan": float("nan"),
        },
        config={"zero_optimization": {"stage": 1}},
    )
    made = raw.make(tmp_path / "source", training_state=state)
    for form in ("consolidated", "virtual"):
        path = raw.write_form(form, tmp_path / form, made)
        with ucp.open(path) as checkpoint:
            found = checkpoint.training_state
        client = found.client_state
        assert client["column"].equal(blob[:, 1:3])
        assert client["args"].tensors[1].equal(blob[:, 1:3])
        assert client["args"].tensors[0].equal(torch.tensor([True, False]))
        assert client["tensor"].equal(torch.tensor(2.5, dtype=torch.bfloat16))
        assert client["tensor"].dtype == torch.bfloat16
        assert client["empty"].shape == (0, 3)
        assert client["dtype"] is torch.float16
        assert client[1] == (1, "ü", b"\0")
        assert client["nan"] != client["nan"]
        assert found.extra["data_sampler"]["position"].tolist() == [0, 1, 2, 3, 4]
        carried = {"client_state", "extra"}  # compared above: tensors and NaN have no plain equality
        for field in {f.name for f in dataclasses.fields(state)} - carried:
            assert getattr(found, field) == getattr(state, field), field
        assert type(found.lr_scheduler) is collections.OrderedDict


def test_a_class_of_the_client_is_refused_by_name(tmp_path: Path) -> None:
    class Mine:
        pass

    made = raw.make(tmp_path / "source", training_state=TrainingState(client_state={"deep": [Mine()]}))
    for plan in (consolidated.plan, virtual.plan):
        with pytest.raises(Unsupported, match=r"client_state\['deep'\]\[0\].*Mine"):
            plan(made.catalog)


def test_shards_of_no_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="shard size of 0"):
        consolidated.plan(raw.make(tmp_path / "source").catalog, 0)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A consolidated checkpoint of several chunks a file, with a tensor in its client state."""
    folder = tmp_path_factory.mktemp("large")
    state = TrainingState(client_state={"noise": torch.randn(400_000)})
    made = raw.make(folder / "source", shapes={"a": (1200, 500), "b": (700, 300)}, training_state=state)
    return raw.write_consolidated(folder / "checkpoint", made.catalog)


def read_all(checkpoint: Any) -> None:
    for name, info in checkpoint.parameters.items():
        for state in info.states:
            checkpoint.read(name, state)
    assert checkpoint.training_state is not None


def test_every_flipped_bit_is_found(large: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(large, path)
    rng = np.random.default_rng(5)
    names = sorted(p.name for p in path.iterdir())
    assert len(names) == 8
    for name in names:
        victim = path / name
        size = victim.stat().st_size
        for at in {0, size - 1, *rng.integers(0, size, 12).tolist()}:
            mask = 1 << int(rng.integers(8))
            raw.flip(victim, at, mask)
            if name == manifest.NAME:
                with pytest.raises(DamagedCheckpoint, match=r"ucp\.json"):
                    ucp.open(path)
            elif name.endswith(".safetensors") and not (name == "training-state.safetensors" and at < 8):
                with ucp.open(path) as checkpoint, pytest.raises(DigestMismatch, match=name) as caught:
                    read_all(checkpoint)
                assert f"chunk {at // CHUNK} " in str(caught.value)
            else:
                with pytest.raises(DamagedCheckpoint, match=name), ucp.open(path) as checkpoint:
                    checkpoint.verify()
            raw.flip(victim, at, mask)
    with ucp.open(path) as checkpoint:
        read_all(checkpoint)
        assert checkpoint.verify() == sum(p.stat().st_size for p in path.iterdir() if p.name != manifest.NAME)


def test_only_touched_chunks_are_read_and_checked(large: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(large, path)
    victim = path / "model-00001-of-00001.safetensors"
    raw.flip(victim, victim.stat().st_size - 1, 1)  # in the last chunk
    with ucp.open(path) as checkpoint:
        before = checkpoint.bytes_read
        checkpoint.read("a", region=(slice(0, 1),))
        assert checkpoint.bytes_read - before == CHUNK
    with ucp.open(path, verify=False) as checkpoint:
        before = checkpoint.bytes_read
        checkpoint.read("a", region=(slice(600, 601),))
        assert checkpoint.bytes_read - before == 500 * 4


@pytest.mark.parametrize("form", ["consolidated", "virtual"])
@pytest.mark.parametrize("change", ["truncate", "empty", "lengthen", "remove"])
def test_a_file_of_another_length_is_refused(tmp_path: Path, form: str, change: str) -> None:
    made = raw.make(tmp_path / "source")
    path = raw.write_form(form, tmp_path / "checkpoint", made)
    victims = {"consolidated": path / "model-00001-of-00001.safetensors", "virtual": tmp_path / "source/rank1.bin"}
    victim = victims[form]
    content = victim.read_bytes()
    if change == "remove":
        victim.unlink()
    else:
        victim.write_bytes({"truncate": content[:-1], "empty": b"", "lengthen": content + b"x"}[change])
    with pytest.raises(DamagedCheckpoint, match=victim.name):
        ucp.open(path)


def test_a_source_that_changed_is_refused_by_the_virtual_form(tmp_path: Path) -> None:
    made = raw.make(tmp_path / "source")
    path = raw.virtual_checkpoint(tmp_path / "checkpoint", made)
    victim = tmp_path / "source/rank2.bin"
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + b"x")
    os.utime(victim, ns=(0, victim.stat().st_mtime_ns + 1))
    with pytest.raises(DamagedCheckpoint, match=r"rank2\.bin: the file was changed after the virtual checkpoint"):
        ucp.open(path)


def test_a_virtual_checkpoint_with_digests_finds_damage(tmp_path: Path) -> None:
    made = raw.make(tmp_path / "source")
    path = tmp_path / "checkpoint"
    path.mkdir()
    plan = virtual.plan(made.catalog)
    tables = {k: digest_file(file.path) for k, file in enumerate(plan.foreign)}
    (path / manifest.NAME).write_bytes(plan.manifest({}, "test", str(path), tables))
    with ucp.open(path) as checkpoint:
        assert checkpoint.verify() == sum(file.size for file in plan.foreign)
        assert checkpoint.read("embed.weight").equal(made.tensor("embed.weight", "param"))
    victim = tmp_path / "source/rank0.bin"
    times = victim.stat()
    raw.flip(victim, raw.HEADER + 5, 4)
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))  # damage that left the time as it was
    with ucp.open(path) as checkpoint, pytest.raises(DigestMismatch, match=r"rank0\.bin"):
        checkpoint.read("embed.weight")


def test_a_virtual_checkpoint_moves_with_its_source(tmp_path: Path) -> None:
    made = raw.make(tmp_path / "here/source")
    raw.virtual_checkpoint(tmp_path / "here/checkpoint", made)
    (tmp_path / "here").rename(tmp_path / "there")
    with ucp.open(tmp_path / "there/checkpoint") as checkpoint:
        assert checkpoint.read("embed.weight").equal(made.tensor("embed.weight", "param"))


def test_a_virtual_view_of_a_consolidated_checkpoint(tmp_path: Path) -> None:
    """It keeps the digests, and does not take the other's training-state file for its own."""
    state = TrainingState(client_state={"x": torch.arange(3)})
    made = raw.make(tmp_path / "source", training_state=state)
    inner = raw.write_consolidated(tmp_path / "inner", made.catalog)
    with ucp.open(inner) as opened:
        path = raw.virtual_checkpoint(tmp_path / "outer", raw.Raw(opened.catalog, made.truth))
    with ucp.open(path) as checkpoint:
        assert checkpoint.read("embed.weight").equal(made.tensor("embed.weight", "param"))
        assert checkpoint.training_state.client_state["x"].equal(torch.arange(3))
        assert checkpoint.verify() > 0
        assert all("index.json" not in file.path for file in checkpoint.catalog.files)


# --- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_opens_the_folder(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=37,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config)
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    assert ("lm_head.weight" in shapes) is not tied
    # A checkpoint whose flat files hold this model's weights, cut for 3 ranks.
    aliases = {"model.embed_tokens.weight": ("lm_head.weight",)} if tied else {}
    made = raw.make(tmp_path / "source", shapes=shapes, aliases=aliases, states=("param", "exp_avg"))
    flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()]).numpy()
    length = -(-len(flat) // 6) * 2
    for rank in range(3):
        part = flat[rank * length : (rank + 1) * length].tobytes()
        with (tmp_path / f"source/rank{rank}.bin").open("r+b") as stream:
            stream.seek(raw.HEADER)
            stream.write(part)
    buffers = ("frozen.weight", "mask", "steps")
    catalog = Catalog(
        **{
            **vars(made.catalog),
            "parameters": {k: v for k, v in made.catalog.parameters.items() if k not in buffers},
            "tensors": {k: v for k, v in made.catalog.tensors.items() if k[0] not in buffers},
        }
    )
    path = raw.write_consolidated(tmp_path / "checkpoint", catalog, max_shard=8000)
    config.save_pretrained(path)
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    for name, parameter in loaded.named_parameters():
        assert parameter.equal(parameters[name]), name
    if tied:
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = torch.arange(10).reshape(1, 10)
    assert loaded.eval()(ids).logits.equal(model.eval()(ids).logits)
