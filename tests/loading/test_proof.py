"""After a load what is live is proved to be what was saved; planted faults are found, on one rank and on several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.engines.pool import RankPool
from tests.inspection.test_digests import edited
from tests.loading import proof_jobs as jobs
from ucp.errors import BadArgument, ProofFailed
from ucp.inspection.digests import digests_of
from ucp.job.float_types import converted
from ucp.loading import proof
from ucp.loading.bring import Brought
from ucp.logical.digest import Digest
from ucp.torchdist.target import StateDictTarget

LAYOUTS = [("plain", 1), ("rows", 2), ("rows", 3), ("columns", 4), ("replicas", 2), ("hybrid", 4), ("both", 4)]
FAULTS = {
    jobs.one_off: "w",
    jobs.elements_swapped: "w",
    jobs.rows_swapped: "w",
    jobs.zero_negated: "w",
    jobs.payload_changed: "w",
    jobs.tensors_swapped: "bias",
    jobs.bytes_zeroed: "odd",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("proof") / "saved"
    jobs.save("plain", str(path))
    return path


def test_a_load_says_what_it_has_proved(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {"model": {name: torch.zeros_like(value) for name, value in jobs.values().items()}}
    with caplog.at_level("INFO", logger="ucp"):
        report = ucp.load(state, saved)
    assert report.proof is not None
    assert report.proof.complete
    assert (report.proof.tensors, report.proof.sample) == (5, None)
    assert report.proof.nbytes == sum(value.nbytes for value in jobs.values().values())
    assert any("proved: 5 tensors" in record.getMessage() for record in caplog.records)
    assert "prove" in report.seconds
    assert ucp.load(state, saved, prove=False).proof is None


def test_what_is_rounded_and_no_longer_held_is_warned_of(
    saved: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = StateDictTarget.memory
    monkeypatch.setattr(StateDictTarget, "memory", lambda *args: memory(*args).to(torch.bfloat16))
    monkeypatch.setattr(Brought, "as_read", {})
    report = ucp.load({"model": {"w": torch.zeros_like(jobs.values()["w"])}}, saved)
    assert report.proof is not None
    assert report.proof.rounded == ("w:param",)
    assert "the proof has not seen 1 tensor ('w:param'): they are kept in fewer bits" in report.warnings[-1]
    assert any(r.levelname == "WARNING" and report.warnings[-1] in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_of_what_is_live_are_found(saved: Path, fault: Any) -> None:
    kind, text = jobs.load("plain", str(saved), fault)
    assert kind == "ProofFailed"
    assert f"1 of 5 tensors differ: '{FAULTS[fault]}' (param): its values are not those that were saved" in text


NANS = {
    torch.float16: (torch.int16, [0x7C01, 0x7E01, -0x3FF, 0x7DFF, 0x7FFF, 0x3C00]),
    torch.bfloat16: (torch.int16, [0x7F81, 0x7FC1, -0x7F, 0x7FFF, 0x3F80]),
    torch.float32: (torch.int32, [0x7F800001, 0x7FC00001, -0x7FFFFF, 0x7FFFFFFF, 0x3F800000]),
}


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [(n, w) for n in NANS for w in NANS if w.itemsize > n.itemsize] + [(n, torch.float64) for n in NANS],
)
def test_what_is_no_number_is_proved_in_a_wider_type(tmp_path: Path, narrow: torch.dtype, wide: torch.dtype) -> None:
    """Quiet or signalling, its sign and payload are there after the load, and turn back into what was saved."""
    kind, bits = NANS[narrow]
    saved = torch.tensor(bits * 9, dtype=kind).view(narrow)
    ucp.save({"w": saved}, tmp_path / "saved")
    state = {"w": torch.zeros(len(saved), dtype=wide)}
    report = ucp.load(state, tmp_path / "saved")
    assert report.proof is not None
    assert report.proof.complete
    assert torch.equal(state["w"].isnan(), saved.isnan())
    assert torch.equal(state["w"].signbit(), saved.signbit())
    assert torch.equal(converted(state["w"], narrow).view(kind), saved.view(kind))
    state["w"][0] = torch.nan
    assert not torch.equal(converted(state["w"], narrow).view(kind), saved.view(kind))


def test_another_kind_of_proof_is_refused(saved: Path) -> None:
    for choice in ("yes", None, 1):
        with pytest.raises(BadArgument, match="prove is True, False"):
            ucp.load({"model": jobs.values()}, saved, prove=choice)  # type: ignore[arg-type]


def test_wider_elements_are_proved_by_turning_them_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {"a": torch.randn(1000).to(torch.bfloat16)}
    narrow["a"].view(torch.int16)[3] = 0x7F81  # no number, with a payload
    ucp.save({"model": narrow}, tmp_path / "narrow")
    state = {"model": {"a": torch.zeros(1000)}}
    report = ucp.load(state, tmp_path / "narrow")
    assert report.proof is not None
    assert report.proof.tensors == 1

    def spoiled(self: Any, loaded: Any, apply: Any = jobs.StateDictTarget.apply) -> None:
        apply(self, loaded)
        state["model"]["a"].view(torch.int32)[10] += 1  # too little to be seen in half the bits

    monkeypatch.setattr(jobs.StateDictTarget, "apply", spoiled)
    with pytest.raises(
        ProofFailed, match=r"'a' \(param\): it has values that bfloat16, as it was saved, does not hold"
    ):
        ucp.load(state, tmp_path / "narrow")


def test_without_digests_nothing_is_proved_unless_always(tmp_path: Path, saved: Path) -> None:
    older = tmp_path / "older"
    older.mkdir()
    for file in saved.iterdir():
        (older / file.name).write_bytes(file.read_bytes())
    edited(older, lambda body: body.pop("logical_digests"))
    state = {"model": {name: torch.zeros_like(value) for name, value in jobs.values().items()}}
    assert ucp.load(state, older).proof is None
    assert ucp.load(state, older, prove=proof.FULL).proof is None
    report = ucp.load(state, older, prove=proof.ALWAYS)
    assert report.proof is not None
    assert (report.proof.tensors, report.proof.complete) == (5, True)

    def some(body: dict[str, Any]) -> None:
        body["logical_digests"]["whole"][0] = None

    saved_copy = tmp_path / "some"
    saved_copy.mkdir()
    for file in saved.iterdir():
        (saved_copy / file.name).write_bytes(file.read_bytes())
    edited(saved_copy, some)
    partly = ucp.load(state, saved_copy).proof
    assert partly is not None
    assert (partly.tensors, len(partly.unproved)) == (4, 1)
    assert "not proved: 1 (" in str(partly)
    assert "the checkpoint has no digest of it" in str(partly)


def test_a_save_that_wrote_other_values_than_it_held_is_found(tmp_path: Path, saved: Path) -> None:
    """Chunks fit their digests, since they were made of what was written."""
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in saved.iterdir():
        (wrong / file.name).write_bytes(file.read_bytes())

    def change(body: dict[str, Any]) -> None:
        whole = body["logical_digests"]["whole"]
        whole[0] = str(Digest.parse(whole[0]) + Digest(0, 1))

    edited(wrong, change)
    body = json.loads((wrong / "ucp.json").read_bytes())
    name = body["parameters"]["name"][body["tensors"]["parameter"][0]]
    with pytest.raises(ProofFailed, match=f"1 of 5 tensors differ: '{name}'"):
        ucp.load({"model": jobs.values(1)}, wrong)


def test_much_in_host_memory_is_sampled_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "SAMPLED_FROM", 1 << 20)
    large = {"w": torch.randn(64, 1 << 16), "small": torch.randn(10)}
    ucp.save({"model": large}, tmp_path / "large")
    state = {"model": {name: torch.zeros_like(value) for name, value in large.items()}}
    report = ucp.load(state, tmp_path / "large")
    assert report.proof is not None
    assert report.proof.sample is not None
    assert report.proof.tensors == 2
    assert "(a sample: one of 64 blocks of 65.5 kB of each tensor), " in str(report.proof)
    blocks = len(report.proof.sample.picks(large["w"].nbytes))
    assert report.proof.seen == (blocks << 16) + large["small"].nbytes
    assert f"{100 * report.proof.seen / (large['w'].nbytes + 40):.1f} % of the bytes" in str(report.proof)
    full = ucp.load(state, tmp_path / "large", prove=proof.FULL)
    assert full.proof is not None
    assert full.proof.sample is None
    with ucp.open(tmp_path / "large") as checkpoint:
        sample = checkpoint.catalog.tensors["w", "param"].digest.sample  # type: ignore[union-attr]
    assert report.proof.sample == sample
    picks = sample.picks(large["w"].nbytes).tolist()

    def spoiled(block: int) -> Any:
        def apply(self: Any, loaded: Any, apply: Any = jobs.StateDictTarget.apply) -> None:
            apply(self, loaded)
            state["model"]["w"].view(-1)[block * (1 << 14) + 5] += 1

        return apply

    for block, found in ((picks[-1], True), (next(k for k in range(256) if k not in picks), False)):
        with monkeypatch.context() as patch:
            patch.setattr(jobs.StateDictTarget, "apply", spoiled(block))
            if found:
                with pytest.raises(ProofFailed, match="'w'"):
                    ucp.load(state, tmp_path / "large")
            else:
                ucp.load(state, tmp_path / "large")
                with pytest.raises(ProofFailed, match="'w'"):
                    ucp.load(state, tmp_path / "large", prove=proof.FULL)


# --- several ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_digest_is_the_same_in_every_layout_live_and_saved(ranks: RankPool, tmp_path: Path) -> None:
    wanted = jobs.digest("plain")
    for layout, world in LAYOUTS:
        path = tmp_path / f"{layout}{world}"
        found = ranks.run(jobs.save, layout, str(path), world_size=world)
        assert set(found) == {wanted[0]}, layout
        with ucp.open(path) as checkpoint:
            assert {t.recorded for t in digests_of(checkpoint).tensors} == {True}
            assert digests_of(checkpoint).all == digests_of(checkpoint, compute=True).all == wanted[0], layout


@pytest.mark.slow
def test_every_layout_proves_itself_and_finds_faults(ranks: RankPool, saved: Path) -> None:
    for layout, world in LAYOUTS[1:]:
        for text, tensors in ranks.run(jobs.load, layout, str(saved), None, world_size=world):
            assert text.startswith("proved: 5 tensors, "), text
            assert tensors == 5
    for layout, world in (("rows", 2), ("columns", 4), ("hybrid", 4)):
        for kind, text in ranks.run(jobs.load, layout, str(saved), jobs.one_off, 1, world_size=world):
            assert kind == "ProofFailed"
            assert "'w' (param): " in text


@pytest.mark.slow
def test_a_replica_that_differs_is_found(ranks: RankPool, saved: Path) -> None:
    for layout, world in (("replicas", 2), ("plain", 3), ("hybrid", 4)):
        for kind, text in ranks.run(jobs.load, layout, str(saved), jobs.replica_changed, 1, world_size=world):
            assert kind == "ProofFailed"
            assert "'half' (param): ranks hold different values of it" in text, (layout, text)
    for text in ranks.run(jobs.differing_replicas, "replicas", world_size=2):
        assert text == "Mismatch: 'bias' (param) has no digest: ranks hold different values of the same elements"


@pytest.mark.slow
def test_stock_dcp_loads_are_proved_through_our_reader(ranks: RankPool, saved: Path) -> None:
    for layout, world in LAYOUTS[1:]:
        for found in ranks.run(jobs.dcp_load, layout, str(saved), None, world_size=world):
            assert (found.tensors, found.complete) == (5, True), layout
    for layout, world, fault in (("rows", 2, jobs.one_off), ("replicas", 3, jobs.replica_changed)):
        for failures in ranks.run(jobs.dcp_load, layout, str(saved), fault, world_size=world):
            assert failures == ["ProofFailed"] * world, layout


@pytest.mark.slow
def test_stock_dcp_in_a_group_of_some_ranks_proves_what_they_hold_whole(ranks: RankPool, saved: Path) -> None:
    others, *found = ranks.run(jobs.dcp_load, "", str(saved), None, [1, 2], world_size=3)
    assert others is None
    for proof_ in found:
        assert proof_.tensors == 1
        assert sorted(proof_.unproved) == ["bias:param", "half:param", "odd:param", "w:param"]
        assert set(proof_.unproved.values()) == {"other ranks hold the rest of it, and do not take part"}
