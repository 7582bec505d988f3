"""A load's two phases: check everything, then read straight to where it lives; and what if the second one fails."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.saving.parts import FakeTarget, Saved, catalog
from ucp import limits
from ucp.catalog import SourceFile
from ucp.errors import BadArgument, DamagedCheckpoint, DigestMismatch, PartlyLoaded
from ucp.geometry import whole
from ucp.job.stopwatch import Stopwatch
from ucp.loading import bring, proof, strategy
from ucp.loading import load as loading
from ucp.loading.nouns import LoadPlan
from ucp.loading.read import RankReads
from ucp.loading.strategy import HOLD, STRATEGIES, VERIFY_READ_PROVE, VERIFY_THEN_READ, VERIFY_WHILE_BRINGING
from ucp.loading.target import Member, Slot
from ucp.logical.digest import Digest
from ucp.logical.record import Recorded
from ucp.logical.runs import Sample
from ucp.storage.files import Files
from ucp.torchdist.target import StateDictTarget
from ucp.transfer.gather import Want
from ucp.transfer.reader import Reader

State = dict[str, torch.Tensor]


def values() -> State:
    generator = torch.Generator().manual_seed(0)
    shapes = {"wide": (300, 1700), "odd": (7, 5, 3), "one": (), "flat": (123_457,)}
    out = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    out |= {f"small{k}": torch.randn(5 + k, generator=generator) for k in range(30)}
    out["half"] = torch.randn((333, 99), generator=generator).to(torch.bfloat16)
    return out


def blank(truth: State) -> State:
    return {name: torch.full_like(value, 7.0) for name, value in truth.items()}


def same(found: State, truth: State) -> bool:
    return all(torch.equal(found[name], value) for name, value in truth.items())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def data_file(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ucp.save(values(), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have loads take this way. 'windows': verify, then read, with everything passing through small windows, as on its
    way to a device; what is proved instead goes so, too."""

    def taken(way: str) -> None:
        monkeypatch.setattr(strategy, "choose", lambda every: VERIFY_THEN_READ if way == "windows" else way)
        if way in ("windows", VERIFY_READ_PROVE):
            monkeypatch.setattr(bring, "is_on_host", lambda flat: False)
            monkeypatch.setattr(limits, "LOAD_WINDOW_BYTES", 40_000)

    return taken


def failing_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Have the so many'th read of the second phase fail; reads are counted in the result."""
    seen: list[int] = []
    begun: list[bool] = []
    read, begin = Files.read_parts, StateDictTarget.begin

    def read_parts(self: Files, path: Any, offset: int, parts: Any) -> None:
        if begun:
            seen.append(offset)
            if len(seen) - 1 == number:
                raise DamagedCheckpoint(f"{path}: cannot be read: the disk is gone")
        read(self, path, offset, parts)

    def begins(self: StateDictTarget) -> None:
        begun.append(True)
        begin(self)

    monkeypatch.setattr(Files, "read_parts", read_parts)
    monkeypatch.setattr(StateDictTarget, "begin", begins)
    return seen


WAYS = (*STRATEGIES, "windows")


@pytest.mark.parametrize("way", WAYS)
def test_every_way_brings_the_same(saved: Path, take: Callable[[str], None], way: str) -> None:
    take(way)
    truth = values()
    state = blank(truth)
    # Elements that lie apart in memory, and a wider type than the checkpoint's.
    state["wide"] = torch.full((1700, 300), 7.0).t()
    state["half"] = torch.full((333, 99), 7.0)
    report = ucp.load(state, saved, prove="full")
    assert report.strategy == (VERIFY_THEN_READ if way == "windows" else way)
    assert f"; {report.strategy}" in str(report)
    assert same(state, {**truth, "half": truth["half"].float()})
    assert report.proof is not None
    assert report.proof.complete
    assert ("check" in report.seconds) == (way != HOLD)
    assert report.unverified_bytes == 0


