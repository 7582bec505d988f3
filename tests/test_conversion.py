"""Conversions: the truth arrives, and whatever goes wrong leaves the destination as it was."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import ucp
from tests.formats import raw
from tests.slow_cases import slow_but
from ucp.catalog import SourceFile, TrainingState
from ucp.errors import BadArgument, DamagedCheckpoint, DestinationError, DigestMismatch, NotACheckpoint, Unsupported

if TYPE_CHECKING:
    from tests.engines.sources import Sources

ROOT = Path(__file__).resolve().parents[1]


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, type and shape included."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.reshape(-1).view(torch.uint8).equal(
        b.contiguous().reshape(-1).view(torch.uint8)
    )


def assert_holds(path: Path, made: raw.Raw) -> None:
    with ucp.open(path) as checkpoint:
        assert set(checkpoint.parameters) == {name for name, _ in made.truth}
        for name, state in made.truth:
            assert equal(checkpoint.read(name, state), made.tensor(name, state)), (name, state)


@pytest.fixture
def made(tmp_path: Path) -> raw.Raw:
    return raw.make(tmp_path / "raw", dp=3, stage=3)


@pytest.fixture
def source(tmp_path: Path, made: raw.Raw) -> Path:
    """A checkpoint that `ucp.open` takes, whose tensors are fragments."""
    return raw.virtual_checkpoint(tmp_path / "source", made)


def test_to_the_consolidated_form(source: Path, made: raw.Raw, tmp_path: Path) -> None:
    before = raw.tree(source)
    report = ucp.convert(source, tmp_path / "new/parents/dest")
    dest = tmp_path / "new/parents/dest"
    assert_holds(dest, made)
    assert raw.tree(source) == before
    written = raw.tree(dest)
    assert (report.files, report.bytes_written) == (len(written), sum(map(len, written.values())))
    assert (report.parameters, report.tensors) == (len(made.catalog.parameters), len(made.truth))
    assert (report.source, report.destination) == (str(source), str(dest))
    assert (report.source_format, report.to, report.layout) == ("universal", "universal", "dp=3,zero=3")
    assert not report.dry_run
    assert not report.virtual
    assert report.bytes_read >= sum(tensor.nbytes for tensor in made.catalog.tensors.values())
    assert str(report).startswith(
        f"wrote {dest}: {len(made.truth)} tensors of {len(made.catalog.parameters)} parameters"
    )
    with ucp.open(dest) as checkpoint:
        assert checkpoint.training_state == made.catalog.training_state
        assert checkpoint.verify() > 0


def test_to_the_virtual_form_and_on(source: Path, made: raw.Raw, tmp_path: Path) -> None:
    consolidated, pointing, again = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    ucp.convert(source, consolidated)
    report = ucp.convert(consolidated, pointing, virtual=True)
    assert report.virtual
    assert report.bytes_read == 0
    assert os.listdir(pointing) == ["ucp.json"]
    assert_holds(pointing, made)
    ucp.convert(pointing, again)
    assert_holds(again, made)
    left, right = raw.tree(consolidated), raw.tree(again)
    assert {n: c for n, c in left.items() if n != "ucp.json"} == {n: c for n, c in right.items() if n != "ucp.json"}


def test_a_virtual_form_with_digests_finds_damage(source: Path, made: raw.Raw, tmp_path: Path) -> None:
    ucp.convert(source, tmp_path / "b", virtual=True, digests=True)
    assert_holds(tmp_path / "b", made)
    victim = tmp_path / "raw/rank1.bin"
    times = victim.stat()
    raw.flip(victim, victim.stat().st_size - 1, 16)
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    with ucp.open(tmp_path / "b") as checkpoint, pytest.raises(DigestMismatch, match=r"rank1\.bin"):
        checkpoint.verify()
    with pytest.raises(DigestMismatch, match=r"rank1\.bin"):
        ucp.convert(tmp_path / "b", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_dry_run_writes_nothing_and_tells_all(source: Path, tmp_path: Path) -> None:
    before = raw.tree(tmp_path)
    planned = ucp.convert(source, tmp_path / "dest", dry_run=True)
    assert raw.tree(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw", "source"]
    assert planned.dry_run
    assert str(planned).startswith("would write")
    done = ucp.convert(source, tmp_path / "dest")
    manifest = (tmp_path / "dest/ucp.json").stat().st_size
    assert (planned.files + 1, planned.bytes_written + manifest) == (done.files, done.bytes_written)


@pytest.mark.parametrize("workers", [1, 5])
def test_workers_and_memory_change_nothing(source: Path, made: raw.Raw, tmp_path: Path, workers: int) -> None:
    seen: list[tuple[int, int]] = []
    ucp.convert(
        source,
        tmp_path / "dest",
        workers=workers,
        max_memory=16 << 20,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert_holds(tmp_path / "dest", made)
    assert seen[-1][0] == seen[-1][1]


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"to": "megatron"}, BadArgument, "converting to 'megatron' needs a layout to write for"),
        ({"to": "tar"}, BadArgument, "unknown target format 'tar'; supported are 'universal', 'deepspeed'"),
        ({"to": "deepspeed"}, BadArgument, "needs a layout to write for, such as dp=4,zero=3"),
        ({"to": "deepspeed", "virtual": True}, BadArgument, "virtual form exists in the universal format only"),
        ({"layout": "dp=2"}, BadArgument, "a layout is for 'deepspeed' or 'megatron' only"),
        ({"to": "deepspeed", "layout": "dq=2"}, BadArgument, "layout 'dq=2': unknown name 'dq'"),
        ({"digests": True}, BadArgument, "digests can be asked for in the virtual form only"),
        ({"ds_config": {}}, BadArgument, "a DeepSpeed config is for 'deepspeed' only"),
        (
            {"to": "deepspeed", "layout": "dp=2", "ds_config": "nowhere.json"},
            BadArgument,
            "nowhere.json: there is no such file",
        ),
        ({"workers": 0}, BadArgument, "0 workers"),
        ({"max_memory": 1}, BadArgument, "memory limit of 1 bytes"),
        ({"spec": "x.yaml"}, BadArgument, r"x.yaml: can't be read as a spec"),
        ({"tag": "step1"}, NotACheckpoint, "no checkpoint with the tag 'step1'"),
    ],
)
def test_wrong_arguments(
    source: Path, tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ucp.convert(source, tmp_path / "dest", **arguments)
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize("content", ["", "[1]", "{", "\x00"])
def test_a_config_that_is_none(source: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(BadArgument, match=r"ds\.json: is not (valid JSON|a JSON object)"):
        ucp.convert(source, tmp_path / "dest", "deepspeed", "dp=2,zero=1", ds_config=tmp_path / "ds.json")


# --- destinations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["folder", "empty folder", "file", "dangling link", "the source itself"])
def test_a_destination_that_exists_is_untouched(source: Path, tmp_path: Path, what: str) -> None:
    dest = source if what == "the source itself" else tmp_path / "dest"
    if "folder" in what:
        dest.mkdir()
    if what == "folder":
        (dest / "precious").write_text("x")
    if what == "file":
        dest.write_text("x")
    if what == "dangling link":
        dest.symlink_to("nowhere")
    before = raw.tree(tmp_path)
    with pytest.raises(DestinationError, match="the destination exists already"):
        ucp.convert(source, dest)
    assert raw.tree(tmp_path) == before
    assert os.path.lexists(dest)


def test_overwriting_replaces_checkpoints_only(source: Path, made: raw.Raw, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    ucp.convert(source, dest, virtual=True)
    ucp.convert(source, dest, overwrite=True)
    assert (dest / "model-00001-of-00001.safetensors").exists()
    assert_holds(dest, made)
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".ucp")]
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("x")
    with pytest.raises(DestinationError, match="holds no checkpoint, so it is not replaced"):
        ucp.convert(source, other, overwrite=True)
    with pytest.raises(DestinationError, match="holds no checkpoint, so it is not replaced"):
        ucp.convert(source, other / "precious", overwrite=True)
    assert raw.tree(other) == {"precious": b"x"}
    before = raw.tree(dest)
    for virtual in (True, False):
        with pytest.raises(DestinationError, match="which is part of the source"):
            ucp.convert(dest, dest, overwrite=True, virtual=virtual)
    assert raw.tree(dest) == before


def test_a_failed_overwriting_keeps_the_old(source: Path, made: raw.Raw, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    ucp.convert(source, dest)
    before = raw.tree(dest)
    damaged = tmp_path / "damaged"
    ucp.convert(source, damaged)
    raw.flip(damaged / "optimizer.exp_avg-00001-of-00001.safetensors", 1200, 1)
    with pytest.raises(DigestMismatch):
        ucp.convert(damaged, dest, overwrite=True)
    assert raw.tree(dest) == before


def test_a_parent_that_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DestinationError, match="is not a folder"):
        ucp.convert(source, tmp_path / "file/dest")


@pytest.fixture
def mounted() -> Iterator[Any]:
    """Mounts small real file systems."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="mounted-"))
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, check=False, capture_output=True).returncode:
            folder.rmdir()
            pytest.skip("mounting a file system is not allowed here")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def test_a_destination_that_cannot_be_written(source: Path, mounted: Any) -> None:
    place = mounted("size=64m,ro")
    with pytest.raises(DestinationError, match=r"dest: cannot be made"):
        ucp.convert(source, place / "dest")


