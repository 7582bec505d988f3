"""Files with the same pickle: interpreted once, and each file's tensors are its own."""

from __future__ import annotations

import argparse
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ucp import limits
from ucp.errors import DamagedCheckpoint, DigestMismatch, UcpError, UnsafePickle
from ucp.storage.torch_pt import pickles, reader, twins
from ucp.storage.torch_pt.values import TensorRef


@pytest.fixture(autouse=True)
def none_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "TWINS", twins.Twins())


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose pickles are interpreted."""
    paths: list[str] = []
    load = pickles.Unpickler.load

    def loads(self: pickles.Unpickler) -> Any:
        paths.append(self._path)
        return load(self)

    monkeypatch.setattr(pickles.Unpickler, "load", loads)
    return paths


def state(fill: float) -> dict[str, Any]:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(torch.bfloat16)
    for param in module.parameters():
        param.data.fill_(fill)
    shared = [1, 2, torch.Size((3, 4))]
    flat = torch.full((40,), fill)
    return {
        "module": module.state_dict(),  # an OrderedDict with attributes of its own
        "shapes": OrderedDict((f"layer.{k}", torch.Size((k, 2))) for k in range(5)),
        "lists": [shared, (shared, {"a": shared})],
        "flat": flat,
        "views": [flat[8:24].view(4, 4).t(), flat],
        "settings": argparse.Namespace(lr=1e-3, betas=(0.9, 0.95), dtype=torch.bfloat16, device=torch.device("cpu")),
        "set": {1, 2, "x"},
    }


def save(path: Path, fill: float) -> Path:
    torch.save(state(fill), path)
    return path


def refs(graph: Any) -> list[TensorRef]:
    if isinstance(graph, TensorRef):
        return [graph]
    if isinstance(graph, dict):
        return [ref for value in graph.values() for ref in refs(value)]
    return [ref for value in graph for ref in refs(value)] if isinstance(graph, (list, tuple)) else []


def values(ref: TensorRef) -> bytes:
    raw = Path(ref.file).read_bytes()
    return raw[ref.span[0] : ref.span[1]]


def test_a_twin_is_what_its_own_interpretation_gives(tmp_path: Path, interpreted: list[str]) -> None:
    # Names of another length move the records.
    first, second = save(tmp_path / "a.pt", 1.0), save(tmp_path / ("b" * 70 + ".pt"), 2.0)
    one, other = reader.load(first), reader.load(second)
    assert interpreted == [str(first)]
    reader.TWINS = twins.Twins()
    itself = reader.load(second)
    assert interpreted == [str(first), str(second)]
    assert other == itself
    assert vars(other["module"]) == vars(itself["module"])
    assert [ref.record for ref in refs(other)] == [ref.record for ref in refs(itself)]
    assert {ref.file for ref in refs(other)} == {str(second)}
    assert values(other["flat"]) == np.full(40, 2.0, np.float32).tobytes()
    assert values(one["flat"]) == np.full(40, 1.0, np.float32).tobytes()


def test_nothing_that_can_change_is_shared(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{k}.pt", float(k)) for k in range(3)]
    one, two, three = map(reader.load, files)
    assert two["lists"][0] is two["lists"][1][0] is two["lists"][1][1]["a"]
    assert two["views"][1] is two["flat"]
    for graph in (one, two):
        graph["lists"][0].append("mine")
        graph["shapes"].clear()
        graph["settings"].lr = 5.0
        graph["set"].add("mine")
        vars(graph["module"])["_metadata"].clear()
    assert three == reader.load(files[2])
    assert three["lists"][0] == [1, 2, (3, 4)]
    assert len(three["shapes"]) == 5
    assert three["settings"].lr == 1e-3
    assert three["set"] == {1, 2, "x"}
    assert vars(three["module"])["_metadata"]


def without_record(path: Path, key: str) -> None:
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if not name.endswith(f"/data/{key}")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in held.items():
            archive.writestr(name, raw)


def with_shorter_record(path: Path, key: str) -> None:
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in held.items():
            archive.writestr(name, raw[:-4] if name.endswith(f"/data/{key}") else raw)


@pytest.mark.parametrize("spoil", [without_record, with_shorter_record])
def test_what_is_wrong_with_a_twin_is_found(tmp_path: Path, spoil: Callable[[Path, str], None]) -> None:
    first, second = save(tmp_path / "a.pt", 1.0), save(tmp_path / "b.pt", 2.0)
    reader.load(first)
    spoil(second, "0")
    said = []
    for known in (reader.TWINS, twins.Twins()):
        reader.TWINS = known
        with pytest.raises(DamagedCheckpoint, match=str(second)) as caught:
            reader.load(second)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_damaged_pickle_is_no_twin(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a.pt", 1.0), save(tmp_path / "b.pt", 2.0)
    reader.load(first)
    raw = bytearray(second.read_bytes())
    raw[raw.index(b"layer.3")] ^= 1
    second.write_bytes(raw)
    with pytest.raises(DigestMismatch):
        reader.load(second)


class Unknown:
    """A class that no list knows."""


def test_unknown_classes_are_refused_in_every_file(tmp_path: Path) -> None:
    files = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for path in files:
        torch.save({"x": Unknown()}, path)
    assert isinstance(reader.load(files[0], trust=True)["x"], Unknown)
    skipped: set[tuple[str, str]] = set()
    reader.load(files[0], skipped=skipped)
    assert skipped
    for path in files:
        with pytest.raises(UnsafePickle):
            reader.load(path)
    skipped = set()
    reader.load(files[1], skipped=skipped)
    assert skipped


def test_dtensors_are_refused_where_they_are_not_asked_for(tmp_path: Path) -> None:
    known = twins.Twins()
    twin = twins.Twin.of([1], [], [])
    assert twin is not None
    known.put(b"pickle", True, twin)
    assert known.get(b"pickle", False) is None
    assert known.get(b"pickle", True) is twin


def test_other_objects_are_not_kept(tmp_path: Path, interpreted: list[str]) -> None:
    files = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for path in files:
        torch.save({"numbers": np.arange(3.0)}, path)
    assert [reader.load(path)["numbers"].tolist() for path in files] == [[0, 1, 2]] * 2
    assert len(interpreted) == 2


def test_few_and_short_ones_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = twins.Twin.of({"a": 1}, [], [])
    assert twin is not None
    known = twins.Twins()
    monkeypatch.setattr(limits, "TWINS_BYTES", 2 * (1 + len(twin.raw)))
    for k in range(3):
        known.put(bytes([k]), False, twin)
    assert [known.get(bytes([k]), False) is not None for k in range(3)] == [False, True, True]
    known.put(bytes([2]), False, twin)
    assert known.get(bytes([1]), False) is twin
    monkeypatch.setattr(limits, "TWIN_BYTES", len(twin.raw) + 3)
    known.put(b"long", False, twin)
    assert known.get(b"long", False) is None


def test_a_deep_graph_is_not_kept(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    try:
        assert twins.Twin.of(deep, [], []) is None
    except UcpError:
        pytest.fail("it is only not kept")
    while deep:
        deep = deep.pop()
