"""Manifests that were edited, damaged or made to deceive: each is refused in one clear sentence."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import ucp
from tests.formats import raw
from tests.slow_cases import slow_but
from ucp.errors import DamagedCheckpoint, DigestMismatch, NotACheckpoint, UcpError, Unsupported
from ucp.formats.universal import manifest


@pytest.fixture(scope="module", params=["consolidated", "virtual"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose manifest the tests rewrite."""
    root = tmp_path_factory.mktemp("manifest")
    return raw.write_form(request.param, root / "checkpoint", raw.make(root / "source", aliases={"scale": ("gain",)}))


@pytest.fixture
def body(folder: Path) -> dict[str, Any]:
    """The manifest as it was written; put back afterwards."""
    path = folder / manifest.NAME
    original = folder / "original"
    if not original.exists():
        original.write_bytes(path.read_bytes())
    path.write_bytes(original.read_bytes())
    found = json.loads(original.read_bytes())
    del found["digest"]
    return found


def rewrite(folder: Path, body: dict[str, Any]) -> None:
    """A manifest with that body and a digest that fits, made without the code under test."""
    text = json.dumps(body)[1:].encode()
    (folder / manifest.NAME).write_bytes(
        b'{"digest":"xxh3_128:' + xxhash.xxh3_128(text).hexdigest().encode() + b'",' + text
    )


def test_the_digest_covers_all_that_follows_it(folder: Path, body: dict[str, Any]) -> None:
    content = (folder / manifest.NAME).read_bytes()
    found = re.fullmatch(rb'\{"digest":"xxh3_128:([0-9a-f]{32})",(.*)', content, re.DOTALL)
    assert found is not None
    assert found.start(2) == 54
    assert found[1].decode() == xxhash.xxh3_128(found[2]).hexdigest()
    rewrite(folder, body)
    ucp.open(folder).close()


def test_an_unknown_major_version_is_refused_by_name(folder: Path, body: dict[str, Any]) -> None:
    rewrite(folder, body | {"ucp": "2.0"})
    with pytest.raises(
        Unsupported, match=r"ucp\.json: manifest version '2\.0' is not supported; .* reads versions 1\.x"
    ):
        ucp.open(folder)


def test_an_unknown_version_is_named_even_where_the_digest_cannot_be_checked(
    folder: Path, body: dict[str, Any]
) -> None:
    content = (folder / manifest.NAME).read_bytes()
    (folder / manifest.NAME).write_bytes(content.replace(b'"ucp":"1.1"', b'"ucp":"7.1"'))
    with pytest.raises(Unsupported, match=r"manifest version '7\.1'"):
        ucp.open(folder)
    (folder / manifest.NAME).write_text(json.dumps({"ucp": "3.0", "digest": "sha3:"}))
    with pytest.raises(Unsupported, match=r"manifest version '3\.0'"):
        ucp.open(folder)


def test_a_newer_minor_version_is_read(folder: Path, body: dict[str, Any]) -> None:
    rewrite(folder, body | {"ucp": "1.9", "something": ["new"]})
    ucp.open(folder).close()


@pytest.mark.parametrize("version", [None, 1, "1", "one.zero", "1.0\n", "²."])
def test_what_is_no_version_is_damage(folder: Path, body: dict[str, Any], version: Any) -> None:
    rewrite(folder, body | {"ucp": version})
    with pytest.raises(DamagedCheckpoint, match=r"ucp\.json: manifest version .* is no version"):
        ucp.open(folder)


def test_an_edited_manifest_is_refused(folder: Path, body: dict[str, Any]) -> None:
    content = (folder / manifest.NAME).read_bytes()
    (folder / manifest.NAME).write_bytes(content.replace(b'"embed.weight"', b'"embed.height"'))
    with pytest.raises(DigestMismatch, match=r"ucp\.json: the manifest is damaged or was edited"):
        ucp.open(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\x80", b'{"digest":"xxh3_128:', b"{" * 100_000, b"null"])
def test_what_is_no_manifest_is_refused(folder: Path, body: dict[str, Any], content: bytes) -> None:
    (folder / manifest.NAME).write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"ucp\.json"):
        ucp.open(folder)


def test_a_folder_without_a_manifest_is_no_checkpoint(folder: Path, body: dict[str, Any]) -> None:
    (folder / manifest.NAME).unlink()
    with pytest.raises(NotACheckpoint, match="no checkpoint was recognised here"):
        ucp.open(folder)