@pytest.mark.parametrize("way", [VERIFY_THEN_READ, VERIFY_READ_PROVE, "windows"])
def test_a_failure_at_every_read_of_the_second_phase(
    saved: Path, take: Callable[[str], None], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(way)
    monkeypatch.setattr(loading, "reading_threads", lambda: 1)  # so that there are as many reads every time
    truth, before = values(), files(saved)
    with monkeypatch.context() as patch:
        reads = failing_at(patch, -1)
        ucp.load(blank(truth), saved, prove=way == VERIFY_READ_PROVE)
    assert len(reads) > 1
    for number in range(len(reads)):
        state = blank(truth)
        with monkeypatch.context() as patch:
            failing_at(patch, number)
            with pytest.raises(PartlyLoaded) as caught:
                ucp.load(state, saved)
        text = str(caught.value)
        assert text.startswith(f"{saved}: the load failed when it had begun to change the state dict: ")
        assert "the disk is gone" in text
        assert text.endswith("load again, or fill its tensors anew")
    assert files(saved) == before
    ucp.load(state, saved)
    assert same(state, truth)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def change(path: Path) -> None:
    """Other bytes, and the same size and time."""
    stat = path.stat()
    with open(path, "r+b") as stream:
        stream.seek(stat.st_size - 70_000)
        stream.write(b"\x55" * 1000)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("way", [VERIFY_THEN_READ, VERIFY_READ_PROVE, "windows"])
@pytest.mark.parametrize("spoil", [cut, touch, change, remove])
def test_a_file_that_changes_between_the_phases(
    saved: Path,
    take: Callable[[str], None],
    way: str,
    spoil: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take(way)
    begin = StateDictTarget.begin

    def begins(self: StateDictTarget) -> None:
        begin(self)
        spoil(data_file(saved))

    monkeypatch.setattr(StateDictTarget, "begin", begins)
    with pytest.raises(PartlyLoaded, match=r"truncated|was changed while it was loaded|is damaged|cannot be read"):
        ucp.load(blank(values()), saved)


@pytest.mark.parametrize("seen", ["all", "a sample", "nothing"])
def test_what_no_proof_sees_is_compared_after_all(
    saved: Path, take: Callable[[str], None], seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are not compared a second time only because the proof sees them."""
    take(VERIFY_READ_PROVE)
    begin, compare = StateDictTarget.begin, loading.checking.compare
    compared: list[Any] = []

    def begins(self: StateDictTarget) -> None:
        begin(self)
        change(data_file(saved))

    def compares(*args: Any) -> None:
        compared.append(args)
        compare(*args)

    if seen == "nothing":
        monkeypatch.setattr(proof, "prove", lambda *args, **named: None)
    elif seen == "a sample":
        monkeypatch.setattr(proof, "SAMPLED_FROM", 0)
    monkeypatch.setattr(loading.checking, "compare", compares)
    report = ucp.load(blank(values()), saved)
    assert report.proof is None or report.proof.complete
    assert len(compared) == (1 if seen == "all" else 2)
    monkeypatch.setattr(StateDictTarget, "begin", begins)
    with pytest.raises(PartlyLoaded, match="is damaged"):
        ucp.load(blank(values()), saved)


@dataclass(frozen=True)
class Somewhere(FakeTarget):
    """A target whose memory is on this device."""

    device: str = "meta"

    def memory(self, key: int, state: str) -> torch.Tensor | None:
        return torch.empty(100, device=self.device)


def test_what_a_proof_sees() -> None:
    tensor = catalog({"w": Saved((100,), states=())}).tensors["w", "param"]
    digested = dataclasses.replace(tensor, digest=Recorded(Digest(), Digest(), Sample(0, 1)))
    entry = 0, "param", "float32"
    wants = {entry: [Want(digested, whole((100,)), "float32")]}
    assert proof.sees_all(Somewhere([], []), wants)
    assert not proof.sees_all(Somewhere([], []), {})
    assert not proof.sees_all(Somewhere([], []), {entry: [Want(tensor, whole((100,)), "float32")]})
    assert not proof.sees_all(Somewhere([], [], device="cpu"), wants)
    assert not proof.sees_all(FakeTarget([], []), wants)


@pytest.mark.parametrize("spoil", [cut, touch, remove])
def test_a_file_that_changes_while_it_is_checked(
    saved: Path, take: Callable[[str], None], spoil: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    take(VERIFY_THEN_READ)
    compare = loading.checking.compare

    def compares(*args: Any) -> None:
        compare(*args)
        spoil(data_file(saved))

    monkeypatch.setattr(loading.checking, "compare", compares)
    truth = values()
    state = blank(truth)
    with pytest.raises(DamagedCheckpoint, match=r"was changed while it was loaded|was there when this load began"):
        ucp.load(state, saved)
    assert same(state, blank(truth))


@pytest.mark.parametrize("way", WAYS)
def test_damage_anywhere_is_found_before_anything_changes(saved: Path, take: Callable[[str], None], way: str) -> None:
    take(way)
    truth, path = values(), data_file(saved)
    good = path.read_bytes()
    for at in range(len(good) - 1, 4096, -(len(good) // 3)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        state = blank(truth)
        # Only what verifies on the way finds it too late, and says so.
        kind = PartlyLoaded if way == VERIFY_WHILE_BRINGING else DigestMismatch
        with pytest.raises(kind, match="is damaged: its digest should be"):
            ucp.load(state, saved)
        assert way == VERIFY_WHILE_BRINGING or same(state, blank(truth))


def test_what_is_not_asked_for_is_not_checked(saved: Path, take: Callable[[str], None]) -> None:
    """Each chunk that is used is read twice, and no other."""
    take(VERIFY_THEN_READ)
    change(data_file(saved))
    state = {"small0": torch.zeros(5)}
    try:
        report = ucp.load(state, saved)
    except DigestMismatch:
        pytest.skip("the tensor lies in the damaged chunk")
    assert report.bytes_read <= 2 << 20


def training(folder: Path | None = None) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer, which has states only if it has trained. folder: train, and save there."""
    torch.manual_seed(0 if folder is not None else 1)
    model = torch.nn.Linear(1500, 1500, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    if folder is not None:
        model(torch.ones(1, 1500)).sum().backward()
        optimizer.step()
        ucp.save_training(folder, model=model, optimizer=optimizer)
    return model, optimizer


def test_new_states_are_read_once(tmp_path: Path, take: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """States that the optimizer does not have yet are brought while they are verified; weights are read twice."""
    model, optimizer = training(tmp_path / "saved")
    other, fresh = training()
    take(VERIFY_THEN_READ)
    monkeypatch.setattr(loading, "reading_threads", lambda: 2)  # each may read a chunk that another reads, too
    counts: list[int] = []
    read = Files.read_parts

    def read_parts(self: Files, path: Any, offset: int, parts: Any) -> None:
        counts.append(sum(map(len, parts)))
        read(self, path, offset, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Files, "read_parts", read_parts)
        told = ucp.load_training(tmp_path / "saved", model=other, optimizer=fresh, rng=False, prove=False)
    weights = 4 * 1500**2
    assert told.tensors.strategy == VERIFY_THEN_READ
    assert 4 * weights <= sum(counts) < 4 * weights + (6 << 20)  # with chunks that are wanted in part
    assert told.tensors.unverified_bytes == 0
    assert torch.equal(other.weight, model.weight)
    for name, value in optimizer.state[model.weight].items():
        assert torch.equal(fresh.state[other.weight][name], value)


def test_a_fault_in_new_states_changes_nothing(tmp_path: Path, take: Callable[[str], None]) -> None:
    training(tmp_path / "saved")
    with ucp.open(tmp_path / "saved") as checkpoint:
        tensor = checkpoint.catalog.tensors["weight", "exp_avg_sq"]
        path = Path(checkpoint.catalog.files[int(tensor.blocks.buffers[0])].path)
        at = int(tensor.bases[0]) + 4 * 1500 * 700
    with open(path, "r+b") as stream:
        stream.seek(at)
        stream.write(b"damage")
    other, fresh = training()
    before = other.weight.detach().clone()
    take(VERIFY_THEN_READ)
    with pytest.raises(DigestMismatch):
        ucp.load_training(tmp_path / "saved", model=other, optimizer=fresh, rng=False)
    assert torch.equal(other.weight, before)
    assert not fresh.state


def test_memory_has_a_least_value(saved: Path) -> None:
    with pytest.raises(BadArgument, match="a load's memory of 1000 bytes is too little; at least 67108864 are needed"):
        ucp.load(blank(values()), saved, memory=1000)
    with pytest.raises(BadArgument, match="a load's memory is a number of bytes; found '1GiB'"):
        ucp.load(blank(values()), saved, memory="1GiB")  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", STRATEGIES)
@pytest.mark.parametrize("window", [40_000, limits.LOAD_WINDOW_BYTES])
def test_every_way_brings_the_same_to_a_device(
    saved: Path, take: Callable[[str], None], way: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(way)
    monkeypatch.setattr(limits, "LOAD_WINDOW_BYTES", window)
    truth = values()
    state = {name: value.cuda() for name, value in blank(truth).items()}
    state["wide"] = torch.full((1700, 300), 7.0, device="cuda").t()
    state["half"] = torch.full((333, 99), 7.0, device="cuda")
    state["one"] = torch.full((), 7.0)
    report = ucp.load(state, saved, prove="full")
    assert report.strategy == way
    assert same({n: v.cpu() for n, v in state.items()}, {**truth, "half": truth["half"].float()})
    assert report.proof is not None
    assert report.proof.complete


@dataclass(frozen=True)
class OneBuffer(FakeTarget):
    """A target with one flat buffer."""

    live: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def home(self, key: int, state: str, dtype: str, length: int) -> torch.Tensor | None:
        return self.live


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("partial", [False, True])
def test_what_nothing_is_read_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: bool, partial: bool
) -> None:
    """Padding becomes zero, and what a load leaves stays, in place and through windows."""
    monkeypatch.setattr(bring, "is_on_host", lambda flat: not windows)
    monkeypatch.setattr(limits, "LOAD_WINDOW_BYTES", 40_000)
    whole_of_it = torch.arange(1.0, 100_001.0)
    (tmp_path / "file").write_bytes(whole_of_it.numpy().tobytes())
    held = dataclasses.replace(
        catalog({"w": Saved((100_000,), states=())}), files=(SourceFile(str(tmp_path / "file"), 400_000, 0),)
    )
    live = torch.full((100_010,), 7.0)
    members = [Member("w", (100_000,), whole((100_000,), 3)), *[Member("x", (2,), whole((2,), 100_005))] * partial]
    target = OneBuffer([Slot(0, "parameter", 100_010, "float32", tuple(members))], [], live=live)
    want = Want(held.tensors["w", "param"], members[0].blocks, "float32")
    plan = LoadPlan({(0, "param", "float32"): [want]}, {}, {}, {}, (), (), (), ())
    with Files() as files:
        reads = RankReads.of(target, plan, None)
        brought = bring.bring(reads, Reader(held, files), files, 2, limits.LOAD_MEMORY_BYTES, Stopwatch())
    assert brought[0, "param"].data_ptr() == live.data_ptr()
    assert torch.equal(live[3:100_003], whole_of_it)
    left = 7.0 if partial else 0.0
    assert bool((live[:3] == left).all())
    assert bool((live[100_003:] == left).all())
