"""``--to dcp``: what stock DCP then loads, equal to the bit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

import ucp
from tests.engines.truth import same
from tests.formats.dcp import states
from ucp import limits
from ucp.errors import DigestMismatch

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(params=["ucp", "dcp"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of model, optimizer and more, in our form or stock DCP's."""
    path = tmp_path / "source"
    if request.param == "ucp":
        ucp.save(states.nested(), path)
    else:
        dcp.save(states.nested(), checkpoint_id=path)
    return path


def test_stock_dcp_loads_it(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DCP_CHUNK_BYTES", 60)  # three rows of 'up.weight'
    monkeypatch.setattr(limits, "DCP_FILE_BYTES", 4000)
    ucp.convert(source, tmp_path / "dcp", to="dcp")
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) > 3
    truth = states.nested()
    loaded = states.blank(truth)
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp")
    assert same(loaded, truth)
    loaded = states.blank(truth)
    ucp.load(loaded, tmp_path / "dcp")
    assert same(loaded, truth)


@pytest.mark.slow
def test_stock_dcp_loads_it_from_a_url(bucket: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    monkeypatch.setattr(limits, "DCP_FILE_BYTES", 4000)
    url = f"{bucket}/{source.parent.name}"
    ucp.convert(source, url, to="dcp")
    truth = states.nested()
    loaded = states.blank(truth)
    dcp.load(loaded, storage_reader=FsspecReader(url))
    assert same(loaded, truth)


def test_stock_tools_read_it_whole(source: Path, tmp_path: Path) -> None:
    """DCP's own converter, which knows no state dict beforehand."""
    ucp.convert(source, tmp_path / "dcp", to="dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "one.pt")
    found: dict[str, Any] = torch.load(tmp_path / "one.pt", weights_only=False)
    truth = states.nested()
    assert same(dict(found["model"]), dict(truth["model"]))
    assert same(found["optim"]["state"], truth["optim"]["state"])
    assert found["epoch"] == 3


def test_the_metadata_is_what_torch_makes_of_it(source: Path, tmp_path: Path) -> None:
    """Every object has its class, and exactly the attributes that torch's own would have."""
    ucp.convert(source, tmp_path / "dcp", to="dcp")
    found = pickle.loads((tmp_path / "dcp/.metadata").read_bytes())
    made = {}
    for key, entry in found.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            made[key] = BytesStorageMetadata()
            continue
        chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks]
        made[key] = TensorStorageMetadata(
            TensorProperties(dtype=entry.properties.dtype), torch.Size(entry.size), chunks
        )
    places = {
        MetadataIndex(i.fqn, i.offset, i.index): _StorageInfo(p.relative_path, p.offset, p.length)
        for i, p in found.storage_data.items()
    }
    again = Metadata(made, found.planner_data, places, StorageMeta())
    again.version = "1.0.0"
    assert len(made) > 20
    assert found == again
    assert {type(c.offsets) for e in made.values() if hasattr(e, "chunks") for c in e.chunks} == {torch.Size}


def test_tied_parameters_are_there_under_all_names(tmp_path: Path) -> None:
    truth = states.nested(tied=True)
    ucp.save(truth, tmp_path / "source")
    with ucp.open(tmp_path / "source") as checkpoint:
        assert checkpoint.parameters["embed.weight"].aliases == ("head.weight",)
    ucp.convert(tmp_path / "source", tmp_path / "dcp", to="dcp")
    loaded = states.blank(truth)
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp")
    assert same(loaded, truth)
    assert "head.weight" in loaded["model"]


def test_every_element_type(tmp_path: Path) -> None:
    truth = states.types()
    ucp.save(truth, tmp_path / "source")
    ucp.convert(tmp_path / "source", tmp_path / "dcp", to="dcp")
    loaded = states.blank(truth)
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp")
    assert same(loaded, truth)


def test_the_training_state_comes_back(tmp_path: Path) -> None:
    net, optimizer = states.trained()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    ucp.save_training(
        tmp_path / "source", model=net, optimizer=optimizer, lr_scheduler=scheduler, step=3, samples=36, extra={"n": 1}
    )
    ucp.convert(tmp_path / "source", tmp_path / "dcp", to="dcp")
    again, optimizer2 = states.trained(seed=1)
    scheduler2 = torch.optim.lr_scheduler.StepLR(optimizer2, 5)
    report = ucp.load_training(tmp_path / "dcp", model=again, optimizer=optimizer2, lr_scheduler=scheduler2)
    assert (report.step, report.samples, report.extra) == (3, 36, {"n": 1})
    assert scheduler2.state_dict() == scheduler.state_dict()
    assert same(again.state_dict(), net.state_dict())
    assert same(optimizer2.state_dict()["state"], optimizer.state_dict()["state"])


def test_damage_at_the_source_leaves_nothing(tmp_path: Path) -> None:
    ucp.save(states.nested(), tmp_path / "source")
    file = tmp_path / "source" / "rank-00000-of-00001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DigestMismatch):
        ucp.convert(tmp_path / "source", tmp_path / "dcp", to="dcp", resume=False)
    assert not (tmp_path / "dcp").exists()
