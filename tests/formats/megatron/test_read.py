"""Folders that Megatron-Core wrote, opened: every tensor as its own loader has it, the training state, the layout."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.engines.megatron import cases
from tests.engines.megatron.written import COMMON_OBJECT, WRITTEN
from tests.engines.truth import same
from ucp.errors import DamagedCheckpoint, UcpError, Unsupported
from ucp.inspection.verify import verify

pytestmark = pytest.mark.slow

Truths = Mapping[str, Mapping[tuple[str, str], torch.Tensor]]


@pytest.mark.parametrize("name", WRITTEN)
def test_every_tensor_is_as_megatron_reads_it(written: Path, truths: Truths, name: str) -> None:
    case = WRITTEN[name]
    with ucp.open(written / name) as checkpoint:
        assert checkpoint.format == "megatron"
        assert set(checkpoint.catalog.tensors) == set(truths[name])
        for (parameter, state), value in truths[name].items():
            assert same(checkpoint.read(parameter, state), value), (parameter, state)
        layout = checkpoint.layout
        assert (layout.tp, layout.pp, layout.ep) == (case.tp, case.pp, case.ep)
        assert layout.zero == int(case.sharding is not None)


@pytest.mark.parametrize("name", [name for name, case in WRITTEN.items() if case.sharding is not None])
def test_buckets_are_told_apart(written: Path, truths: Truths, name: str) -> None:
    with ucp.open(written / f"{name} buckets") as checkpoint:
        assert set(checkpoint.catalog.tensors) == set(truths[name])
        for (parameter, state), value in truths[name].items():
            assert same(checkpoint.read(parameter, state), value), (parameter, state)
        with ucp.open(written / name) as by_parameter:
            assert checkpoint.training_state.param_groups == by_parameter.training_state.param_groups
            # Only the first data-parallel rank writes what is whole, so that the others don't show.
            assert replace(checkpoint.layout, dp=1) == replace(by_parameter.layout, dp=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("values", "masters of '.*' and others are not its weights"),
        ("shapes", "is none that is known"),
    ],
)
def test_buckets_of_an_unknown_order_are_refused(written: Path, tmp_path: Path, change: str, said: str) -> None:
    path = tmp_path / "iter_0000002"
    shutil.copytree(written / "llama buckets" / "iter_0000002", path)
    if change == "values":
        _other_iteration(path)
    else:
        _metadata(_move_a_boundary)(path)
    with pytest.raises((Unsupported, DamagedCheckpoint), match=said):
        ucp.open(path)


def _move_a_boundary(meta: Any) -> None:
    """As of a model in which a parameter has another size, whose states are cut otherwise."""
    for key, entry in meta.state_dict_metadata.items():
        if ".bucket_idx_0." in key:
            entry.chunks = entry.chunks[:-1]


def test_layouts_hold_the_same(truths: Truths) -> None:
    """Values by hash make the same run in every layout, so what is read of all of them is the same."""
    for name in ("llama tp2 pp2", "llama tp2 plain"):
        assert truths[name].keys() == truths["llama"].keys()
        for key, value in truths["llama"].items():
            assert same(truths[name][key], value), (name, key)


def test_the_training_state(written: Path) -> None:
    with ucp.open(written / "moe tp2 ep2") as checkpoint:
        state = checkpoint.training_state
        assert state.global_steps == 2
        assert state.lr_scheduler["num_steps"] == 16
        assert {info.scalars.get("step") for info in checkpoint.parameters.values()} == {2.0}
        plain, norms, experts = state.param_groups
        assert experts.options is not None
        assert experts.options["is_expert_parallel"] is True
        assert len(experts.names) == 2 * cases.LAYERS * cases.EXPERTS
        assert all(".experts.local_experts." in name for name in experts.names)
        assert all("norm" in name for name in norms.names)
        assert {n for group in (plain, norms, experts) for n in group.names} == set(checkpoint.parameters)
        assert state.extra["megatron"]["content_metadata"]["distrib_optim_sharding_type"] == "fully_reshardable"


def test_the_common_state_is_an_object(written: Path) -> None:
    """As newer releases of Megatron-Core have it: there is no common.pt, and all else is the same."""
    name = COMMON_OBJECT.removesuffix(" common object")
    assert not (written / COMMON_OBJECT / "iter_0000002" / "common.pt").exists()
    with ucp.open(written / COMMON_OBJECT / "iter_0000002") as found, ucp.open(written / name) as wanted:
        assert found.training_state == wanted.training_state
        assert found.parameters == wanted.parameters
        assert found.catalog.layout == wanted.catalog.layout
        for key in wanted.catalog.tensors:
            assert same(found.read(*key), wanted.read(*key)), key


def test_verify(written: Path) -> None:
    found = verify(written / "llama tp2 pp2")
    assert [finding for finding in found.findings if finding.fault] == []


def test_recorded_hashes_are_compared(written: Path, tmp_path: Path) -> None:
    """As newer releases of Megatron-Core write integrity.json."""
    path = tmp_path / "iter_0000002"
    shutil.copytree(written / "llama" / "iter_0000002", path)
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}
    (path / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": files}))
    assert [finding for finding in verify(path).findings if finding.fault] == []
    data = path / "__0_0.distcp"
    raw = bytearray(data.read_bytes())
    raw[100] ^= 1  # in a record's zip header, which nothing else looks at
    data.write_bytes(raw)
    assert [(f.kind, Path(f.subject).name) for f in verify(path).findings if f.fault] == [("digest", "__0_0.distcp")]
    files["gone.distcp"] = "0" * 64
    (path / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": files}))
    assert "gone.distcp" in {Path(f.subject).name for f in verify(path).findings if f.fault}
    for bad, said in (
        ({"algorithm": "md5", "files": {}}, "SHA-256 is what can be checked"),
        ({"files": {"../x": "0" * 64}}, "cannot be a file's name"),
        ({"files": {"a": "xyz"}}, "is no SHA-256"),
        ([], r"integrity\.json"),
    ):
        (path / "integrity.json").write_text(json.dumps(bad))
        assert any(re.search(said, f.text) for f in verify(path).findings if f.fault), said


# --- damage ----------------------------------------------------------------------------------------------------------


def _metadata(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        found = pickle.loads((path / ".metadata").read_bytes())
        change(found)
        (path / ".metadata").write_bytes(pickle.dumps(found))

    return apply


def _common(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        found = torch.load(path / "common.pt", weights_only=False)
        change(found)
        torch.save(found, path / "common.pt")

    return apply


def _lose_a_layer(meta: Any) -> None:
    found = meta.state_dict_metadata["decoder.layers.self_attention.linear_qkv.weight"]
    found.chunks = [chunk for chunk in found.chunks if chunk.offsets[0] != 3]


def _truncate(name: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / name
        file.write_bytes(file.read_bytes()[:-200])

    return apply


def _other_iteration(path: Path) -> None:
    """A rank's data from a run whose weights are others: here another place of the same file."""
    file = path / "__0_0.distcp"
    raw = bytearray(file.read_bytes())
    with ucp.open(path) as checkpoint:
        catalog = checkpoint.catalog
        for (_, state), tensor in catalog.tensors.items():
            for k in range(len(tensor.blocks)):
                if state == "param" and catalog.files[int(tensor.blocks.buffers[k])].path == str(file):
                    at = int(tensor.bases[k])
                    raw[at : at + 64] = bytes(range(64))
    file.write_bytes(raw)


