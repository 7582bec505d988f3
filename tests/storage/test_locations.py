"""Files behind URLs, from a real S3 server on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ucp
from tests.formats import raw
from tests.formats.deepspeed.write.test_native import raw_source
from tests.s3 import get, put
from ucp import limits
from ucp.errors import (
    BadArgument,
    DamagedCheckpoint,
    DestinationError,
    DigestMismatch,
    NotACheckpoint,
)
from ucp.storage import locations
from ucp.storage.files import Files


def test_ranges_names_and_what_is_missing(bucket: str, tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(3 << 20)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file.bin").write_bytes(content)
    put(tmp_path / "a", f"{bucket}/ranges")
    url = f"{bucket}/ranges/file.bin"
    assert locations.names(f"{bucket}/ranges") == ["file.bin"]
    assert locations.stat(url).size == len(content)
    assert locations.stat(url).mtime_ns > 1.7e18
    assert locations.is_file(url)
    assert not locations.is_file(f"{bucket}/ranges")
    assert locations.is_folder(f"{bucket}/ranges")
    with Files() as files:
        found = bytearray(1 << 20)
        files.read_into(url, 12345, found)
        assert found == content[12345 : 12345 + (1 << 20)]
        assert files.bytes_read == 1 << 20
        parts = [bytearray(5), bytearray(1000)]
        files.read_parts(url, 77, parts)
        assert parts == [content[77:82], content[82:1082]]
        with pytest.raises(DamagedCheckpoint, match=r"file.bin: the file is truncated: bytes 3145000 to 4193576"):
            files.read_into(url, 3145000, found)
        with pytest.raises(DamagedCheckpoint, match=r"nothing.bin: cannot be read"):
            files.size(f"{bucket}/ranges/nothing.bin")
    with locations.opened(url) as stream:
        stream.seek(-100, os.SEEK_END)
        assert stream.read() == content[-100:]


def test_attempts_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may pass is tried again, and told in the end; what will not pass is told at once."""
    monkeypatch.setattr(limits, "REQUEST_FIRST_PAUSE_SECONDS", 0.001)
    calls: list[int] = []

    def failing(times: int, error: Exception) -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    assert locations.attempted("s3://x", lambda: failing(2, ConnectionResetError("reset"))) == "done"
    calls.clear()
    with pytest.raises(OSError, match="reset"):
        locations.attempted("s3://x", lambda: failing(9, ConnectionResetError("reset")))
    assert len(calls) == limits.REQUEST_ATTEMPTS_COUNT
    calls.clear()
    with pytest.raises(FileNotFoundError):
        locations.attempted("s3://x", lambda: failing(9, FileNotFoundError()))
    assert len(calls) == 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, raw.Raw]:
    """A run's folder: a universal checkpoint, and a native one of DeepSpeed's made from it."""
    root = tmp_path_factory.mktemp("made")
    content = raw_source(root / "raw")
    raw.write_consolidated(root / "universal", content.catalog)
    ucp.convert(root / "universal", root / "native", "deepspeed", "dp=2,zero=1")
    return root, content


@pytest.mark.slow
def test_checkpoints_open_read_and_convert(bucket: str, made: tuple[Path, raw.Raw], tmp_path: Path) -> None:
    """By their URLs the same tensors as from the local disk; regions read only what they need."""
    root, _ = made
    for name in ("universal", "native"):
        put(root / name, f"{bucket}/{name}")
        with ucp.open(root / name) as local, ucp.open(f"{bucket}/{name}") as remote:
            assert remote.format == local.format
            assert str(remote.path).startswith(f"{bucket}/{name}")
            assert set(remote.catalog.tensors) == set(local.catalog.tensors)
            for parameter, state in local.catalog.tensors:
                assert remote.read(parameter, state).equal(local.read(parameter, state)), (parameter, state)
            assert remote.training_state.global_steps == local.training_state.global_steps
    ucp.convert(f"{bucket}/native", tmp_path / "from-url")
    ucp.convert(root / "native", tmp_path / "from-disk")
    with ucp.open(tmp_path / "from-url") as a, ucp.open(tmp_path / "from-disk") as b:
        assert all(a.read(*key).equal(b.read(*key)) for key in b.catalog.tensors)


@pytest.mark.slow
def test_virtual_checkpoints_point_at_urls(bucket: str, made: tuple[Path, raw.Raw], tmp_path: Path) -> None:
    root, _ = made
    put(root / "native", f"{bucket}/pointed")
    ucp.convert(f"{bucket}/pointed", tmp_path / "pointer", virtual=True)
    with ucp.open(tmp_path / "pointer") as pointer, ucp.open(root / "native") as local:
        assert all(pointer.read(*key).equal(local.read(*key)) for key in local.catalog.tensors)


