"""Sharded state dicts of Megatron-Core on one rank, made by hand: what real models of a test's size don't have."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
import ucp.megatron
from tests.engines.megatron import transformer_engine
from tests.optional import skip_without
from ucp.errors import BadArgument, DamagedCheckpoint, Mismatch, SaveFailed, UnsafePickle, Unsupported

skip_without("megatron.core")
pytestmark = pytest.mark.slow

EMBEDDING, LAYERS = "embedding.word_embeddings.weight", "decoder.layers.mlp.linear_fc2.weight"
GROUPS = [{"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "lr": 0.1, "step": 3}]


def _sharded(key: str, tensor: torch.Tensor, *offsets: tuple[int, int, int], **more: Any) -> Any:
    from megatron.core.dist_checkpointing import mapping

    return mapping.ShardedTensor.from_rank_offsets(key, tensor, *offsets, **more)


def _state(rows: int, seed: int, masters: bool = True) -> dict[str, Any]:
    """A run with an embedding of this many rows and two stacked layers, its optimizer's states beside them."""
    from megatron.core.dist_checkpointing import mapping

    made = torch.Generator().manual_seed(seed)
    master = torch.randn(rows, 4, generator=made)
    weight = master.bfloat16()
    layers = [torch.randn(3, 4, generator=made).bfloat16() for _ in range(2)]
    model: dict[str, Any] = {"e": _sharded(EMBEDDING, weight, allow_shape_mismatch=True)}
    states: dict[int, Any] = {0: {}}
    values = {"param": master, "exp_avg": torch.randn(rows, 4, generator=made), "exp_avg_sq": torch.rand(rows, 4)}
    for state, tensor in values.items():
        key = f"optimizer.state.{state}.{EMBEDDING}"
        states[0][state] = _sharded(key, tensor, allow_shape_mismatch=True)
    for k, layer in enumerate(layers):
        model[f"l{k}"] = _sharded(LAYERS, layer, (0, k, 2), prepend_axis_num=1)
        states[k + 1] = {
            "param": _sharded(f"optimizer.state.param.{LAYERS}", layer.float(), (0, k, 2), prepend_axis_num=1)
        }
    inner = {"optimizer": {"param_groups": [dict(group) for group in GROUPS]}, "param_state_sharding_type": "x"}
    rng = mapping.ShardedObject("rng_state", [torch.arange(3)], (1, 1), (0, 0))
    # What Transformer Engine's modules keep beside their tensors.
    model["extra"] = mapping.ShardedObject("decoder.layers.mlp.linear_fc2._extra_state", io.BytesIO(b"x"), (2,), (0,))
    out = {"model": model, "iteration": 3, "checkpoint_version": 3.0, "rng": rng}
    return {**out, "optimizer": {**inner, "param_state": states}} if masters else out


def _tensor(state: dict[str, Any], name: str | None = None) -> torch.Tensor:
    found = state["model"]["e"] if name is None else state["optimizer"]["param_state"][0][name]
    return found.data.clone()


def test_a_module_is_given_no_class_that_it_would_run(tmp_path: Path) -> None:
    """Transformer Engine's modules unpickle what they get, whatever it names."""
    saved, live = _state(6, 1), _state(6, 2)
    state = transformer_engine.pickled({"recipe": transformer_engine.CustomRecipe(print)})
    saved["model"]["extra"].data = state
    ucp.megatron.save_checkpoint(saved, tmp_path / "x")
    before = _tensor(live, "param")
    with pytest.raises(UnsafePickle, match=r"linear_fc2._extra_state.*CustomRecipe.*trust_client_state=True"):
        ucp.megatron.load_checkpoint(live, tmp_path / "x")
    assert torch.equal(_tensor(live, "param"), before)
    found, _ = ucp.megatron.load_checkpoint(live, tmp_path / "x", trust_client_state=True)
    assert torch.equal(found["model"]["extra"], state)


def test_there_and_back(tmp_path: Path) -> None:
    saved, live = _state(6, 1), _state(6, 2)
    ucp.megatron.save_checkpoint(saved, tmp_path / "x")
    with ucp.open(tmp_path / "x") as checkpoint:
        assert list(checkpoint.parameters) == [
            EMBEDDING,
            *(f"decoder.layers.{k}.mlp.linear_fc2.weight" for k in (0, 1)),
        ]
        assert torch.equal(checkpoint.read(EMBEDDING), _tensor(saved, "param"))
    live["rng"].data = [torch.zeros(3)]
    live["model"]["extra"].data = None
    found, report = ucp.megatron.load_checkpoint(live, tmp_path / "x")
    assert torch.equal(found["model"]["e"], _tensor(saved))
    assert torch.equal(found["model"]["l1"], saved["model"]["l1"].data)
    assert torch.equal(found["rng"][0], torch.arange(3))
    assert found["model"]["extra"].getvalue() == b"x"
    assert found["iteration"] == 3
    assert found["optimizer"]["optimizer"]["param_groups"][0]["step"] == 3
    assert report.proof is not None
    assert report.proof.complete