# --- pointing elsewhere ----------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A consolidated checkpoint, and a file outside its folder with the bytes of its weights."""
    path = raw.write_form("consolidated", tmp_path / "checkpoint", raw.make(tmp_path / "source"))
    (tmp_path / "secret").write_bytes((path / "model-00001-of-00001.safetensors").read_bytes())
    found = json.loads((path / manifest.NAME).read_bytes())
    del found["digest"]
    return path, found


@pytest.mark.parametrize("how", ["parent", "absolute", "round about", "of a sibling with the same beginning", "null"])
def test_a_manifest_that_points_outside_its_folder(own: tuple[Path, dict[str, Any]], how: str) -> None:
    path, body = own
    (path.parent / "checkpoint-2").mkdir()
    (path.parent / "checkpoint-2/x").write_bytes((path.parent / "secret").read_bytes())
    pointers = {
        "parent": "../secret",
        "absolute": str(path.parent / "secret"),
        "round about": "../checkpoint/model-00001-of-00001.safetensors",
        "of a sibling with the same beginning": "../checkpoint-2/x",
        "null": "model\0",
    }
    body["files"]["path"][0] = pointers[how]
    rewrite(path, body)
    with pytest.raises(DamagedCheckpoint, match="outside its own folder; such a manifest is not followed"):
        ucp.open(path)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_out_of_the_folder_is_not_followed(own: tuple[Path, dict[str, Any]], what: str) -> None:
    path, body = own
    if what == "file":
        victim = path / "model-00001-of-00001.safetensors"
        victim.unlink()
        victim.symlink_to(path.parent / "secret")
    else:
        (path / "sub").symlink_to(path.parent)
        body["files"]["path"][0] = "sub/secret"
        rewrite(path, body)
    with pytest.raises(DamagedCheckpoint, match="outside its own folder"):
        ucp.open(path)


def test_a_link_within_the_folder_and_one_to_it_are_fine(own: tuple[Path, dict[str, Any]]) -> None:
    path, _ = own
    victim = path / "model-00001-of-00001.safetensors"
    victim.rename(path / "elsewhere")
    victim.symlink_to("elsewhere")
    (path.parent / "link").symlink_to(path)
    with ucp.open(path.parent / "link") as checkpoint:
        assert checkpoint.verify() > 0


def test_a_consolidated_manifest_cannot_claim_foreign_files(own: tuple[Path, dict[str, Any]]) -> None:
    path, body = own
    body["files"]["path"][0] = "../secret"
    body["files"]["mtime_ns"][0] = os.stat(path.parent / "secret").st_mtime_ns
    rewrite(path, body)
    with pytest.raises(DamagedCheckpoint, match="a consolidated checkpoint cannot point at another checkpoint's files"):
        ucp.open(path)


# --- contradictions --------------------------------------------------------------------------------------------------


def at(*keys: Any) -> Callable[[dict[str, Any], Any], None]:
    def put(body: dict[str, Any], value: Any) -> None:
        for key in keys[:-1]:
            body = body[key]
        body[keys[-1]] = value

    return put


