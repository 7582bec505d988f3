"""A virtual checkpoint leads nowhere but into the folder that it names as its source, unless the caller trusts it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import save_file

import ucp
from tests.formats import raw
from ucp.cli.main import main
from ucp.errors import BadArgument, DamagedCheckpoint, NotACheckpoint, Unsupported
from ucp.formats.universal import manifest


@pytest.fixture
def pointing(tmp_path: Path) -> Path:
    return raw.virtual_checkpoint(tmp_path / "run/virtual", raw.make(tmp_path / "run/raw"))


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and frame it with a right digest, as its author could."""
    body = json.loads((folder / manifest.NAME).read_bytes())
    del body["digest"]
    change(body)
    # In ASCII, since an attacker may also name half of a surrogate pair, which our writer would not.
    text = json.dumps(body).encode()
    digest = xxhash.xxh3_128_hexdigest(text[1:])
    (folder / manifest.NAME).write_bytes(b'{"digest":"xxh3_128:' + digest.encode() + b'",' + text[1:])


def move(folder: Path, secret: Path) -> None:
    """Let the first of its files be this one."""
    stat = secret.stat()

    def change(body: dict[str, Any]) -> None:
        body["files"]["path"][0] = str(secret)
        body["files"]["size"][0], body["files"]["mtime_ns"][0] = stat.st_size, stat.st_mtime_ns

    edit(folder, change)


def test_what_is_pointed_at_lies_in_the_source(pointing: Path, tmp_path: Path) -> None:
    assert json.loads((pointing / manifest.NAME).read_bytes())["source"]["folder"] == "../raw"
    with ucp.open(pointing) as opened:
        truth = opened.read("embed.weight")
    # The same elements, in a file elsewhere.
    secret = tmp_path / "elsewhere" / "rank0.bin"
    secret.parent.mkdir()
    secret.write_bytes((tmp_path / "run/raw/rank0.bin").read_bytes())
    move(pointing, secret)
    with pytest.raises(Unsupported, match=r"points at '.*rank0\.bin', outside '.*raw', which it names.*--trust-paths"):
        ucp.open(pointing)
    with ucp.open(pointing, trust_paths=True) as opened:
        assert torch.equal(opened.read("embed.weight"), truth)
    with pytest.raises(Unsupported):
        ucp.convert(pointing, tmp_path / "out")
    ucp.convert(pointing, tmp_path / "out", trust_paths=True)
    for command in (["inspect"], ["verify"], ["plan", "--layout", "dp=1,zero=1"], ["report", "-o", f"{tmp_path}/page"]):
        arguments = [command[0], str(pointing), *command[1:]]
        assert main(arguments) == 2, command
        assert main([*arguments, "--trust-paths"]) == 0, command
    assert main(["convert", str(pointing), str(tmp_path / "cli")]) == 2
    assert main(["convert", str(pointing), str(tmp_path / "cli"), "--trust-paths"]) == 0


@pytest.mark.parametrize("how", ["link", "link to a folder", "dots"])
def test_links_and_dots_lead_out_as_well(pointing: Path, tmp_path: Path, how: str) -> None:
    source = tmp_path / "run/raw"
    other = tmp_path / "other"
    other.mkdir()
    (source / "rank0.bin").rename(other / "rank0.bin")
    if how == "link":
        (source / "rank0.bin").symlink_to(other / "rank0.bin")
    elif how == "link to a folder":
        (source / "inner").symlink_to(other)
        edit(pointing, lambda body: body["files"]["path"].__setitem__(0, "../raw/inner/rank0.bin"))
    else:
        edit(pointing, lambda body: body["files"]["path"].__setitem__(0, "../raw/../../other/rank0.bin"))
    with pytest.raises(Unsupported, match="outside"):
        ucp.open(pointing)
    with ucp.open(pointing, trust_paths=True) as opened:
        assert opened.verify() == 0


@pytest.mark.parametrize("folder", ["/", "../../../../../../../../../../..", 7, None, "x\0", "s3://bucket"])
def test_the_source_is_a_folder(pointing: Path, folder: Any) -> None:
    edit(pointing, lambda body: body["source"].__setitem__("folder", folder))
    with pytest.raises((Unsupported, DamagedCheckpoint)):
        ucp.open(pointing)


def test_a_manifest_that_names_no_source_points_beside_itself(pointing: Path, tmp_path: Path) -> None:
    """As releases before this rule wrote them."""
    edit(pointing, lambda body: body["source"].pop("folder"))
    with ucp.open(pointing) as opened:
        assert opened.parameters
    secret = tmp_path / "elsewhere"
    secret.write_bytes((tmp_path / "run/raw/rank0.bin").read_bytes())
    move(pointing, secret)
    with pytest.raises(Unsupported, match="outside"):
        ucp.open(pointing)


@pytest.mark.parametrize("name", ["../raw/x\0y", "../raw/\ud800", "\0", "/\0", "../raw/" + "x" * 5000])
@pytest.mark.parametrize("field", ["files", "source"])
def test_a_name_that_no_file_can_have(pointing: Path, name: str, field: str) -> None:
    def change(body: dict[str, Any]) -> None:
        if field == "source":
            body["source"]["folder"] = name
        else:
            body["files"]["path"][0] = name

    edit(pointing, change)
    for trust in (False, True):
        if trust and field == "source":
            continue
        with pytest.raises((Unsupported, DamagedCheckpoint)):
            ucp.open(pointing, trust_paths=trust)


@pytest.mark.parametrize("name", ["x\0y", "\ud800", "x" * 5000, "/\0"])
def test_such_names_in_other_formats(tmp_path: Path, name: str) -> None:
    folder = raw_huggingface(tmp_path, name)
    with pytest.raises((Unsupported, DamagedCheckpoint)):
        ucp.open(folder)
    run = tmp_path / "run"
    (run / "step").mkdir(parents=True)
    (run / "latest").write_bytes(name.encode("utf-8", "surrogatepass"))
    with pytest.raises(NotACheckpoint):
        ucp.open(run)
    with pytest.raises((NotACheckpoint, BadArgument)):
        ucp.open(run, tag=name)


def raw_huggingface(folder: Path, name: str) -> Path:
    """A Hugging Face folder whose index names a file so."""
    folder = folder / "hf"
    folder.mkdir()
    save_file({"a.weight": torch.ones(2)}, folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"a.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