@pytest.mark.slow
def test_converting_to_a_url(bucket: str, made: tuple[Path, raw.Raw], tmp_path: Path) -> None:
    root, content = made
    report = ucp.convert(root / "native", f"{bucket}/written", workers=2)
    assert report.destination == f"{bucket}/written"
    with ucp.open(f"{bucket}/written") as remote, ucp.open(root / "native") as local:
        assert all(remote.read(*key).equal(local.read(*key)) for key in local.catalog.tensors)
        assert remote.verify() > 0
    ucp.convert(root / "native", tmp_path / "beside")
    for file in (tmp_path / "beside").iterdir():
        if file.suffix == ".safetensors":
            assert locations.read(f"{bucket}/written/{file.name}") == file.read_bytes()
    with pytest.raises(DestinationError, match="s3://runs/written: the destination exists already"):
        ucp.convert(root / "native", f"{bucket}/written")
    with pytest.raises(BadArgument, match="behind a URL nothing is replaced"):
        ucp.convert(root / "native", f"{bucket}/written", overwrite=True)
    assert content.catalog.tensors


@pytest.mark.slow
@pytest.mark.parametrize("to", ["deepspeed", "deepspeed-universal", "dcp"])
@pytest.mark.parametrize("memory", [None, 45 << 20], ids=["default windows", "windows of one chunk"])
def test_zip_archives_behind_a_url(
    bucket: str, made: tuple[Path, raw.Raw], tmp_path: Path, to: str, memory: int | None
) -> None:
    """The same bytes as in a local folder; torch reads them whole and mapped, and so do we."""
    root, _ = made
    url = f"{bucket}/zipped-{to}-{memory}"
    options = {"to": to, "layout": "dp=2,zero=2" if to == "deepspeed" else None}
    ucp.convert(root / "native", url, max_memory=memory, **options)
    ucp.convert(root / "native", tmp_path / "local", **options)
    get(url, tmp_path / "got")
    assert raw.tree(tmp_path / "got") == raw.tree(tmp_path / "local")
    for path in (tmp_path / "got").rglob("*.pt"):
        assert torch.load(path, weights_only=False)
        assert torch.load(path, weights_only=False, mmap=True)


@pytest.mark.slow
def test_the_file_by_which_a_checkpoint_is_found_comes_last(
    bucket: str, made: tuple[Path, raw.Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = made
    order: list[str] = []
    created = locations.created

    @contextmanager
    def noted(url: str, part: int) -> Iterator[Any]:
        with created(url, part) as stream:
            yield stream
        order.append(url.rsplit("/", 1)[-1])

    monkeypatch.setattr(locations, "created", noted)
    for to, last in (("deepspeed", "latest"), ("deepspeed-universal", "latest_universal"), ("dcp", ".metadata")):
        order.clear()
        ucp.convert(root / "native", f"{bucket}/last-{to}", to, "dp=3,zero=1" if to == "deepspeed" else None)
        assert len(order) > 1
        assert order[-1] == last


@pytest.mark.slow
def test_a_conversion_that_fails_leaves_nothing_behind_the_url(
    bucket: str, made: tuple[Path, raw.Raw], tmp_path: Path
) -> None:
    """A chunk of the source is damaged: it is noticed after other files are written."""
    root, _ = made
    damaged = tmp_path / "damaged"
    shutil.copytree(root / "universal", damaged)
    states = next(damaged.glob("optimizer.exp_avg_sq*.safetensors"))
    raw.flip(states, states.stat().st_size - 1, 1)
    with pytest.raises(DigestMismatch):
        ucp.convert(damaged, f"{bucket}/failed")
    assert not locations.exists(f"{bucket}/failed")


@pytest.mark.slow
def test_what_is_wrong_behind_a_url_is_told(bucket: str, made: tuple[Path, raw.Raw], tmp_path: Path) -> None:
    root, _ = made
    with pytest.raises(NotACheckpoint, match=r"s3://runs/nowhere: there is no such file or folder"):
        ucp.open(f"{bucket}/nowhere")
    with pytest.raises(BadArgument, match="nosuch://x"):
        ucp.open("nosuch://x/y")
    damaged = tmp_path / "damaged"
    raw.write_consolidated(damaged, made[1].catalog)
    weights = next(damaged.glob("model*.safetensors"))
    raw.flip(weights, weights.stat().st_size - 1, 1)
    put(damaged, f"{bucket}/damaged")
    with ucp.open(f"{bucket}/damaged") as checkpoint, pytest.raises(DigestMismatch, match="s3://runs/damaged/model"):
        checkpoint.verify()
    assert root.is_dir()
