"""FSDP1's flat parameters, saved by the real FSDP1 of this torch on three ranks: read as what the ranks held."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

import ucp
from tests.engines.pool import RankPool
from tests.formats import fsdp1_jobs
from tests.formats.fsdp1_jobs import Wrote
from ucp.cli import main as commands
from ucp.errors import DamagedCheckpoint, Mismatch, UcpError, Unsupported

pytestmark = pytest.mark.slow

KINDS = ("flat", "orig", "last")
Saved = Mapping[str, tuple[Path, Wrote]]


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("fsdp1")
    found = ranks.run(fsdp1_jobs.saves_all, str(folder), KINDS, world_size=3)[0]
    return {kind: (folder / kind, found[kind]) for kind in KINDS}


def holds(path: Path, truth: Mapping[str, Mapping[str, Tensor]], states: bool, **opening: Any) -> None:
    with ucp.open(path, **opening) as opened:
        assert opened.parameters.keys() - {"blocks.0.seen", "blocks.1.seen", "tied.weight", "tied.bias"} == truth.keys()
        for name, held in truth.items():
            info = opened.parameters[name]
            assert info.states.keys() == (held.keys() - {"step"} if states else {"param"})
            assert info.scalars.get("step") == (fsdp1_jobs.SAVED if states else None)
            for state in info.states:
                assert torch.equal(opened.read(name, state), held[state]), (name, state)
        assert torch.equal(opened.read("blocks.1.seen"), torch.arange(2.0))
        if states:
            assert {n for group in opened.training_state.param_groups for n in group.names} == truth.keys()


@pytest.mark.parametrize("kind", ["flat", "orig"])
def test_names_and_shapes_are_those_of_the_optimizers_states(saved: Saved, kind: str, tmp_path: Path) -> None:
    folder, wrote = saved[kind]
    holds(folder / "named", wrote.truth, states=True)
    ucp.convert(folder / "named", tmp_path / "out", "deepspeed", "dp=2,zero=3", ds_config={})
    with ucp.open(tmp_path / "out") as opened:
        for name, held in wrote.truth.items():
            assert torch.equal(opened.read(name, "exp_avg_sq"), held["exp_avg_sq"]), name


@pytest.mark.parametrize("kind", ["flat", "orig"])
def test_the_caller_tells_what_no_file_does(
    saved: Saved, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, wrote = saved[kind]
    with pytest.raises(Unsupported, match=r"_flat_param' is FSDP1's flat parameter.*--param-shapes FILE"):
        ucp.open(folder / "weights")
    shapes, orig = fsdp1_jobs.shapes(), kind == "orig"
    holds(folder / "weights", wrote.truth, states=False, param_shapes=shapes)
    file = tmp_path / "shapes.json"
    file.write_text(json.dumps(shapes))
    assert commands.main(["inspect", str(folder / "weights"), "--param-shapes", str(file)]) == 0
    assert "blocks.0.up.weight" in capsys.readouterr().out
    for text, says in (
        ("[]", "holds no shapes by name"),
        ('{"w": [-1]}', "'w' is to have a shape such as"),
        ('{"w": 3}', "'w' is to have a shape such as"),
        ("{", "is not valid JSON"),
        (json.dumps({**shapes, "zeta.bias": [6]}), "'zeta.bias' has a part of [5]" if orig else "does not fill it"),
        (json.dumps({**shapes, "zeta.bias": [1 << 60]}), "does not fill it"),
        ("{}", "none are told"),
    ):
        file.write_text(text)
        assert commands.main(["inspect", str(folder / "weights"), "--param-shapes", str(file)]) == 2
        assert says in capsys.readouterr().err


def test_padding_tells_of_another_order(saved: Saved) -> None:
    """Reversed, the parameters would fill the vector as well, but for where FSDP1 has put its padding."""
    folder, _ = saved["orig"]
    shapes = dict(reversed(fsdp1_jobs.shapes().items()))
    with pytest.raises(Mismatch, match=r"would be padding, and they are not 42"):
        ucp.open(folder / "weights", param_shapes=shapes)


@pytest.mark.parametrize("kind", ["flat", "orig"])
def test_a_live_run_tells_and_goes_on_with_its_losses(saved: Saved, kind: str) -> None:
    folder, wrote = saved[kind]
    model = fsdp1_jobs.Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ucp.load_training(folder / "weights", model=model, rng=False)
    assert all(torch.equal(own, wrote.truth[name]["param"]) for name, own in model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=7.0)
    ucp.load_training(folder / "named", model=model, optimizer=optimizer, rng=False)
    for name, own in model.named_parameters():
        assert all(torch.equal(optimizer.state[own][state], wrote.truth[name][state]) for state in optimizer.state[own])
    losses = fsdp1_jobs.train(model, optimizer, fsdp1_jobs.FURTHER)
    assert losses == pytest.approx(wrote.further, rel=1e-5)


@pytest.mark.parametrize("kind", ["flat", "orig"])
def test_states_of_which_one_ranks_part_is_there_are_left_out(
    saved: Saved, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """DCP keeps of plain tensors one rank's, and every rank had its own part under the same number."""
    folder, wrote = saved[kind]
    with caplog.at_level(logging.WARNING, "ucp"):
        holds(folder / "lost", wrote.truth, states=False, param_shapes=fsdp1_jobs.shapes())
    assert "the optimizer 'optimizer' is left out: under FSDP1 it numbers its states" in caplog.text
    model = fsdp1_jobs.Net()
    with pytest.raises(UcpError, match="it has weights alone, and an optimizer would stay as it is"):
        ucp.load_training(folder / "lost", model=model, optimizer=torch.optim.AdamW(model.parameters()), rng=False)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_files_are_read_by_the_shards_metadata_in_them(saved: Saved, kind: str, tmp_path: Path) -> None:
    """By names, shapes and strides, in which a filter in channels_last lies as in memory."""
    folder, wrote = saved[kind]
    holds(folder / "told", wrote.truth, states=True)
    with ucp.open(folder / "told") as opened:
        assert (opened.format, opened.layout.dp, opened.training_state.global_steps) == ("torch-ranks", 3, 2)
        tied = "'tied.bias' are one rank's parts of parameters that are tied to others, and are left out"
        assert opened.catalog.unchecked == ((tied,) if kind == "orig" else ())
    ucp.convert(folder / "told", tmp_path / "out", "dcp")
    holds(tmp_path / "out", wrote.truth, states=True)


