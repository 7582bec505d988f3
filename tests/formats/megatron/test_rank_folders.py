"""Megatron's older layout, written by its own functions: every tensor as its newer files of the same run have it."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.engines.megatron.written import WRITTEN
from tests.engines.truth import same
from ucp.errors import DamagedCheckpoint, UcpError, Unsupported
from ucp.formats.megatron.read.rank_places import RankPlace, norms, places
from ucp.inspection.verify import verify
from ucp.parallel.mesh import Layout

Truths = Mapping[str, Mapping[tuple[str, str], torch.Tensor]]


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_every_tensor_is_that_of_the_newer_layout(written: Path, truths: Truths, name: str) -> None:
    case, truth = WRITTEN[name], dict(truths[name])
    if case.kind == "moe":  # Megatron's own classes call it otherwise in newer files than Transformer Engine's
        fused, own = ".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight"
        truth = {(key.replace(fused, own), state): value for (key, state), value in truth.items()}
    with ucp.open(written / f"{name} ranks") as checkpoint, ucp.open(written / name) as newer:
        layout = Layout(case.dp, case.tp, case.pp, case.ep, int(case.sharding is not None))
        assert (checkpoint.format, checkpoint.layout) == ("megatron", layout)
        assert set(checkpoint.catalog.tensors) == set(truth)
        for key, value in truth.items():
            assert same(checkpoint.read(*key), value), key
        state, wanted = checkpoint.training_state, newer.training_state
        assert [len(group.names) for group in state.param_groups] == [len(g.names) for g in wanted.param_groups]
        assert state.global_steps == 2
        assert {info.scalars.get("step") for info in checkpoint.parameters.values()} == {2.0}
    assert [finding for finding in verify(written / f"{name} ranks").findings if finding.fault] == []


def test_stacked_experts_are_taken_apart() -> None:
    """GroupedMLP's matrices against numpy: each expert transposed, its gate and up cut each by itself."""
    hidden, ffn, experts, tps = 3, 4, 2, 2
    gated = torch.arange(experts * 2 * ffn * hidden).reshape(experts, 2, ffn, hidden)  # gate, up
    for tp in range(tps):
        rank = RankPlace(tp, tps, 1, 5, experts, gated=True)
        own = gated[:, :, tp * ffn // tps : (tp + 1) * ffn // tps]  # experts, 2, ffn / tps, hidden
        weight1 = own.reshape(experts, ffn, hidden).transpose(1, 2).contiguous().reshape(hidden, -1)
        found = list(places("decoder.layers.0.mlp.experts.weight1", tuple(weight1.shape), rank))
        assert [p.name for p in found] == [
            f"decoder.layers.5.mlp.experts.local_experts.{experts + e}.linear_fc1.weight" for e in range(experts)
        ]
        for expert, placed in enumerate(found):
            assert placed.shape == (2 * ffn, hidden)
            b, whole = placed.blocks, gated[expert].reshape(2 * ffn, hidden)
            for k in range(len(b)):
                view = weight1.as_strided(tuple(b.sizes[k]), tuple(b.strides[k]), int(b.starts[k]))
                rows = slice(int(b.offsets[k, 0]), int(b.offsets[k, 0] + b.sizes[k, 0]))
                assert torch.equal(view, whole[rows])


def test_virtual_stages_go_round_the_stages(tmp_path: Path) -> None:
    """Two stages of two virtual ones with a layer each: stage 0 has layers 0 and 2, stage 1 has 1 and 3."""
    value = {(stage, chunk): torch.full((2, 2), float(10 * stage + chunk)) for stage in (0, 1) for chunk in (0, 1)}
    for stage in (0, 1):
        folder = tmp_path / "iter_0000002" / f"mp_rank_00_{stage:03d}"
        folder.mkdir(parents=True)
        chunks = {f"model{chunk}": {"decoder.layers.0.mlp.linear_fc2.weight": value[stage, chunk]} for chunk in (0, 1)}
        torch.save({"iteration": 2, **chunks}, folder / "model_optim_rng.pt")
    with ucp.open(tmp_path / "iter_0000002") as checkpoint:
        for layer, at in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
            assert torch.equal(checkpoint.read(f"decoder.layers.{layer}.mlp.linear_fc2.weight"), value[at])


def test_what_the_second_number_counts(tmp_path: Path) -> None:
    """Without arguments: expert ranks where each file has the whole model's beginning and end."""
    for rank in (0, 1):
        folder = tmp_path / "iter_0000002" / f"mp_rank_00_{rank:03d}"
        folder.mkdir(parents=True)
        ends = ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight")
        experts = {"decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight": torch.full((2, 2), float(rank))}
        model = {**dict.fromkeys(ends, torch.zeros(2, 2)), **experts}
        torch.save({"iteration": 2, "model": model}, folder / "model_optim_rng.pt")
    with ucp.open(tmp_path / "iter_0000002") as checkpoint:
        assert (checkpoint.layout.pp, checkpoint.layout.ep) == (1, 2)
        for rank in (0, 1):
            name = f"decoder.layers.0.mlp.experts.local_experts.{rank}.linear_fc2.weight"
            assert torch.equal(checkpoint.read(name), torch.full((2, 2), float(rank)))


def test_norms_are_called_as_transformer_engine_calls_them() -> None:
    """By what their layer has: experts, latent attention or neither."""
    dense = ["input_layernorm.weight", "self_attention.linear_qkv.weight", "pre_mlp_layernorm.weight"]
    latent = [
        "input_layernorm.weight",
        "self_attention.linear_kv_down_proj.weight",
        "self_attention.q_layernorm.weight",
    ]
    sparse = [*latent, "pre_mlp_layernorm.weight", "mlp.router.weight"]
    names = [f"decoder.layers.{k}.{n}" for k, layer in enumerate((dense, latent, sparse)) for n in layer]
    rank = RankPlace(0, 1, 0, 4, 0, gated=True, norms=norms(names))
    found = [next(iter(places(name, (2, 2), rank))).name.removeprefix("decoder.layers.") for name in names]
    assert found == [
        "4.self_attention.linear_qkv.layer_norm_weight",
        "4.self_attention.linear_qkv.weight",
        "4.mlp.linear_fc1.layer_norm_weight",
        "5.input_layernorm.weight",
        "5.self_attention.linear_kv_down_proj.weight",
        "5.self_attention.linear_q_up_proj.layer_norm_weight",
        "6.input_layernorm.weight",
        "6.self_attention.linear_kv_down_proj.weight",
        "6.self_attention.linear_q_up_proj.layer_norm_weight",
        "6.pre_mlp_layernorm.weight",
        "6.mlp.router.weight",
    ]


# --- damage ----------------------------------------------------------------------------------------------------------


def _file(name: str, change: Callable[[dict[Any, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        found = torch.load(path / name, weights_only=False)
        change(found)
        torch.save(found, path / name)

    return apply


def _truncate(path: Path) -> None:
    file = path / "mp_rank_01_000" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:-300])


FIRST, MASTERS = "mp_rank_00_000/model_optim_rng.pt", "mp_rank_00_000/distrib_optim.pt"
BAD: Mapping[str, tuple[Callable[[Path], Any], str]] = {
    "a rank's folder is missing": (lambda p: shutil.rmtree(p / "mp_rank_01_001"), "3 folders.*some are missing"),
    "its file is missing": (lambda p: (p / FIRST).unlink(), r"mp_rank_00_000: has no 'model_optim_rng\.pt'"),
    "it is truncated": (_truncate, r"mp_rank_01_000/model_optim_rng\.pt"),
    "the optimizer's file is missing": (lambda p: (p / MASTERS).unlink(), r"has no 'distrib_optim\.pt'"),
    "another tp in the arguments": (
        _file(FIRST, lambda g: g.update(args=argparse.Namespace(tensor_model_parallel_size=4))),
        "say 4 tensor-parallel ranks, and there are folders of 2",
    ),
    "another iteration": (_file(FIRST, lambda g: g.update(iteration=7)), "two saves are mixed"),
    "masters of another run": (
        _file(MASTERS, lambda g: next(iter(g[0].values()))["param"].neg_()),
        r"masters of 'decoder.*rounded; load it with Megatron",
    ),
    "a shorter buffer": (
        _file(MASTERS, lambda g: next(iter(g[0].values())).update(param=torch.zeros(100))),
        "states of several sizes",
    ),
    "an unknown module": (
        _file(FIRST, lambda g: g["model"].update({"decoder.layers.0.mixer.A_log": torch.zeros(4)})),
        r"'decoder\.layers\.0\.mixer\.A_log' \[4\] is of a module",
    ),
    "a model before Megatron-Core": (_file(FIRST, lambda g: g.update(model={"language_model": {}})), "language_model"),
    "no model": (_file(FIRST, lambda g: g.pop("model")), "has no 'model'"),
    "a tensor for the model": (_file(FIRST, lambda g: g.update(model=torch.zeros(2))), r"model_optim_rng\.pt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BAD)
def test_damage_is_named(written: Path, tmp_path: Path, what: str) -> None:
    path = tmp_path / "iter_0000002"
    shutil.copytree(written / "llama tp2 pp2 ranks" / "iter_0000002", path)
    change, said = BAD[what]
    change(path)
    with pytest.raises((DamagedCheckpoint, Unsupported), match=said):
        ucp.open(path)


class Planted:
    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Planted, "ran", True))


def test_nothing_is_run(tmp_path: Path) -> None:
    path = tmp_path / "iter_0000002" / "mp_rank_00"
    path.mkdir(parents=True)
    torch.save(
        {"model": {"embedding.word_embeddings.weight": torch.zeros(2, 2)}, "args": Planted()},
        path / "model_optim_rng.pt",
    )
    with pytest.raises(UcpError, match=r"model_optim_rng\.pt: its pickle names \S+\.setattr"):
        ucp.open(tmp_path)
    assert not Planted.ran
