"""Digests of checkpoints: the same in every format and layout, recorded by conversions, compared without reading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import ucp
from tests.formats import raw
from tests.inspection.conftest import OLDER
from tests.logical.test_digest import by_definition
from tests.slow_cases import slow_but
from ucp.cli.main import main
from ucp.errors import BadArgument, DamagedCheckpoint
from ucp.formats.universal import manifest
from ucp.inspection.difference import diff
from ucp.inspection.digests import digests_of
from ucp.inspection.verify import verify
from ucp.logical.digest import Digest
from ucp.storage.files import Files

NATIVE = sorted(p.name for p in OLDER.iterdir() if p.is_dir() and p.name.endswith(("fp32", "bf16")))


def converted(tmp_path: Path, source: Path, **options: Any) -> Path:
    out = tmp_path / f"converted{len(list(tmp_path.iterdir()))}"
    ucp.convert(source, out, **options)
    return out


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest, its own digest made anew."""
    path = folder / manifest.NAME
    body = json.loads(path.read_bytes())
    del body["digest"]
    change(body)
    path.write_bytes(manifest.frame(body))


def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("bytes of tensors were read")

    monkeypatch.setattr(Files, "read_into", refuse)
    monkeypatch.setattr(Files, "read_parts", refuse)


@pytest.mark.parametrize("name", slow_but(NATIVE[::4], NATIVE))
def test_conversions_record_what_the_elements_say(tmp_path: Path, name: str) -> None:
    whole = converted(tmp_path, OLDER / name)
    with ucp.open(OLDER / name) as native, ucp.open(whole) as ours:
        assert all(tensor.digest is None for tensor in native.catalog.tensors.values())
        for (parameter, state), tensor in ours.catalog.tensors.items():
            value = native.read(parameter, state)
            assert tensor.digest is not None
            assert tensor.digest.whole == by_definition(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        computed = digests_of(native)
        assert computed.all == digests_of(ours).all == digests_of(ours, compute=True).all
        assert not any(t.recorded for t in computed.tensors)
        assert all(t.recorded for t in digests_of(ours).tensors)


def test_layouts_and_formats_have_the_same_digest(tmp_path: Path) -> None:
    first = OLDER / "0.14.4-z2-fp32"
    found = set()
    for options in (
        {},
        {"to": "deepspeed", "layout": "dp=3,zero=3"},
        {"to": "deepspeed", "layout": "dp=2,zero=1"},
        {"to": "dcp"},
    ):
        with ucp.open(converted(tmp_path, first, **options)) as opened:
            found.add(digests_of(opened).all)
    with ucp.open(first) as opened:
        found.add(digests_of(opened).all)
    assert len(found) == 1


@pytest.mark.parametrize(
    "options",
    [{}, {"to": "deepspeed", "layout": "dp=2,zero=0"}, {"to": "deepspeed", "layout": "dp=3,zero=3"}, {"to": "dcp"}],
)
def test_a_conversion_refuses_elements_that_are_not_the_recorded_ones(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = converted(tmp_path, OLDER / "0.14.4-z2-fp32")
    converted(tmp_path, whole, **options)

    def change(body: dict[str, Any]) -> None:
        digests = body["logical_digests"]["whole"]
        digests[1] = str(Digest.parse(digests[1]) + Digest(1, 0))

    edited(whole, change)
    out = tmp_path / "refused"
    with pytest.raises(DamagedCheckpoint, match="1 tensors that were written have other elements than the source"):
        ucp.convert(whole, out, **options)
    assert not out.exists()


def test_several_workers_and_small_windows_record_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = raw.make(tmp_path / "raw", dp=3, stage=3)
    wanted = None
    for workers, memory in ((1, None), (3, None), (1, 14 << 20)):
        out = tmp_path / f"{workers}-{memory}"
        ucp.convert(
            raw.virtual_checkpoint(tmp_path / f"v{workers}{memory}", made), out, workers=workers, max_memory=memory
        )
        with ucp.open(out) as opened:
            found = digests_of(opened)
            assert all(t.recorded for t in found.tensors)
            wanted = wanted or found.all
            assert found.all == wanted == digests_of(opened, compute=True).all


def test_an_interrupted_conversion_records_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = OLDER / "0.14.4-z2-fp32"
    out = tmp_path / "out"

    def stop(self: Any, digests: Any, writer: str, logical: Any = None) -> bytes:
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("ucp.formats.universal.consolidated.ConsolidatedPlan.manifest", stop)
        with pytest.raises(OSError, match="stopped"):
            ucp.convert(source, out)
    ucp.convert(source, out)
    with ucp.open(out) as opened:
        assert all(t.recorded for t in digests_of(opened).tensors)
        assert digests_of(opened).all == digests_of(opened, compute=True).all


def test_virtual_checkpoints_of_formats_without_any_record_them(tmp_path: Path) -> None:
    """So that a load through them is proved, and later damage of the tensors is found, too."""
    state = {"model": {"w": torch.randn(70, 9), "half": torch.randn(5).bfloat16()}}
    dcp.save(state, checkpoint_id=tmp_path / "dcp")
    ucp.convert(tmp_path / "dcp", tmp_path / "plain", virtual=True)
    ucp.convert(tmp_path / "dcp", tmp_path / "digested", virtual=True, digests=True)
    for name, recorded in (("plain", False), ("digested", True)):
        with ucp.open(tmp_path / name) as opened:
            found = digests_of(opened)
            assert {tensor.recorded for tensor in found.tensors} == {recorded}
            assert found.all == digests_of(opened, compute=True).all == ucp.digest(state).all
            samples = [t.digest.sampled for t in opened.catalog.tensors.values() if t.digest is not None]
            assert samples == [t.digest.whole for t in opened.catalog.tensors.values() if t.digest is not None]
        loaded = {"model": {key: torch.zeros_like(value) for key, value in state["model"].items()}}
        report = ucp.load(loaded, tmp_path / name)
        assert (report.proof is not None) == recorded
    assert report.proof is not None
    assert (report.proof.tensors, report.proof.complete) == (2, True)


def test_virtual_checkpoints_carry_them_over(tmp_path: Path) -> None:
    whole = converted(tmp_path, OLDER / "0.14.4-z2-fp32")
    for source, recorded in ((whole, True), (OLDER / "0.14.4-z2-fp32", False)):
        with ucp.open(converted(tmp_path, source, virtual=True)) as opened:
            assert {t.recorded for t in digests_of(opened).tensors} == {recorded}


# --- the commands ----------------------------------------------------------------------------------------------------


def lines(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def test_digest_prints_one_line_a_tensor_and_one_for_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    native = OLDER / "0.14.4-z3-bf16" if (OLDER / "0.14.4-z3-bf16").exists() else OLDER / NATIVE[0]
    whole = converted(tmp_path, native)
    assert main(["digest", str(native)]) == 0
    computed = lines(capsys)
    with monkeypatch.context() as patch:
        no_reads(patch)
        assert main(["digest", str(whole)]) == 0
    recorded = lines(capsys)
    with ucp.open(native) as opened:
        assert len(computed) == len(opened.catalog.tensors) + 1
    assert {row[4] for row in computed[:-1]} == {"computed"}
    assert {row[4] for row in recorded[:-1]} == {"recorded"}
    assert sorted(row[:4] for row in computed[:-1]) == sorted(row[:4] for row in recorded[:-1])
    assert computed[-1] == recorded[-1]
    assert computed[-1][0] == "all"


def test_a_quick_diff_reads_nothing_where_both_have_digests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = OLDER / "0.14.4-z2-fp32"
    first, second = converted(tmp_path, source), converted(tmp_path, source)
    with ucp.open(first) as a, ucp.open(second) as b, ucp.open(source) as c:
        with monkeypatch.context() as patch:
            no_reads(patch)
            found = diff(a, b, quick=True, training_state=False)
        assert found.same
        assert found.read == 0
        assert found.equal == found.compared == len(found.by_digest) == len(a.catalog.tensors)
        other = diff(a, c, quick=True)
        assert other.same
        assert other.read == other.bytes
    assert main(["diff", "--quick", str(first), str(second)]) == 0
    assert "reading nothing" in capsys.readouterr().out
    made = raw.make(tmp_path / "raw", seed=1)
    changed = raw.make(tmp_path / "changed", seed=2)
    paths = [raw.write_consolidated(tmp_path / f"r{k}", one.catalog) for k, one in enumerate((made, changed))]
    assert main(["diff", "--quick", *map(str, paths)]) == 1
    assert any(row[0] == "digest" for row in lines(capsys))
    with ucp.open(paths[0]) as a, ucp.open(paths[1]) as b:
        slow = diff(a, b)
        quick = diff(a, b, quick=True)
    assert {f"{t.name}:{t.state}" for t in slow.tensors} == {k for k, (x, y) in quick.by_digest.items() if x != y}
    assert (slow.equal, slow.compared) == (quick.equal, quick.compared)
    for flags in (["--no-values"], ["--atol", "1"]):
        assert main(["diff", "--quick", *flags, str(first), str(second)]) == 2


def test_verify_against_a_digest(tmp_path: Path) -> None:
    source = OLDER / "0.14.4-z2-fp32"
    whole = converted(tmp_path, source)
    with ucp.open(source) as opened:
        digest = digests_of(opened).all
    for path in (source, whole):
        assert verify(path, against=digest).whole
        assert verify(path, against=digest.upper()).checked["logical"] > 0
        wrong = verify(path, against="0" * 32)
        assert [f.text for f in wrong.findings if f.fault] == [f"all tensors have the digest {digest}, not {'0' * 32}"]
    assert verify(whole, against=digest, quick=True).whole
    with pytest.raises(BadArgument, match="have no recorded digest"):
        verify(source, against=digest, quick=True)
    for text in ("", "12", "x" * 32):
        with pytest.raises(BadArgument, match="is no digest"):
            verify(whole, against=text)


def test_what_contradicts_its_own_record_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where a save wrote other elements than it digested: every byte fits its chunk's digest."""
    whole = converted(tmp_path, OLDER / "0.14.4-z2-fp32")

    def change(body: dict[str, Any]) -> None:
        digests = body["logical_digests"]["whole"]
        digests[0], digests[1] = digests[1], digests[0]

    with ucp.open(whole) as opened:
        digest = digests_of(opened).all
        named = [f"{name}:{state}" for name, state in list(opened.catalog.tensors)[:2]]
    edited(whole, change)
    assert main(["verify", str(whole)]) == 0
    capsys.readouterr()
    assert main(["digest", str(whole), "--compute"]) == 1
    assert [row[0].split()[0] for row in lines(capsys) if "another digest" in row[0]] == named
    found = verify(whole, against=digest)
    assert [f.subject for f in found.findings if f.fault] == named


def test_manifests_of_before_are_read(tmp_path: Path) -> None:
    whole = converted(tmp_path, OLDER / "0.14.4-z2-fp32")
    with ucp.open(whole) as opened:
        wanted = digests_of(opened)
    older = tmp_path / "older"
    shutil.copytree(whole, older)

    def change(body: dict[str, Any]) -> None:
        del body["logical_digests"]
        body["ucp"] = "1.0"

    edited(older, change)
    with ucp.open(older) as opened:
        found = digests_of(opened)
    assert found.all == wanted.all
    assert not any(t.recorded for t in found.tensors)
    assert list(found.differences(wanted)) == []