def test_in_the_background(tmp_path: Path) -> None:
    """What is trained on after the call is not what is saved."""
    saved = _state(6, 1)
    before = _tensor(saved, "exp_avg")
    pending = ucp.megatron.async_save_checkpoint(saved, tmp_path / "x")
    saved["optimizer"]["param_state"][0]["exp_avg"].data.zero_()
    assert pending.result().path == str(tmp_path / "x")
    with ucp.open(tmp_path / "x") as checkpoint:
        assert torch.equal(checkpoint.read(EMBEDDING, "exp_avg"), before)


def test_more_rows_of_padding_here(tmp_path: Path) -> None:
    saved, live = _state(6, 1), _state(8, 2)
    before = _tensor(live)
    ucp.megatron.save_checkpoint(saved, tmp_path / "x")
    found, report = ucp.megatron.load_checkpoint(live, tmp_path / "x")
    weight, states = found["model"]["e"], found["optimizer"]["param_state"][0]
    assert torch.equal(weight[:6], _tensor(saved))
    assert torch.equal(weight[6:], before[6:])
    assert torch.equal(states["param"][6:], before[6:].float())
    assert torch.equal(states["exp_avg"][:6], _tensor(saved, "exp_avg"))
    assert not states["exp_avg"][6:].any()
    assert any("are padding" in note for note in report.plan.notes)


def test_fewer_rows_of_padding_here(tmp_path: Path) -> None:
    saved, live = _state(8, 1), _state(6, 2)
    ucp.megatron.save_checkpoint(saved, tmp_path / "x")
    with pytest.raises(Mismatch, match=r"vocab_size= says how many rows are real"):
        ucp.megatron.load_checkpoint(live, tmp_path / "x")
    with pytest.raises(BadArgument, match="has 8 rows in the checkpoint and 6 here"):
        ucp.megatron.load_checkpoint(live, tmp_path / "x", vocab_size=7)
    before = _tensor(live)
    found, _ = ucp.megatron.load_checkpoint(live, tmp_path / "x", vocab_size=5)
    assert torch.equal(found["model"]["e"][:5], _tensor(saved)[:5])
    assert torch.equal(found["model"]["e"][5:], before[5:])


def test_weights_alone(tmp_path: Path) -> None:
    saved, live = _state(6, 1), _state(6, 2, masters=False)
    ucp.megatron.save_checkpoint(saved, tmp_path / "x")
    found, _ = ucp.megatron.load_checkpoint(live, tmp_path / "x")
    assert torch.equal(found["model"]["e"], _tensor(saved))
    assert "optimizer" not in found


def test_a_failed_load_changes_nothing(tmp_path: Path) -> None:
    saved, live = _state(6, 1), _state(6, 2)
    ucp.megatron.save_checkpoint(saved, tmp_path / "x")
    file = max((tmp_path / "x").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    before = _tensor(live)
    with pytest.raises(DamagedCheckpoint):
        ucp.megatron.load_checkpoint(live, tmp_path / "x")
    assert torch.equal(_tensor(live), before)


def test_what_is_missing_or_too_much_is_named(tmp_path: Path) -> None:
    saved, live = _state(6, 1), _state(6, 2)
    del saved["model"]["l1"], saved["optimizer"]["param_state"][2]
    del saved["model"]["extra"]
    for part in (*saved["model"].values(), *saved["optimizer"]["param_state"][1].values()):
        if "layers" in part.key:
            part.global_shape = (1, 3, 4)
    ucp.megatron.save_checkpoint(saved, tmp_path / "x")
    with pytest.raises(Mismatch, match=r"decoder\.layers\.1\.mlp\.linear_fc2\.weight.*allow_missing"):
        ucp.megatron.load_checkpoint(live, tmp_path / "x")
    live = _state(6, 2)
    _, report = ucp.megatron.load_checkpoint(live, tmp_path / "x", allow_missing=["decoder.layers.1.*"])
    assert any("layers.1." in name for name in report.left)


def test_weights_that_are_not_their_masters(tmp_path: Path) -> None:
    saved = _state(6, 1)
    saved["model"]["e"].data[2, 1] += 1
    with pytest.raises(
        SaveFailed, match=rf"'{EMBEDDING}': the model's weights are not the optimizer's masters, rounded"
    ):
        ucp.megatron.save_checkpoint(saved, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_refusals(tmp_path: Path) -> None:
    bucket = _state(6, 1)
    key = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.exp_avg"
    bucket["optimizer"]["param_state"] = {0: _sharded(key, torch.zeros(4))}
    gone = _state(6, 1)
    gone["model"]["e"].data = None
    for state, error, said in (
        (bucket, Unsupported, "distrib_optim_sharding_type"),
        (gone, BadArgument, "has no data"),
        ({"model": {}}, BadArgument, "no ShardedTensor"),
        ([1], BadArgument, "is a dict, found list"),
    ):
        for call in (ucp.megatron.save_checkpoint, ucp.megatron.load_checkpoint):
            with pytest.raises(error, match=said):
                call(state, tmp_path / "x")
