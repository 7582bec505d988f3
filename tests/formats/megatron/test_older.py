"""Folders that older releases of Megatron-Core wrote in environments of their own (``older/make.py``)."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

import ucp
from tests.engines.megatron.launch import by_name
from tests.engines.truth import same
from ucp.errors import DamagedCheckpoint

OLDER = Path(__file__).parent / "older"
RELEASES = sorted(folder.parent.name for folder in OLDER.glob("*/truth.pt"))


def test_there_are_some() -> None:
    assert RELEASES == ["0.13.1"]


@pytest.mark.parametrize("release", RELEASES)
def test_every_tensor_is_that_of_todays_release(release: str) -> None:
    """Flattened optimizer states, which today's Megatron-Core no longer loads: against the same run by today's, in
    today's form and by its own loader."""
    truth = by_name(OLDER / release / "truth.pt")
    with ucp.open(OLDER / release) as checkpoint:
        assert checkpoint.catalog.tensors.keys() == truth.keys()
        for key, value in truth.items():
            assert same(checkpoint.read(*key), value), key
        assert {info.scalars["step"] for info in checkpoint.parameters.values()} == {2}
        state = checkpoint.training_state
        assert (state.global_steps, state.lr_scheduler["num_steps"]) == (2, 16)
        assert {name for group in state.param_groups for name in group.names} == set(checkpoint.parameters)
        assert state.extra["megatron"]["run"]["optimizer_sharding"] == "fully_sharded_model_space"


@pytest.mark.parametrize("release", RELEASES)
def test_it_goes_on_in_todays_form(tmp_path: Path, release: str) -> None:
    """The way out for a run that today's release cannot load."""
    truth = by_name(OLDER / release / "truth.pt")
    ucp.convert(OLDER / release, tmp_path / "today", to="megatron", layout="tp=2,dp=2")
    with ucp.open(tmp_path / "today") as checkpoint:
        assert checkpoint.training_state.extra["megatron"]["run"]["optimizer_sharding"] == "fully_reshardable"
        for key, value in truth.items():
            assert same(checkpoint.read(*key), value), key


@pytest.mark.slow  # the metadata's pickle imports Megatron-Core
@pytest.mark.parametrize("release", RELEASES)
def test_another_shape_is_refused(tmp_path: Path, release: str) -> None:
    """What lies flattened is of another number of elements than the shape beside it."""
    path = tmp_path / "iter_0000002"
    shutil.copytree(OLDER / release / "iter_0000002", path)
    meta = pickle.loads((path / ".metadata").read_bytes())
    flattened = [key for key, value in meta.mcore_data.items() if value.get("nd_reformulated_orig_global_shape")]
    assert len(flattened) > 5
    first = meta.mcore_data[flattened[0]]
    first["nd_reformulated_orig_global_shape"] = tuple(2 * n for n in first["nd_reformulated_orig_global_shape"])
    (path / ".metadata").write_bytes(pickle.dumps(meta))
    with pytest.raises(DamagedCheckpoint, match="no shards of its shape"):
        ucp.open(path)