BAD: Mapping[str, tuple[Callable[[Path], Any], str]] = {
    "a data file is missing": (lambda p: (p / "__0_0.distcp").unlink(), r"__0_0\.distcp: cannot be read"),
    "a data file is truncated": (_truncate("__0_0.distcp"), r"__0_0\.distcp"),
    "common.pt is truncated": (_truncate("common.pt"), r"common\.pt"),
    "common.pt is missing": (lambda p: (p / "common.pt").unlink(), r"common\.pt: there is no such file"),
    "metadata.json is missing": (lambda p: (p / "metadata.json").unlink(), "has not come to its end"),
    "metadata.json is no JSON": (lambda p: (p / "metadata.json").write_text("{"), r"metadata\.json"),
    ".metadata is missing": (lambda p: (p / ".metadata").unlink(), r"has no '\.metadata'"),
    "another backend": (lambda p: (p / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"})), "zarr"),
    "a layer is missing": (_metadata(_lose_a_layer), "linear_qkv.*(4 layers|not covered|hole|missing)"),
    "the arguments have other layers": (_common(lambda c: c.update(args={"num_layers": 5})), "say 5 layers.* has 4"),
    "the arguments have another tp": (
        _common(lambda c: c.update(args={"tensor_model_parallel_size": 4})),
        "say 4 tensor-parallel ranks.*cut for 2",
    ),
    "the arguments have another pp": (
        _common(lambda c: c.update(args={"pipeline_model_parallel_size": 4, "world_size": 4})),
        "say 4 pipeline stages, and layer 0 was written by the ranks",
    ),
    "another iteration's common state": (_common(lambda c: c.update(iteration=7)), "iteration 2, .*iteration 7"),
    "steps that differ": (
        _common(lambda c: c["optimizer"]["optimizer"]["param_groups"][0].update(step=9.0)),
        r"\[2\.0, 9\.0\] steps",
    ),
    "weights of another iteration": (_other_iteration, "masters, rounded"),
}


@pytest.mark.parametrize("what", BAD)
def test_damage_is_named(written: Path, tmp_path: Path, what: str) -> None:
    path = tmp_path / "run" / "iter_0000002"
    shutil.copytree(written / "llama tp2 pp2" / "iter_0000002", path)
    change, said = BAD[what]
    change(path)
    with pytest.raises((DamagedCheckpoint, Unsupported), match=said) as caught:
        ucp.open(path)
    assert str(path) in str(caught.value) or "linear_qkv" in str(caught.value)


class Planted:
    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Planted, "ran", True))


def test_nothing_in_the_common_state_is_run(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "iter_0000002"
    shutil.copytree(written / "llama" / "iter_0000002", path)
    torch.save({"iteration": 2, "args": Planted()}, path / "common.pt")
    with pytest.raises(UcpError, match=r"common\.pt: its pickle names \S+\.setattr"):
        ucp.open(path)
    assert not Planted.ran
