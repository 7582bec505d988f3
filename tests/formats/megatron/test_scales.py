"""What Transformer Engine keeps for FP8: understood, told of, and never run."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.megatron import transformer_engine as te
from ucp.errors import DamagedCheckpoint, UnsafePickle
from ucp.formats.megatron import keys, scales
from ucp.formats.megatron.read import module_states
from ucp.storage.files import Files

NAME = "decoder.layers.0.mlp.linear_fc1"


def _raw(state: dict[str, Any]) -> bytes:
    return bytes(te.pickled(state).numpy().tobytes())


def test_both_releases() -> None:
    shapes = {"scale_fwd": (3,), "amax_history_fwd": (8, 3), "scale_bwd": (2,), "amax_history_bwd": (8, 2)}
    new = scales.of(_raw(te.content(NAME, te.DelayedScaling())), "x")
    assert new == scales.ModuleScales("DelayedScaling", "HYBRID", shapes, 8, True)
    old = scales.of(te.saved(te.content(NAME)).getvalue(), "x")
    assert old is not None
    assert (old.recipe, old.form, old.history) == ("DelayedScaling", None, 8)
    assert old.tensors == {**shapes, "scale_inv_fwd": (3,), "scale_inv_bwd": (2,)}


def test_recipes_without_scales() -> None:
    found = scales.of(_raw(te.content(NAME, te.Float8CurrentScaling())), "x")
    assert found == scales.ModuleScales("Float8CurrentScaling", "E4M3", {}, None, True)
    assert scales.summary([found, found]) == "Float8CurrentScaling (E4M3), no scales: 2 modules"


def test_modules_without_fp8() -> None:
    assert scales.of(b"", "x") is None
    assert scales.of(pickle.dumps(None), "x") is None


def test_scales_of_single_ranks_are_told() -> None:
    found = scales.of(_raw(te.content(NAME, te.DelayedScaling(reduce_amax=False))), "x")
    assert found is not None
    assert "reduce_amax=False" in scales.summary([found])


def test_unknown_classes_are_named_and_not_run() -> None:
    raw = _raw(te.content(NAME, te.CustomRecipe(print)))
    found = scales.of(raw, "x")
    assert found is not None
    assert found.unread == ("builtins.print", f"{te.MODULE}.CustomRecipe")
    assert found.tensors["scale_fwd"] == (3,)
    with pytest.raises(UnsafePickle, match="CustomRecipe"):
        scales.check(raw, "x")


@pytest.mark.parametrize("start", [b"cos\nsystem\n(S'true'\ntR.", b"(S'true'\nios\nsystem\n.", b"\x80\x04\x82\x01."])
def test_what_python_would_run_is_refused(start: bytes) -> None:
    """Operations that are not read here, too: Python's unpickler knows more of them than files of today have."""
    with pytest.raises((UnsafePickle, DamagedCheckpoint)):
        scales.check(start, "x")


def test_what_is_no_pickle_is_kept() -> None:
    scales.check(b"x", "x")
    assert not scales.may_be_pickle(b"")


def test_damage() -> None:
    raw = _raw(te.content(NAME, te.DelayedScaling()))
    for cut in (10, len(raw) // 2, len(raw) - 1):
        with pytest.raises(DamagedCheckpoint):
            scales.of(raw[:cut], "x")
    state = te.content(NAME, te.DelayedScaling())
    for wrong in ({"scale_fwd": torch.ones(4)}, {"amax_history_bwd": torch.ones(8, 3)}):
        with pytest.raises(DamagedCheckpoint, match="one column of maxima for each scale"):
            scales.of(_raw({**state, **wrong}), "x")
    with pytest.raises(DamagedCheckpoint, match=r"amax_history_fwd none"):
        scales.of(_raw({k: v for k, v in state.items() if k != "amax_history_fwd"}), "x")


def test_what_is_not_understood_is_kept_and_told() -> None:
    key = "decoder.layers.mlp.linear_fc1._extra_state/shard_1_4"
    whole = te.saved(te.content(NAME))
    with Files() as files:
        fp8, odd = module_states.told({key: io.BytesIO(whole.getvalue()[:-30]), "rng_state/shard_0_1": whole}, files)
    assert fp8 == ""
    assert len(odd) == 1
    assert key in odd[0]
    assert "is kept, and not understood" in odd[0]


def test_the_same_in_other_bytes() -> None:
    """torch numbers a storage by its address, so that every process pickles the same tensor into other bytes."""
    state = te.content(NAME, te.DelayedScaling())
    one, other = _raw(state), _raw({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()})
    assert one != other
    assert scales.same(one, other, "x")
    assert not scales.same(one, _raw(te.content("another", te.DelayedScaling())), "x")
    assert not scales.same(one, None, "x")
    assert not scales.same(one, one[:-9], "x")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("decoder.layers.mlp.linear_fc1._extra_state/shard_3_4", "decoder.layers.3.mlp.linear_fc1._extra_state"),
        ("decoder.layers.2.mlp.linear_fc1._extra_state/shard_0_1", "decoder.layers.2.mlp.linear_fc1._extra_state"),
        (
            "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_1.5_4.8",
            "decoder.layers.1.mlp.experts.local_experts.5.linear_fc1._extra_state",
        ),
        (
            "decoder.layers.1.mlp.experts.experts.linear_fc1._extra_state/shard_5_8",
            "decoder.layers.1.mlp.experts.local_experts.5.linear_fc1._extra_state",
        ),
        ("rng_state/shard_0.0_1.2", None),
        ("decoder.layers.mlp.linear_fc1._extra_state/shard_3.1_4.2", None),
    ],
)
def test_modules_by_their_keys(key: str, name: str | None) -> None:
    assert keys.module_state(key) == name


def test_ranks_of_the_older_layout() -> None:
    """Scales of their own, and one state of several experts: what is lost is said."""
    with Files() as files:
        found = module_states.RanksStates(files)
        name = f"{NAME}._extra_state"
        found.add(name, name, te.saved(te.content(NAME)))
        found.add(name, name, te.saved(te.content(NAME)))
        found.add(name, name, None)
        assert found.apart() == ()
        found.add(name, name, te.saved(te.content("another")))
        found.add("decoder.layers.0.mlp.experts.linear_fc1._extra_state", None, te.saved(te.content(NAME)))
        assert len(found.objects) == 1
        ranks, experts = found.apart()
    assert "reduce_amax=False" in ranks
    assert "one state of all experts" in experts


def test_nothing_stays_importable() -> None:
    te.pickled({})
    with pytest.raises(ModuleNotFoundError):
        __import__(te.MODULE)


def test_a_file_of_a_rank_with_an_expert(tmp_path: Path) -> None:
    from ucp.formats.megatron.read.rank_places import RankPlace, state_name

    place = RankPlace(0, 2, 1, 4, 8, True)
    name = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1._extra_state"
    assert state_name(name, place) == "decoder.layers.5.mlp.experts.local_experts.11.linear_fc1._extra_state"
    assert state_name("decoder.layers.1.mlp.experts.linear_fc1._extra_state", place) is None
    norm = "decoder.layers.1.input_layernorm._extra_state"
    assert state_name(norm, place) == "decoder.layers.5.input_layernorm._extra_state"
