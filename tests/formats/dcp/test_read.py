"""Checkpoints that stock DCP wrote, opened without it: every tensor, by byte ranges; and what is wrong, by name."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import planner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

import ucp
from tests.engines.truth import same
from tests.formats.dcp import states
from ucp.cli import main as commands
from ucp.errors import DamagedCheckpoint, UcpError, UnsafePickle, Unsupported
from ucp.inspection import bits
from ucp.inspection.verify import verify
from ucp.storage.files import Files
from ucp.storage.page_cache import cached_bytes

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("dcp")
    dcp.save(states.nested(), checkpoint_id=made / "nested")
    dcp.save(states.flattened(), checkpoint_id=made / "titan")
    return made


@pytest.mark.parametrize("name", ["nested", "titan"])
def test_model_and_optimizer(folder: Path, name: str) -> None:
    net, optimizer = states.trained()
    with ucp.open(folder / name) as checkpoint:
        assert checkpoint.format == "dcp"
        for parameter, value in net.named_parameters():
            info = checkpoint.parameters[parameter]
            assert (info.kind, info.scalars) == ("parameter", {"step": 3.0})
            assert same(checkpoint.read(parameter), value.detach())
            for state in ("exp_avg", "exp_avg_sq"):
                assert same(checkpoint.read(parameter, state), optimizer.state[value][state])
        for buffer, value in net.named_buffers():
            assert same(checkpoint.read(buffer), value)
        names = {id(p): n for n, p in net.named_parameters()}
        for live, saved in zip(optimizer.param_groups, checkpoint.training_state.param_groups, strict=True):
            assert {names[id(p)] for p in live["params"]} == set(saved.names)
            assert {k: v for k, v in live.items() if k != "params"} == saved.options


def test_values(folder: Path) -> None:
    with ucp.open(folder / "nested") as checkpoint:
        assert checkpoint.training_state.extra["state_dict"] == {"epoch": 3, "data.files": ["a", "b"]}
        assert same(checkpoint.read("data.position"), torch.tensor([4, 5]))


def test_tensors_that_are_cut_alike_share_their_blocks(folder: Path) -> None:
    """What other ranks are sent, and what is planned, is then once for all of them."""
    with ucp.open(folder / "nested") as checkpoint:
        tensors = checkpoint.catalog.tensors.values()
    cuts = {(t.shape, *(getattr(t.blocks, column.name).tobytes() for column in fields(t.blocks))) for t in tensors}
    assert len({id(t.blocks) for t in tensors}) == len(cuts) < len(tensors)


def test_a_region_costs_its_bytes(tmp_path: Path) -> None:
    tensor = torch.randn(4096, 256)
    dcp.save({"w": tensor}, checkpoint_id=tmp_path / "big")
    with ucp.open(tmp_path / "big") as checkpoint:
        before = checkpoint.bytes_read
        assert same(checkpoint.read("w", region=(slice(7, 9),)), tensor[7:9].clone())
        assert checkpoint.bytes_read - before == 2 * 256 * 4


def test_records_of_a_cold_file_are_asked_for_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening reads where each begins, and the disk would be waited for each time."""
    dcp.save({f"t{k}": torch.randn(50_000) for k in range(9)}, checkpoint_id=tmp_path / "cold")
    told: list[tuple[str, int]] = []
    monkeypatch.setattr(Files, "will_read", lambda self, path, first, last: told.append((Path(path).name, first)))
    with open(data_file(tmp_path / "cold"), "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(stream.name, [(0, 1 << 20)]):
        pytest.skip("this file system keeps its files in memory")
    with ucp.open(tmp_path / "cold"):
        places = dcp.FileSystemReader(tmp_path / "cold").read_metadata().storage_data.values()
    assert sorted(told) == sorted((place.relative_path, place.offset) for place in places)
    told.clear()
    Path(stream.name).read_bytes()
    ucp.open(tmp_path / "cold").close()
    assert told == []


@pytest.mark.parametrize("writer", [{"thread_count": 3}, {"single_file_per_rank": False}])
def test_every_element_type(tmp_path: Path, writer: dict[str, Any]) -> None:
    found = states.types()
    dcp.save(found, storage_writer=FileSystemWriter(tmp_path / "types", **writer))
    loaded = states.blank(found)
    report = ucp.load(loaded, tmp_path / "types")
    assert same(loaded, found)
    assert report.unused == ()


def damaged(folder: Path, to: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(folder / "nested", to)
    change(to)
    return to


def rewrite(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change the metadata's object."""

    def do(path: Path) -> None:
        meta = pickle.loads((path / ".metadata").read_bytes())
        (path / ".metadata").write_bytes(pickle.dumps(change(meta) or meta, protocol=4))

    return do


def data_file(path: Path) -> Path:
    return next(path.glob("*.distcp"))


def lose_last_chunk(meta: Any) -> None:
    meta.state_dict_metadata["model.up.weight"].chunks.clear()


def other_shape(meta: Any) -> None:
    entry = meta.state_dict_metadata["model.up.weight"]
    entry.chunks[0].sizes = torch.Size([5, 11])
    entry.size = torch.Size([5, 11])


def outside(meta: Any) -> None:
    for info in meta.storage_data.values():
        info.relative_path = "../" + info.relative_path


def transformed(meta: Any) -> None:
    for info in meta.storage_data.values():
        info.transform_descriptors = ["zstd"]


def nowhere(meta: Any) -> None:
    meta.storage_data.clear()


def beyond(meta: Any) -> None:
    for info in meta.storage_data.values():
        info.offset += 1 << 20


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda p: data_file(p).unlink(), DamagedCheckpoint, r"distcp: cannot be read .*lies in it"),
        (lambda p: os.truncate(data_file(p), 2000), DamagedCheckpoint, r"the file is truncated: bytes"),
        (lambda p: (p / ".metadata").write_bytes(b"junk"), DamagedCheckpoint, r"\.metadata: not a readable pickle"),
        (lambda p: (p / ".metadata").write_bytes(pickle.dumps({})), DamagedCheckpoint, "not the metadata of a DCP"),
        (rewrite(lose_last_chunk), DamagedCheckpoint, r"'up.weight' .*55 of 55 elements are missing"),
        (
            rewrite(other_shape),
            DamagedCheckpoint,
            r"'model.up.weight': its chunk at \[0, 0\] should be float32 \[5, 11\]",
        ),
        (rewrite(outside), DamagedCheckpoint, "is not a file of this folder"),
        (rewrite(transformed), Unsupported, r"was transformed as it was written \(zstd\)"),
        (rewrite(nowhere), DamagedCheckpoint, "does not say where"),
        (rewrite(beyond), DamagedCheckpoint, "the file is truncated"),
    ],
    ids=["no file", "truncated", "junk", "other pickle", "shard", "shape", "outside", "zstd", "nowhere", "beyond"],
)
def test_damage_is_named(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        ucp.open(damaged(folder, tmp_path / "damaged", change))


def test_every_byte_of_the_metadata(folder: Path, tmp_path: Path) -> None:
    """Cut anywhere, or with a byte changed, it is refused or read as something; nothing else is raised."""
    path = damaged(folder, tmp_path / "cut", lambda p: None)
    raw = (path / ".metadata").read_bytes()
    for at in range(0, len(raw), len(raw) // 40):
        for changed in (raw[:at], raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :]):
            (path / ".metadata").write_bytes(changed)
            try:
                ucp.open(path).close()
            except ucp.UcpError:
                continue


class Harmful:
    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Harmful, "ran", True))


