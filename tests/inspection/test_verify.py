"""Every planted fault is found and named, and nothing in a good checkpoint."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ucp
from tests.formats import raw
from ucp.catalog import Catalog, LogicalTensor, TrainingState
from ucp.checkpoint import Checkpoint
from ucp.errors import DamagedCheckpoint, NotACheckpoint
from ucp.formats.universal import manifest, virtual
from ucp.geometry import concat
from ucp.inspection.verify import Finding, Verdict, verify, verify_open
from ucp.storage.files import Files


def faults(verdict: Verdict) -> list[Finding]:
    return [finding for finding in verdict.findings if finding.fault]


def only_fault(verdict: Verdict) -> Finding:
    (found,) = faults(verdict)
    assert not verdict.whole
    assert not verdict.as_json()["whole"]
    return found


def rewritten(folder: Path, catalog: Catalog) -> Path:
    """A virtual checkpoint of a catalog that is not whole, as a faulty writer would leave it."""
    folder.mkdir()
    (folder / manifest.NAME).write_bytes(virtual.plan(catalog).manifest({}, "test", str(folder)))
    return folder


def changed(catalog: Catalog, name: str, state: str, **values: Any) -> Catalog:
    tensors = dict(catalog.tensors)
    tensors[name, state] = replace(tensors[name, state], **values)
    return replace(catalog, tensors=tensors)


def no_files_of_state(made: raw.Raw) -> Catalog:
    """The catalog without tensors in its training state, so that the virtual form has no files of its own."""
    return replace(made.catalog, training_state=replace(made.catalog.training_state, client_state={}))


def test_nothing_in_good_ones(consolidated: Path, virtual: Path) -> None:
    for folder in (consolidated, virtual):
        verdict = verify(folder)
        assert verdict.whole
        assert faults(verdict) == []
        assert verdict.checked["tensors"] == 21
    # The manifest's files are all read and compared; a virtual checkpoint's are somebody else's.
    sizes = sum(path.stat().st_size for path in consolidated.iterdir() if path.name != manifest.NAME)
    assert verify(consolidated).checked["digested"] == sizes
    assert [f.kind for f in verify(virtual).findings if not f.fault] == ["training-state", "unchecked"]


def test_nothing_in_a_good_native_one(native: Path) -> None:
    verdict = verify(native, finite=True)
    assert faults(verdict) == []
    assert verdict.format == "deepspeed"
    assert verdict.checked["digested_by_zip"] == sum(p.stat().st_size for p in native.glob("*/*.pt"))


def test_a_missing_file(consolidated: Path) -> None:
    lost = {str(path) for path in consolidated.glob("*.safetensors")}
    for path in lost:
        os.unlink(path)
    found = faults(verify(consolidated))
    assert {f.kind for f in found} == {"file"}
    assert {f.subject for f in found} == lost
    assert len(lost) > 1


def test_a_truncated_file(consolidated: Path) -> None:
    path = consolidated / "model-00001-of-00001.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    found = only_fault(verify(consolidated))
    assert (found.kind, found.subject) == ("file", str(path))
    assert found.text == f"has {size - 1} bytes where the manifest says {size}"


def test_a_missing_native_file(native: Path) -> None:
    victim = max(native.glob("global_step3/*.pt"))
    victim.unlink()
    found = only_fault(verify(native))
    assert found.kind == "unreadable"
    assert "missing" in found.text


def test_a_hole(tmp_path: Path, made: raw.Raw) -> None:
    catalog = no_files_of_state(made)
    tensor = catalog.tensors["embed.weight", "exp_avg"]
    assert len(tensor.blocks) > 1
    lost = tensor.blocks.take(np.array([1]))
    keep = np.arange(len(tensor.blocks)) != 1
    broken = changed(catalog, tensor.name, tensor.state, blocks=tensor.blocks.take(keep), bases=tensor.bases[keep])
    found = only_fault(verify(rewritten(tmp_path / "broken", broken)))
    assert (found.kind, found.subject) == ("hole", "embed.weight:exp_avg")
    box = [f"{o}:{o + n}" for o, n in zip(lost.offsets[0].tolist(), lost.sizes[0].tolist(), strict=True)]
    assert found.text == f"{int(lost.counts[0])} elements are in no fragment (shape [13, 7]); first [{', '.join(box)}]"


def test_an_overlap(tmp_path: Path, made: raw.Raw) -> None:
    catalog = no_files_of_state(made)
    tensor = catalog.tensors["layer.0.weight", "param"]
    twice = concat([tensor.blocks, tensor.blocks.take(np.array([0]))], 3)
    bases = np.concatenate([tensor.bases, tensor.bases[:1]])
    broken = changed(catalog, tensor.name, tensor.state, blocks=twice, bases=bases)
    found = only_fault(verify(rewritten(tmp_path / "broken", broken)))
    assert (found.kind, found.subject) == ("overlap", "layer.0.weight:param")
    assert found.text.startswith(f"{int(tensor.blocks.counts[0])} elements are in 2 fragments (shape [5, 3, 11])")


def test_every_fault_is_named(tmp_path: Path, made: raw.Raw) -> None:
    catalog = no_files_of_state(made)
    for state in raw.STATES:
        tensor = catalog.tensors["embed.weight", state]
        catalog = changed(catalog, tensor.name, state, blocks=tensor.blocks.take(np.array([0])), bases=tensor.bases[:1])
    found = faults(verify(rewritten(tmp_path / "broken", catalog)))
    assert [(f.kind, f.subject) for f in found] == [("hole", f"embed.weight:{state}") for state in raw.STATES]


def test_a_flipped_bit(consolidated: Path) -> None:
    from safetensors import safe_open

    path = consolidated / "model-00001-of-00001.safetensors"
    with safe_open(path, "np") as opened:  # another program says which tensor comes last in the file
        last = max(opened.keys(), key=lambda name: json.loads(_header(path))[name]["data_offsets"][1])
    raw.flip(path, path.stat().st_size - 1, 4)
    found = only_fault(verify(consolidated))
    assert (found.kind, found.subject) == ("digest", str(path))
    assert f"'{last}' (param)" in found.text or "more" in found.text
    assert verify(consolidated, quick=True).whole


def _header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def test_a_flipped_bit_in_every_native_file(native: Path) -> None:
    """The CRC-32s that torch writes show it, where DeepSpeed itself would load it."""
    for path in sorted(native.glob("global_step3/*.pt")):
        with zipfile.ZipFile(path) as archive:
            infos = [i for i in archive.infolist() if "/data/" in i.filename and i.file_size]
            largest = max(infos, key=lambda i: i.file_size)
            with archive.open(largest) as stream:
                content = stream.read()
        at = path.read_bytes().index(content)
        raw.flip(path, at, 1)
        verdict = verify(native)
        assert not verdict.whole
        (found,) = [f for f in faults(verdict) if f.kind == "digest"]
        assert found.subject == str(path)
        assert f"'{largest.filename}'" in found.text
        raw.flip(path, at, 1)
    assert verify(native).whole


def test_a_native_file_that_ends_early(native: Path) -> None:
    victim = min(native.glob("global_step3/*.pt"))
    os.truncate(victim, victim.stat().st_size // 2)
    found = only_fault(verify(native))
    assert (found.kind, found.subject) == ("file", str(victim))


def test_not_a_number(tmp_path: Path, made: raw.Raw) -> None:
    catalog = no_files_of_state(made)
    folder = rewritten(tmp_path / "planted", catalog)
    before = [f.subject for f in faults(verify(folder, finite=True))]
    tensor = catalog.tensors["layer.0.weight", "exp_avg_sq"]
    place = int(tensor.bases[0] + tensor.blocks.starts[0] * 4)
    file = catalog.files[int(tensor.blocks.buffers[0])]
    with open(file.path, "r+b") as stream:
        stream.seek(place)
        stream.write(np.float32(np.inf).tobytes() if place % 2 else np.float32(np.nan).tobytes())
    os.utime(file.path, ns=(file.mtime_ns, file.mtime_ns))  # a virtual checkpoint refuses files that were changed
    assert verify(folder).whole
    (found,) = [f for f in faults(verify(folder, finite=True)) if f.subject not in before]
    assert (found.kind, found.subject) == ("not-finite", "layer.0.weight:exp_avg_sq")
    index = tensor.blocks.offsets[0].tolist()
    assert found.text == f"1 of 165 values are infinite or not a number; the first at {index}"


def test_unequal_copies(made: raw.Raw, tmp_path: Path) -> None:
    """What two ranks keep of the same elements, equal first, then in one bit unequal."""
    (tmp_path / "again.bin").write_bytes(b"h" * 8 + made.truth["embed.weight", "param"].tobytes())
    size = (tmp_path / "again.bin").stat().st_size
    files = (*made.catalog.files, replace(made.catalog.files[0], path=str(tmp_path / "again.bin"), size=size))
    from ucp.geometry import whole

    copy = LogicalTensor(
        "embed.weight", "param", (13, 7), "float32", whole((13, 7), 0, len(files) - 1), np.array([8], np.int64)
    )
    catalog = replace(made.catalog, files=files, copies=(copy,))
    verdict = verify_open(Checkpoint(tmp_path, catalog, Files()))
    assert verdict.whole
    assert verdict.checked["compared"] == 13 * 7 * 4
    raw.flip(tmp_path / "again.bin", 8 + 4 * 50, 1)
    found = only_fault(verify_open(Checkpoint(tmp_path, catalog, Files())))
    assert (found.kind, found.subject) == ("copy", "embed.weight:param")
    assert str(tmp_path / "again.bin") in found.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"global_steps": None}, "the step count is missing"),
        ({"param_groups": ()}, "there are optimizer states, but no param groups"),
        ({"config": {"fp16": {"enabled": True}}}, "training ran in fp16, but the loss scaler's state is missing"),
    ],
)
def test_an_incomplete_training_state(made: raw.Raw, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    state: TrainingState = replace(made.catalog.training_state, **change)
    found = only_fault(verify_open(Checkpoint(tmp_path, replace(made.catalog, training_state=state), Files())))
    assert found.kind == "training-state"
    assert words in found.text


def test_parameters_and_groups_that_do_not_fit(made: raw.Raw, tmp_path: Path) -> None:
    (group,) = made.catalog.training_state.param_groups
    groups = (replace(group, names=(*group.names[1:], "ghost", group.names[1])),)
    state = replace(made.catalog.training_state, param_groups=groups)
    texts = [
        f.text for f in faults(verify_open(Checkpoint(tmp_path, replace(made.catalog, training_state=state), Files())))
    ]
    assert "'embed.weight' is trained, but in no param group" in texts
    assert "'ghost' is in a param group, but there is no such parameter" in texts
    assert f"'{group.names[1]}' is in 2 param groups" in texts


def test_a_parameter_without_its_optimizer_state(made: raw.Raw, tmp_path: Path) -> None:
    tensors = {key: t for key, t in made.catalog.tensors.items() if key != ("scale", "exp_avg")}
    infos = dict(made.catalog.parameters)
    infos["scale"] = replace(infos["scale"], states={"param": "float32", "exp_avg_sq": "float32"})
    found = only_fault(
        verify_open(Checkpoint(tmp_path, replace(made.catalog, tensors=tensors, parameters=infos), Files()))
    )
    assert found.text == "'scale' lacks exp_avg, which others of param group 0 have"


def test_latest_that_is_damaged_is_not_passed_over(tmp_path: Path, made: raw.Raw) -> None:
    """Neither by opening nor by a check, unless the newest whole one is asked for."""
    for tag in ("step1", "step2"):
        raw.write_consolidated(tmp_path / "run" / tag, made.catalog)
    (tmp_path / "run/latest").write_text("step2")
    (tmp_path / "run/step2/model-00001-of-00001.safetensors").unlink()
    os.utime(tmp_path / "run/step1/ucp.json", (1000, 1000))
    with pytest.raises(DamagedCheckpoint, match=r"step2/model.*--newest"):
        ucp.open(tmp_path / "run")
    assert not verify(tmp_path / "run").whole
    assert verify(tmp_path / "run", "step1").whole
    (tmp_path / "run/latest").unlink()
    assert not verify(tmp_path / "run").whole
    for found in (verify(tmp_path / "run", "newest"), verify(tmp_path / "run", "newest", quick=True)):
        assert (Path(found.path).name, found.whole) == ("step1", True)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="no such file or folder"):
        verify(tmp_path / "nowhere")


def test_progress_reaches_the_end(consolidated: Path) -> None:
    steps: list[tuple[int, int]] = []
    verify(consolidated, finite=True, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] > 0
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