@pytest.mark.parametrize("kind", ["flat", "orig"])
def test_ranks_files_without_metadata_are_read_as_the_caller_tells(saved: Saved, kind: str) -> None:
    folder, wrote = saved[kind]
    with pytest.raises(Unsupported, match=r"_flat_param' is FSDP1's flat parameter.*--param-shapes FILE"):
        ucp.open(folder / "bare")
    holds(folder / "bare", wrote.truth, states=True, param_shapes=fsdp1_jobs.shapes())
    model = fsdp1_jobs.Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=7.0)
    ucp.load_training(folder / "bare", model=model, optimizer=optimizer, rng=False)
    losses = fsdp1_jobs.train(model, optimizer, fsdp1_jobs.FURTHER)
    assert losses == pytest.approx(wrote.further, rel=1e-5)


@pytest.mark.parametrize("kind", ["flat", "orig"])
def test_sharded_tensors_in_ranks_files(saved: Saved, kind: str) -> None:
    """FSDP1's SHARDED_STATE_DICT, whose tied weights are two tensors; of what ranks have differently, all is kept."""
    folder, wrote = saved[kind]
    holds(folder / "sharded", wrote.truth, states=True)
    with ucp.open(folder / "sharded") as opened:
        assert opened.training_state.client_state == {"seed": 0, "of_ranks": {"seed": [0, 1, 2]}}
    with pytest.raises(
        Unsupported, match=r"holds a part of a tensor \(a ShardedTensor of one rank\); give the path of the folder"
    ):
        ucp.open(folder / "sharded" / "run_rank1.pt")


def _keep(self: Any, state: Any) -> None:
    vars(self).update(kept=state, _local_shards=state[0], _metadata=state[1], _sharding_spec=state[3])
    vars(self).update(_process_group=None, _init_rrefs=False, _sharded_tensor_id=None, _remote_shards={})


@contextmanager
def _changed(folder: Path) -> Iterator[Any]:
    """What rank 1's file holds, to be changed. torch makes a ShardedTensor only where there is a process group, so here
    it is taken for what it was pickled as."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedTensor, "__setstate__", _keep)
        patch.setattr(ShardedTensor, "__getstate__", lambda self: vars(self)["kept"])
        found = torch.load(folder / "run_rank1.pt", weights_only=False)
        yield found
        torch.save(found, folder / "run_rank1.pt")


def _of_another_run(folder: Path) -> None:
    with _changed(folder) as found:
        found["optimizer"]["param_groups"][0]["params"].reverse()


def _of_another_step(folder: Path) -> None:
    with _changed(folder) as found:
        for state in found["optimizer"]["state"].values():
            state["step"] += 1


def _other_offsets(folder: Path) -> None:
    with _changed(folder) as found:
        one = found["shard_metadata"][""]
        found["shard_metadata"][""] = one._replace(param_offsets=tuple((a + 1, b + 1) for a, b in one.param_offsets))


HARM: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no rank 1": (lambda path: (path / "run_rank1.pt").unlink(), "not that of rank 1; a rank's part is missing"),
    "no rank 2": (lambda path: (path / "run_rank2.pt").unlink(), "which rank 2 had; a rank's part is missing"),
    "swapped": (
        lambda path: shutil.copy(path / "run_rank1.pt", path / "run_rank2.pt"),
        "was written as 'run_rank1.pt'",
    ),
    "two saves": (lambda path: shutil.copy(path / "run_rank1.pt", path / "b_rank0.pt"), "of several checkpoints"),
    "another run": (_of_another_run, "has other groups than 'run_rank0.pt'; files of two runs are mixed"),
    "another step": (_of_another_step, "ranks have different values of '0.step'; two steps are mixed"),
    "other offsets": (_other_offsets, "none of the vector's chunks has these"),
    "cut": (lambda path: (path / "run_rank1.pt").write_bytes((path / "run_rank0.pt").read_bytes()[:900]), "truncated"),
}


@pytest.mark.parametrize("harm", HARM)
def test_ranks_files_that_do_not_belong_together(saved: Saved, harm: str, tmp_path: Path) -> None:
    change, says = HARM[harm]
    shutil.copytree(saved["flat"][0] / "told", tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises((DamagedCheckpoint, Unsupported), match=says):
        ucp.open(tmp_path / "copy")
