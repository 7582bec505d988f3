"""Bombs in every place of a DeepSpeed file: opening, the training state, a conversion and a comparison end soon."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.attacks import bombs, plant
from tests.attacks.arena import fight
from tests.slow_cases import slow_but
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.deepspeed.read.folder import OWN_KEYS
from ucp.inspection.difference import diff
from ucp.storage import plain

OLDER = Path(__file__).parents[1] / "formats/deepspeed/older"
MODEL = "mp_rank_00_model_states.pt"
OPTIMIZER = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
# Where a file's own values are interpreted, and one place that is the caller's.
PLACES = {
    **{f"model {key}": (MODEL, [key]) for key in sorted(OWN_KEYS)},
    "client state": (MODEL, ["bomb"]),
    "config": (MODEL, ["ds_config", "zero_optimization"]),
    "the whole model file": (MODEL, []),
    "the whole optimizer file": (OPTIMIZER, []),
    "optimizer": (OPTIMIZER, ["optimizer_state_dict"]),
    **{
        f"optimizer {key}": (OPTIMIZER, ["optimizer_state_dict", key])
        for key in ("base_optimizer_state", "partition_count", "group_paddings", "zero_stage", "loss_scaler")
    },
}


def attack(folder: Path, place: str, bomb: bytes) -> Callable[[], str]:
    def run() -> str:
        source = folder / "0.14.4-z1-bf16"
        broken = folder / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(source, broken)
        name, keys = PLACES[place]
        plant.set_item(broken / "global_step3" / name, list(keys), bomb)
        with ucp.open(broken, tag="global_step3") as opened, ucp.open(source) as whole:
            assert opened.training_state is not None
            for to in ("universal", "deepspeed"):
                shutil.rmtree(folder / to, ignore_errors=True)
                try:
                    ucp.convert(broken, folder / to, to, "dp=1,zero=1" if to == "deepspeed" else None)
                except ucp.errors.UcpError:
                    continue
                with ucp.open(folder / to) as again:
                    assert again.training_state is not None
            diff(opened, whole)
        return "read"

    return run


QUICK = {"the whole optimizer file"}


@pytest.mark.parametrize("place", slow_but(QUICK, PLACES))
def test_a_bomb_is_refused_or_does_no_harm(tmp_path: Path, place: str) -> None:
    shutil.copytree(OLDER / "0.14.4-z1-bf16", tmp_path / "0.14.4-z1-bf16")
    attacks = [attack(tmp_path, place, bomb) for bomb in bombs.BOMBS.values()]
    for name, verdict in zip(bombs.BOMBS, fight(attacks), strict=True):
        assert verdict.within_limits, f"{name}: {verdict}"


def opened_with(tmp_path: Path, keys: list[Any], bomb: bytes) -> ucp.Checkpoint:
    shutil.copytree(OLDER / "0.14.4-z1-bf16", tmp_path / "run")
    plant.set_item(tmp_path / "run/global_step3" / MODEL, keys, bomb)
    return ucp.open(tmp_path / "run", tag="global_step3")


def test_what_the_caller_shares_stays_shared(tmp_path: Path) -> None:
    """Forty levels in the client state: in memory, in our own form and in DeepSpeed's, each list exists once."""
    with opened_with(tmp_path, ["mine"], bombs.shared()) as opened:
        states = [opened.training_state]
    for to, layout in (("universal", None), ("deepspeed", "dp=1,zero=1")):
        ucp.convert(tmp_path / "run", tmp_path / to, to, layout)
        with ucp.open(tmp_path / to) as again:
            states.append(again.training_state)
    for state in states:
        value, levels = state.client_state["mine"], 0
        while len(value) == 2:
            assert value[0] is value[1]
            value, levels = value[0], levels + 1
        assert (value, levels) == ([1], bombs.LEVELS)


def test_little_is_written_out_as_ever() -> None:
    """What is shared a little stays readable by every release: it is written twice."""
    both = ["x", {"a": 1}]
    assert plain.encode([both, both]) == [["x", {"a": 1}], ["x", {"a": 1}]]


@pytest.mark.parametrize("value", [["long" * 300] * 20_000, [torch.arange(3).numpy()] * 3, [b"x" * 2000] * 20_000])
def test_texts_and_arrays_are_shared_too(value: Any) -> None:
    decoded = plain.decode(plain.encode(value))
    assert len(decoded) == len(value)
    assert str(decoded[0]) == str(decoded[-1]) == str(value[0])


def test_a_reference_to_nothing_is_damage() -> None:
    for data in ({"$": "same", "v": 0}, {"$": "shared", "n": 0, "v": [{"$": "same", "v": 0}]}, {"$": "same", "v": []}):
        with pytest.raises(DamagedCheckpoint):
            plain.decode(data)


@pytest.mark.parametrize("count", [10**9, 3, 1, 0, -1])
def test_a_count_is_compared_with_the_files(tmp_path: Path, count: int) -> None:
    with pytest.raises((DamagedCheckpoint, Unsupported), match=r"files are missing|files of two runs|optim_states"):
        opened_with(tmp_path, ["dp_world_size"], plant.operations(count))


def test_the_numbers_in_names_are_no_counts(tmp_path: Path) -> None:
    shutil.copytree(OLDER / "0.14.4-z1-bf16", tmp_path / "run")
    step = tmp_path / "run/global_step3"
    shutil.copy(step / MODEL, step / "mp_rank_999999999_model_states.pt")
    with pytest.raises(DamagedCheckpoint, match="no model file of rank 1 "):
        ucp.open(tmp_path / "run", tag="global_step3")


def test_expanded_tensors_stay_within_their_storage(tmp_path: Path) -> None:
    """A stride of zero makes any number of elements of four bytes; torch saves small ones like that."""
    path = tmp_path / "model"
    path.mkdir()
    torch.save({"w": torch.ones(1).expand(1 << 40)}, path / "pytorch_model.bin")
    with pytest.raises(DamagedCheckpoint, match="more often than is read"):
        ucp.open(path)