BIG = 1 << 61
LIES: dict[str, tuple[Callable[[dict[str, Any], Any], None], Any, str]] = {
    "form": (at("form"), "liquid", "'form' is 'liquid'"),
    "kind": (at("kind"), "dream", "'kind' is 'dream'"),
    "layout": (at("layout", "dp"), 0, r"'layout.dp' is 0"),
    "zero": (at("layout", "zero"), True, r"'layout.zero' is True"),
    "no files": (at("files"), None, "'files' should be a dict"),
    "sizes": (at("files", "size"), [1], "'files.size' has 1 entries"),
    "negative size": (at("files", "size", 0), -1, "outside 0 to"),
    "text for a size": (at("files", "size", 0), "1", "'files.size' is missing or holds something else"),
    "digests": (at("files", "digests", 0), "AAAA", "chunk digests"),
    "digests of nothing": (at("files", "digests"), [], "'files.digests' has 0 entries"),
    "name twice": (at("parameters", "name", 0), "scale", "'scale' is used twice"),
    "alias twice": (at("aliases", "scale"), ["embed.weight"], "'embed.weight' is used twice"),
    "alias of nobody": (at("aliases", "nobody"), ["x"], "'nobody', which is no parameter"),
    "alias of a number": (at("aliases", "scale"), 3, "'aliases' should map"),
    "kind of parameter": (at("parameters", "kind", 0), "ghost", "is of kind 'ghost'"),
    "negative shape": (at("parameters", "shape", 0), [-1, 7], "impossible shape"),
    "endless shape": (at("parameters", "shape", 0), [BIG, BIG], "impossible shape"),
    "more dimensions": (at("parameters", "shape", 0), [13, 7, 1], "do not fit the tensors' shapes"),
    "other shape": (at("parameters", "shape", 0), [7, 13], "outside its tensor|elements are"),
    "longer shape": (at("parameters", "shape", 0), [14, 7], "'embed.weight' .*7 of 98 elements are missing"),
    "scalars": (at("parameters", "scalars", 0), 99, "'parameters.scalars' holds a number outside"),
    "scalars of a list": (at("scalars", 0), [1], "not an object"),
    "unknown dtype": (at("dtypes", 0), "float31", "unknown element type 'float31'"),
    "wider dtype": (at("dtypes", 0), "complex128", "needs bytes up to|needs bytes"),
    "tensor twice": (at("tensors", "state", 0), 0, "is described twice"),
    "tensor of nobody": (at("tensors", "parameter", 0), 99, "'tensors.parameter' holds a number outside"),
    "more blocks": (at("tensors", "blocks", 0), 5, "'blocks.file' has"),
    "endless blocks": (at("tensors", "blocks", 0), BIG, "'blocks.file' has"),
    "no such file": (at("blocks", "file", 0), 99, "'blocks.file' holds a number outside"),
    "beyond the file": (at("blocks", "byte", 0), BIG, "needs bytes|lies outside|bytes"),
    "box": (at("blocks", "box", 0), 1, "outside its tensor|elements are"),
    "box of nothing": (at("blocks", "box"), [], "'blocks.box' has 0 numbers"),
    "strides": (at("blocks", "strides"), {"block": [0], "values": [BIG, BIG]}, "strides lead beyond|needs bytes|bytes"),
    "strides short": (at("blocks", "strides"), {"block": [0], "values": []}, "is too short"),
    "strides long": (at("blocks", "strides"), {"block": [], "values": [1]}, "is too long"),
    "strides order": (at("blocks", "strides"), {"block": [1, 1], "values": [1] * 4}, "ascending"),
    "training state": (at("training_state"), 5, "'training_state' is missing"),
    "training tensor": (at("training_state", "client_state"), {"$": "tensor", "v": "t9"}, "refers to tensor 't9'"),
    "training value": (at("training_state", "client_state"), {"$": "complex", "v": 1}, "stored values are damaged"),
    "steps of text": (at("training_state", "global_steps"), "7", "global_steps is a str"),
    "no param groups": (at("training_state", "param_groups"), None, "no list of param groups"),
    "param group": (at("training_state", "param_groups"), [{}], "no list of names"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_contradicts_itself(folder: Path, body: dict[str, Any], lie: str) -> None:
    put, value, message = LIES[lie]
    put(body, value)
    rewrite(folder, body)
    with pytest.raises(DamagedCheckpoint, match=message):
        ucp.open(folder)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a JSON structure lies."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key, item in value.items():
            found += places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:3]):
            found += places(item, (*path, index))
    return found


junk = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5)
values = st.recursive(
    junk, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner), max_leaves=8
)


@pytest.mark.parametrize("lies", slow_but([40], [40, 200]))
def test_any_lie_is_refused_or_harmless(folder: Path, body: dict[str, Any], lies: int) -> None:
    """Whatever one value is replaced by: an error of ours, or a checkpoint that can be read; nothing else, and soon."""
    settings(max_examples=lies, deadline=None)(given(data=st.data())(lie))(folder, body)


def lie(folder: Path, body: dict[str, Any], data: st.DataObject) -> None:
    changed = copy.deepcopy(body)
    path = data.draw(st.sampled_from(places(changed)))
    at(*path)(changed, data.draw(values))
    rewrite(folder, changed)
    started = time.monotonic()
    with contextlib.suppress(UcpError), ucp.open(folder) as checkpoint:
        for name, info in checkpoint.parameters.items():
            for state in info.states:
                checkpoint.read(name, state)
    assert time.monotonic() - started < 5