class Custom:
    """An object of the program's own, as data loaders keep."""

    def __init__(self) -> None:
        self.position = 4


def test_nothing_is_run(folder: Path, tmp_path: Path) -> None:
    path = damaged(folder, tmp_path / "evil", lambda p: (p / ".metadata").write_bytes(pickle.dumps(Harmful())))
    with pytest.raises(UnsafePickle, match=r"builtins\.setattr") as caught:
        ucp.open(path)
    assert not Harmful.ran
    assert "trust" not in str(caught.value)  # which would not help: metadata is never trusted


def test_the_hint_of_a_refusal_works(tmp_path: Path) -> None:
    """What it offers is an argument of `ucp.open`, and opens the checkpoint."""
    dcp.save({"w": torch.ones(2), "loader": Custom()}, checkpoint_id=tmp_path / "own")
    with pytest.raises(UnsafePickle) as caught:
        ucp.open(tmp_path / "own")
    offered = re.search(r"ucp\.open\(\.\.\., (\w+)=True\)", str(caught.value))
    assert offered is not None
    with ucp.open(tmp_path / "own", **{offered[1]: True}) as checkpoint:  # type: ignore[arg-type]
        assert checkpoint.training_state.extra["state_dict"]["loader"].position == 4


def test_an_object_of_an_unknown_class_can_be_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dcp.save({"w": torch.ones(2), "loader": Custom()}, checkpoint_id=tmp_path / "own")
    with ucp.open(tmp_path / "own", options={"skip_unknown_objects": True}) as checkpoint:
        assert checkpoint.training_state.extra["state_dict"]["loader"] == {"position": 4}
        assert torch.equal(checkpoint.read("w"), torch.ones(2))
    assert "Custom are left out, but for the tensors and plain data in them" in caplog.text
    assert commands.main(["inspect", str(tmp_path / "own")]) == 2
    assert commands.main(["inspect", str(tmp_path / "own"), "--skip-unknown-objects"]) == 0


