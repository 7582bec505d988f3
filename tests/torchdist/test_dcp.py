"""Our storage under stock ``dcp.load`` and ``dcp.save``; and what DCP itself gets wrong."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import ucp
import ucp.dcp
from tests.engines.truth import same
from tests.formats.dcp import states
from ucp.errors import DestinationError, DigestMismatch
from ucp.saving import share
from ucp.torchdist.target import StateDictTarget

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore::FutureWarning")


@pytest.fixture(params=["ucp", "titan", "dcp", "universal", "writer"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "source"
    if request.param == "ucp":
        ucp.save(states.nested(), path)
    elif request.param == "titan":
        ucp.save(states.flattened(), path)
    elif request.param == "dcp":
        dcp.save(states.nested(), checkpoint_id=path)
    elif request.param == "writer":
        dcp.save(states.nested(), storage_writer=ucp.dcp.StorageWriter(path))
    else:
        ucp.save(states.nested(), tmp_path / "fragments")
        ucp.convert(tmp_path / "fragments", path)
    return path


def model_and_optimizer(flat: bool) -> dict[str, Any]:
    return {k: v for k, v in (states.flattened() if flat else states.nested()).items() if k not in OTHERS}


OTHERS = ("epoch", "data", "train_state")


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_the_reader_finds_entries_whatever_their_names(source: Path, flat: bool) -> None:
    truth = model_and_optimizer(flat)
    loaded = states.blank(truth)
    reader = ucp.dcp.StorageReader(source)
    dcp.load(loaded, storage_reader=reader)
    assert same(loaded, truth)
    report = reader.last_load
    assert report is not None
    if (source / "ucp.json").exists():
        assert report.proof is not None
        assert (report.proof.tensors, report.proof.complete) == (report.tensors, True)
    else:
        assert report.proof is None
    always = ucp.dcp.StorageReader(source, prove="always")
    dcp.load(loaded, storage_reader=always)
    assert always.last_load is not None
    assert always.last_load.proof is not None
    assert always.last_load.proof.complete


def test_a_fault_after_a_stock_load_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ucp.save({"w": torch.arange(9.0)}, tmp_path / "saved")
    apply = StateDictTarget.apply
    loaded = {"w": torch.zeros(9)}

    def spoiled(self: StateDictTarget, brought: Any) -> None:
        apply(self, brought)
        loaded["w"][3] += 1

    monkeypatch.setattr(StateDictTarget, "apply", spoiled)
    with pytest.raises(
        CheckpointException, match=r"ProofFailed.*'w' \(param\): its values are not those that were saved"
    ):
        dcp.load(loaded, storage_reader=ucp.dcp.StorageReader(tmp_path / "saved"))


def test_the_reader_without_a_state_dict(source: Path, tmp_path: Path) -> None:
    """As `dcp_to_torch_save` loads: everything that the metadata lists."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found: dict[str, Any] = {}
    reader = ucp.dcp.StorageReader(source)
    _load_state_dict(found, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    truth = states.nested()
    assert same(dict(found["model"]), dict(truth["model"]))
    assert same(found["optim"]["state"]["up.weight"], truth["optim"]["state"]["up.weight"])


def test_what_is_missing_or_does_not_fit_is_refused(source: Path) -> None:
    truth = model_and_optimizer(False)
    reader = ucp.dcp.StorageReader(source)
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: model\.other"):
        dcp.load({"model": {**truth["model"], "other": torch.zeros(2)}}, storage_reader=reader)
    narrow = {"model": {k: v.half() if k == "up.weight" else v.clone() for k, v in truth["model"].items()}}
    before = copy.deepcopy(narrow)
    with pytest.raises(CheckpointException, match=r"'model.up.weight' is float32 in the checkpoint and float16 here"):
        dcp.load(narrow, storage_reader=reader)
    assert same(narrow, before)
    extra: dict[str, Any] = {"model": truth["model"], "other": torch.zeros(2)}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(extra, storage_reader=reader, planner=planner)


@pytest.mark.parametrize("state", [states.nested, states.flattened, states.types])
@pytest.mark.parametrize("background", [False, True])
def test_the_writer(tmp_path: Path, state: Any, background: bool) -> None:
    truth = state()
    writer = ucp.dcp.StorageWriter(tmp_path / "saved")
    if background:
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )  # which DCP's async_save asks for
        try:
            dcp.async_save(truth, storage_writer=writer).result()
        finally:
            torch.distributed.destroy_process_group()
    else:
        dcp.save(truth, storage_writer=writer)
    assert (tmp_path / "saved" / "ucp.json").is_file()
    loaded = states.blank(truth)
    ucp.load(loaded, tmp_path / "saved")
    assert same(loaded, truth)
    with ucp.open(tmp_path / "saved") as checkpoint:
        assert checkpoint.verify() > 0


def fill_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: Any, offset: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(share, "write_at", full)


def test_a_full_disk_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_writers: Callable[[], None]
) -> None:
    """DCP with several writer threads swallows that."""
    ucp.save({"w": torch.zeros(3)}, tmp_path / "saved")
    fill_up(monkeypatch)
    with pytest.raises(CheckpointException, match="the file system became full"):
        dcp.save(states.nested(), storage_writer=ucp.dcp.StorageWriter(tmp_path / "saved"))
    with pytest.raises(DestinationError, match="the file system became full"):
        ucp.save(states.nested(), tmp_path / "saved")
    with pytest.raises(DestinationError, match="the file system became full"):
        ucp.async_save(states.nested(), tmp_path / "saved").result()
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["saved"]
    loaded = {"w": torch.ones(3)}
    ucp.load(loaded, tmp_path / "saved")
    assert same(loaded, {"w": torch.zeros(3)})


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """DCP loads it."""
    truth = {"w": torch.arange(1000.0)}
    dcp.save(truth, storage_writer=ucp.dcp.StorageWriter(tmp_path / "saved"))
    file = next((tmp_path / "saved").glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-2000] ^= 4
    file.write_bytes(raw)
    loaded = {"w": torch.zeros(1000)}
    with pytest.raises(CheckpointException, match="DigestMismatch"):
        dcp.load(loaded, storage_reader=ucp.dcp.StorageReader(tmp_path / "saved"))
    with pytest.raises(DigestMismatch):
        ucp.load(loaded, tmp_path / "saved")
    assert not loaded["w"].any()


def test_a_lost_last_shard_is_noticed(tmp_path: Path) -> None:
    ucp.save(states.nested(), tmp_path / "saved")
    file = next((tmp_path / "saved").glob("rank-*.safetensors"))
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(ucp.UcpError, match="truncated or was changed"):
        ucp.open(tmp_path / "saved")