def test_a_folder_without_write_permission(source: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(DestinationError, match="is not writable"):
        ucp.convert(source, tmp_path / "closed/dest")


def test_too_little_space_is_found_before_the_first_byte(tmp_path: Path, mounted: Any) -> None:
    made = raw.make(tmp_path / "raw", shapes={"w": (1000, 1000)})
    source = raw.virtual_checkpoint(tmp_path / "source", made)
    place = mounted("size=8m")
    before = place.stat().st_mtime_ns
    for dry_run in (True, False):
        with pytest.raises(DestinationError, match=r"dest: 13\d+ bytes are needed, and 8\d+ are free"):
            ucp.convert(source, place / "dest", dry_run=dry_run)
    assert os.listdir(place) == []
    assert place.stat().st_mtime_ns == before


# --- failures on the way ---------------------------------------------------------------------------------------------


def test_a_source_that_is_damaged(source: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    ucp.convert(source, whole)
    raw.flip(whole / "model-00001-of-00001.safetensors", 1500, 1)
    with pytest.raises(DigestMismatch, match=r"model-00001-of-00001\.safetensors: chunk 0"):
        ucp.convert(whole, tmp_path / "new/dest")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw", "source", "whole"]


def test_a_source_that_changes_meanwhile(source: Path, tmp_path: Path) -> None:
    victim = tmp_path / "raw/rank0.bin"

    def meddle(done: int, total: int) -> None:
        if done == total:
            os.utime(victim, ns=(0, 12345))

    with pytest.raises(DamagedCheckpoint, match=r"rank0\.bin: was changed during the conversion"):
        ucp.convert(source, tmp_path / "dest", progress=meddle)
    assert not (tmp_path / "dest").exists()


def test_client_state_that_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"client_state\['f'\]"):
        raw.virtual_checkpoint(
            tmp_path / "source", raw.make(tmp_path / "raw", training_state=TrainingState(client_state={"f": object()}))
        )


def test_a_fault_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        ucp.convert(source, tmp_path / "new/dest", progress=fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw", "source"]


KILLED = """
import os, signal, sys
import ucp
seen = 0
def progress(done, total):
    global seen
    seen += 1
    if done >= float(sys.argv[3]) * total:
        os.kill(os.getpid(), signal.SIGKILL)
ucp.convert(sys.argv[1], sys.argv[2], workers=1, max_memory=16 << 20, progress=progress, overwrite=True)
"""


@pytest.mark.parametrize(
    ("share", "replacing"), slow_but([(0.5, True), (1.0, False)], product((0.01, 0.5, 1.0), (False, True)))
)
def test_death_on_the_way_leaves_the_old_or_nothing(tmp_path: Path, share: float, replacing: bool) -> None:
    made = raw.make(tmp_path / "raw", shapes={"w": (1000, 700), "b": (3,)})
    source, dest = raw.virtual_checkpoint(tmp_path / "source", made), tmp_path / "dest"
    if replacing:
        ucp.convert(source, dest, virtual=True)
    before = raw.tree(dest)
    done = subprocess.run([sys.executable, "-c", KILLED, source, dest, str(share)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert raw.tree(dest) == before
    assert (tmp_path / ".ucp-part-dest").is_dir()
    ucp.convert(source, dest, overwrite=True)
    assert_holds(dest, made)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".ucp")]


MEASURED = """
import resource, sys
import numpy, torch, xxhash
import ucp, ucp.conversion
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ucp.convert(sys.argv[1], sys.argv[2], workers=2, max_memory=int(sys.argv[3]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_memory_stays_below_the_limit(tmp_path: Path) -> None:
    """One tensor of 120 MB, three states, in 40 MB."""
    made = raw.make(tmp_path / "raw", shapes={"w": (6000, 5000)})
    source = raw.virtual_checkpoint(tmp_path / "source", made)
    limit = 40 << 20
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, source, tmp_path / "dest", str(limit)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) < limit + (16 << 20)  # the plan, thread stacks and the allocator's own


# --- real checkpoints ------------------------------------------------------------------------------------------------


def assert_is_the_truth(path: Path | str, truth: Any) -> None:
    with ucp.open(path) as checkpoint:
        known = set(checkpoint.parameters)
        assert known == set(truth.params) | set(truth.frozen) | set(truth.buffers)
        for name, states in truth.params.items():
            assert checkpoint.parameters[name].kind == "parameter"
            assert set(checkpoint.parameters[name].states) == set(states)
            for state, tensor in states.items():
                assert equal(checkpoint.read(name, state), tensor), (name, state)
            for key, value in truth.scalars[name].items():
                assert float(checkpoint.parameters[name].scalars[key]) == float(value)
        for kind, tensors in (("frozen", truth.frozen), ("buffer", truth.buffers)):
            for name, tensor in tensors.items():
                assert checkpoint.parameters[name].kind == kind
                assert equal(checkpoint.read(name), tensor), name
        for alias, owner in truth.aliases.items():
            assert equal(checkpoint.read(alias), truth.params[owner]["param"])
        state = checkpoint.training_state
        for counter, value in truth.counters.items():
            assert getattr(state, counter) == value
        for group, expected in zip(state.param_groups, truth.groups, strict=True):
            assert list(group.names) == list(expected["names"])
            for key in ("lr", "weight_decay"):
                assert group.options is not None
                assert group.options[key] == expected[key]
        assert state.client_state["nested"] == {"epoch": 4}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_real_checkpoints_become_universal_ones(sources: Sources, tmp_path: Path, stage: int, dtype: str) -> None:
    from tests.engines.configs import Case

    case = Case(stage=stage, dtype=dtype, dp=1 + stage, tied=True, scheduler=True)
    if stage > 0:  # a stage-0 file does not name the optimizer's parameters, and these would leave it open
        case = case.but(groups=2, frozen=True)
    run = sources.get(case)
    ucp.convert(run.folder, tmp_path / "consolidated")
    assert_is_the_truth(tmp_path / "consolidated", run.truth)
    report = ucp.convert(run.folder, tmp_path / "virtual", virtual=True, digests=True)
    assert report.layout == f"dp={case.dp},zero={stage}"
    assert_is_the_truth(tmp_path / "virtual", run.truth)
    ucp.convert(tmp_path / "virtual", tmp_path / "again")
    assert_is_the_truth(tmp_path / "again", run.truth)


@pytest.mark.slow
def test_a_real_checkpoint_becomes_one_of_another_layout(sources: Sources, tmp_path: Path) -> None:
    from tests.engines.configs import Case

    case = Case(stage=1, dtype="bf16", dp=3, groups=2)
    run = sources.get(case)
    report = ucp.convert(run.folder, tmp_path / "dest", to="deepspeed", layout="dp=2,zero=3")
    assert (report.tag, report.target_layout) == (run.tag, "dp=2,zero=3")
    assert (tmp_path / "dest/latest").read_text() == run.tag
    with ucp.open(tmp_path / "dest") as checkpoint:
        assert str(checkpoint.layout) == "dp=2,zero=3"
    assert_is_the_truth(tmp_path / "dest", run.truth)


@pytest.mark.slow
def test_a_real_llama_opens_in_transformers(sources: Sources, tmp_path: Path) -> None:
    import transformers

    from tests.engines.configs import Case
    from tests.engines.sources import build_model

    case = Case(stage=3, dtype="bf16", dp=2, model="llama")
    run = sources.get(case)
    ucp.convert(run.folder, tmp_path / "dest")
    build_model(case).config.save_pretrained(tmp_path / "dest")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dest")
    parameters = dict(loaded.named_parameters())
    assert set(parameters) == set(run.truth.params)
    for name, parameter in parameters.items():
        assert parameter.equal(run.truth.params[name]["param"].to(parameter.dtype)), name


@pytest.mark.slow
def test_a_virtual_form_of_gigabytes_takes_a_second(tmp_path: Path) -> None:
    """2 GB of sparse files: their metadata are all that is read."""
    made = raw.make(tmp_path / "raw", shapes={f"layer.{k}.weight": (8, 8) for k in range(300)}, dp=4)
    total = 0
    for file in made.catalog.files:
        os.truncate(file.path, 500_000_000)
        total += 500_000_000
    files = tuple(SourceFile(f.path, 500_000_000, os.stat(f.path).st_mtime_ns) for f in made.catalog.files)
    large = dataclasses.replace(made.catalog, files=files)
    source = raw.virtual_checkpoint(tmp_path / "source", raw.Raw(large, made.truth))
    started = time.process_time()
    report = ucp.convert(source, tmp_path / "dest", virtual=True)
    assert time.process_time() - started < 1
    assert report.bytes_read + report.bytes_written < total / 100
    assert json.loads((tmp_path / "dest/ucp.json").read_text())["form"] == "virtual"


def test_every_ranks_file_has_its_own_name_in_it(source: Path, tmp_path: Path) -> None:
    """Else reading them says that two were swapped."""
    ucp.convert(source, tmp_path / "dest", to="deepspeed", layout="dp=4,zero=3", ds_config={})
    with ucp.open(tmp_path / "dest") as opened:
        assert str(opened.layout) == "dp=4,zero=3"