def test_the_plans_that_metadata_may_keep(folder: Path, tmp_path: Path) -> None:
    """Megatron-Core hangs all ranks' plans on the metadata."""

    def add(meta: Any) -> None:
        index = MetadataIndex("model.up.weight", torch.Size([0, 0]))
        data = TensorWriteData(None, TensorProperties(), torch.Size([2]))
        items = [WriteItem(index, WriteItemType.TENSOR, tensor_data=data)]
        if hasattr(planner, "BytesIOWriteData"):  # since torch 2.7
            items.append(WriteItem(index, WriteItemType.BYTE_IO, planner.BytesIOWriteData(8)))
        meta.all_local_plans = [SavePlan(items)]

    path = damaged(folder, tmp_path / "planned", rewrite(add))
    with ucp.open(path) as checkpoint:
        assert checkpoint.verify() > 0


def test_an_object_of_an_unknown_class_is_named_and_can_be_trusted(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2), "loader": Custom()}, checkpoint_id=tmp_path / "own")
    with pytest.raises(UnsafePickle, match=r"entry 'loader': .*Custom"):
        ucp.open(tmp_path / "own")
    with ucp.open(tmp_path / "own", trust_client_state=True) as checkpoint:
        assert checkpoint.training_state.extra["state_dict"]["loader"].position == 4


def test_older_metadata(folder: Path, tmp_path: Path) -> None:
    """Without planner data, names are all there is; older releases have fewer fields."""

    def strip(meta: Any) -> None:
        meta.planner_data = None
        for name in ("version", "storage_meta"):
            vars(meta).pop(name, None)
        for info in meta.storage_data.values():
            vars(info).pop("transform_descriptors", None)

    with ucp.open(damaged(folder, tmp_path / "old", rewrite(strip))) as checkpoint:
        assert same(checkpoint.read("up.weight"), states.trained()[0].up.weight.detach())


def test_archives_in_a_row_are_each_read_from_their_beginning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's zipfile refuses large ones with other bytes before them since 3.13.5 and its siblings."""
    begun = []

    class Watched(zipfile.ZipFile):
        def __init__(self, file: Any) -> None:
            file.seek(0)
            begun.append(file.read(4))
            super().__init__(file)

    monkeypatch.setattr(bits.zipfile, "ZipFile", Watched)
    assert not [finding for finding in verify(folder).findings if finding.fault]
    assert len(begun) > 3
    assert set(begun) == {b"PK\3\4"}


def test_verifying_finds_a_flipped_bit(folder: Path, tmp_path: Path) -> None:
    """DCP has no digests, but every record in its files is an archive with checksums of its own."""
    path = damaged(folder, tmp_path / "whole", lambda p: None)
    found = verify(path)
    assert [finding for finding in found.findings if finding.fault] == []
    assert found.checked["digested_by_zip"] == data_file(path).stat().st_size
    with ucp.open(path) as checkpoint:
        tensor = checkpoint.catalog.tensors["embed.weight", "exp_avg"]
    raw = bytearray(data_file(path).read_bytes())
    raw[int(tensor.bases[0]) + 5] ^= 2
    data_file(path).write_bytes(raw)
    [fault] = [finding for finding in verify(path).findings if finding.fault]
    assert "'archive/data/0' (140 bytes" in fault.text


@pytest.mark.parametrize("step", [7, torch.tensor(7), torch.tensor([7], dtype=torch.int32)])
def test_step_and_scheduler_are_understood(tmp_path: Path, step: Any) -> None:
    """By the keys that torchtitan has; they stay the entries that they are, besides."""
    state = {
        "up.weight": torch.ones(2, 3),
        "train_state": {"step": step, "ntokens_seen": 5},
        "lr_scheduler": {"last_epoch": 7, "base_lrs": [0.1]},
    }
    dcp.save(state, checkpoint_id=tmp_path / "step-7")
    with ucp.open(tmp_path / "step-7") as opened:
        assert opened.training_state.global_steps == 7
        assert opened.training_state.lr_scheduler == {"last_epoch": 7, "base_lrs": [0.1]}
        assert opened.training_state.extra["state_dict"]["train_state.ntokens_seen"] == 5
    ucp.convert(tmp_path / "step-7", tmp_path / "again", to="dcp")
    with ucp.open(tmp_path / "again") as opened:
        assert opened.training_state.global_steps == 7
        assert opened.training_state.lr_scheduler == {"last_epoch": 7, "base_lrs": [0.1]}


def test_a_scheduler_that_is_nested_deeper_is_left_as_it_is(tmp_path: Path) -> None:
    state = {"up.weight": torch.ones(2), "scheduler": {"last_epoch": 7, "inner": {"a": 1}}, "step": True}
    dcp.save(state, checkpoint_id=tmp_path / "run")
    with ucp.open(tmp_path / "run") as opened:
        assert opened.training_state.lr_scheduler is None
        assert opened.training_state.global_steps is None


@pytest.mark.parametrize("groups", [1, 2])
def test_an_optimizers_numbers_are_named_by_the_run_that_loads(tmp_path: Path, groups: int) -> None:
    """A program that saves ``optimizer.state_dict()`` itself; with other groups, nothing is taken."""

    def build(seed: int, split: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        own = list(model.parameters())
        halves = [own] if split == 1 else [own[:1], own[1:]]
        return model, torch.optim.AdamW([{"params": half} for half in halves], lr=1e-2)

    model, optimizer = build(0, groups)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path / "a")
    live, other = build(1, groups)
    ucp.load_training(tmp_path / "a", model=live, optimizer=other, rng=False)
    for mine, theirs in zip(live.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert other.state[mine].keys() == optimizer.state[theirs].keys()
        for state, tensor in optimizer.state[theirs].items():
            assert torch.equal(other.state[mine][state], tensor), state
    live, other = build(1, 3 - groups)
    with pytest.raises(UcpError):
        ucp.load_training(tmp_path / "a", model=live, optimizer=other, rng=False)


def test_signs_of_two_saves_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """DCP's files name no save. Those of two that are laid out alike are read as one, but for what their values say."""
    state = states.nested()
    dcp.save(state, checkpoint_id=tmp_path / "one")
    with caplog.at_level("WARNING", "ucp"), ucp.open(tmp_path / "one") as opened:
        assert opened.catalog.unchecked == ()
    assert "steps" not in caplog.text
    kept = state["optim"]["state"]
    step = kept["up.weight"]["step"]
    kept["up.weight"]["step"] = step + 2 if isinstance(step, (int, float)) else step.clone() + 2
    dcp.save(state, checkpoint_id=tmp_path / "two")
    with caplog.at_level("WARNING", "ucp"), ucp.open(tmp_path / "two") as opened:
        (steps,) = opened.catalog.unchecked
    assert re.search(r"parameters of one param group have taken \d+ and \d+ steps \('.*'\); if none was frozen", steps)
    assert steps in caplog.text


def test_values_beside_the_model_become_client_state(folder: Path, tmp_path: Path) -> None:
    """Under DeepSpeed there is no other place for them; they were lost."""
    ucp.convert(folder / "nested", tmp_path / "native", "deepspeed", "dp=2,zero=1", ds_config={})
    with ucp.open(tmp_path / "native") as checkpoint:
        assert checkpoint.training_state.client_state == {"epoch": 3, "data.files": ["a", "b"]}


def test_what_lies_beside_the_model_is_no_weight(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = states.trained()
    dcp.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, checkpoint_id=tmp_path / "numbers")
    with ucp.open(tmp_path / "numbers") as checkpoint:
        assert "'optim' numbers its parameters, so its states keep their numbers" in checkpoint.catalog.unchecked[0]
    ucp.convert(tmp_path / "numbers", tmp_path / "weights", "huggingface")
    assert "tensors that lie beside the model, such as 'optim.state.0.exp_avg', are left out" in caplog.text
    with ucp.open(tmp_path / "weights") as checkpoint:
        assert checkpoint.parameters.keys() == model.state_dict().keys()
