"""Conversions that are interrupted: the next one continues, by the digests of what is there, and ends the same."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ucp
from tests.formats import raw
from tests.slow_cases import slow_but
from ucp.errors import DestinationError, DigestMismatch
from ucp.storage.digests import CHUNK

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"w": (3000, 1000), "b": (3,), "v": (1500, 1000)}
LEAST = 12 << 20  # windows of one chunk, one thread


class Interrupt:
    """A progress callback that raises once this share is done."""

    def __init__(self, share: float) -> None:
        self._share = share

    def __call__(self, done: int, total: int) -> None:
        if done >= self._share * total:
            raise KeyboardInterrupt


@pytest.fixture
def made(tmp_path: Path) -> raw.Raw:
    return raw.make(tmp_path / "raw", shapes=SHAPES, states=("param", "exp_avg"), dp=3)


@pytest.fixture
def source(tmp_path: Path, made: raw.Raw) -> Path:
    return raw.virtual_checkpoint(tmp_path / "source", made)


def interrupted(source: Path, dest: Path, share: float = 0.6, **options: Any) -> Path:
    with pytest.raises(KeyboardInterrupt):
        ucp.convert(source, dest, workers=1, max_memory=LEAST, progress=Interrupt(share), **options)
    assert not dest.exists()
    return dest.with_name(f".ucp-part-{dest.name}")


def whole(source: Path, dest: Path, **options: Any) -> dict[str, bytes]:
    """What an uninterrupted conversion writes."""
    ucp.convert(source, dest, **options)
    return raw.tree(dest)


# Files of torch's own form carry CRC-32s, which are known at the end only.
NATIVE = {"to": "deepspeed", "layout": "dp=2,zero=1", "ds_config": {"optimizer": {"type": "Adam"}}}


@pytest.mark.parametrize("options", [{}, NATIVE], ids=["universal", "deepspeed"])
def test_an_interruption_is_continued(source: Path, tmp_path: Path, options: dict[str, Any], caplog: Any) -> None:
    expected = whole(source, tmp_path / "expected", **options)
    part = interrupted(source, tmp_path / "dest", **options)
    assert part.is_dir()
    assert f"what was written stays in '{part}'" in caplog.text
    report = ucp.convert(source, tmp_path / "dest", **options)
    assert report.bytes_read < 0.6 * sum(len(content) for content in expected.values())
    assert raw.tree(tmp_path / "dest") == expected
    assert not list(tmp_path.glob(".ucp*"))
    assert "continuing in" in caplog.text


def test_what_was_changed_meanwhile_is_written_anew(source: Path, tmp_path: Path) -> None:
    """Bytes that never reached the device, or damaged ones, are no reason for a wrong result."""
    expected = whole(source, tmp_path / "expected")
    part = interrupted(source, tmp_path / "dest", share=0.9)
    written = part / "checkpoint" / "model-00001-of-00001.safetensors"
    raw.flip(written, 2 * CHUNK + 5, 1)
    os.truncate(written, 5 * CHUNK + 1)
    (journal,) = (part / "journal").iterdir()
    journal.write_bytes(journal.read_bytes()[:-3])  # its last record is torn
    ucp.convert(source, tmp_path / "dest")
    assert raw.tree(tmp_path / "dest") == expected


def test_interrupted_again_and_again(source: Path, tmp_path: Path) -> None:
    expected = whole(source, tmp_path / "expected")
    for share in (0.2, 0.3, 0.7):
        interrupted(source, tmp_path / "dest", share)
    ucp.convert(source, tmp_path / "dest", workers=3)
    assert raw.tree(tmp_path / "dest") == expected


@pytest.mark.parametrize("change", slow_but(["source"], ["source", "arguments", "no resume"]))
def test_another_conversion_begins_anew(source: Path, tmp_path: Path, made: raw.Raw, change: str) -> None:
    interrupted(source, tmp_path / "dest")
    options: dict[str, Any] = {}
    if change == "source":
        shutil.rmtree(tmp_path / "raw")
        made = raw.make(tmp_path / "raw", shapes=SHAPES, states=("param", "exp_avg"), dp=3, seed=7)
        shutil.rmtree(source)
        raw.virtual_checkpoint(source, made)
    elif change == "arguments":
        options.update(NATIVE)
    else:
        options["resume"] = False
    report = ucp.convert(source, tmp_path / "dest", **options)
    assert report.bytes_read >= sum(tensor.nbytes for tensor in made.catalog.tensors.values())
    assert raw.tree(tmp_path / "dest").keys() == whole(source, tmp_path / "again", **options).keys()
    assert raw.tree(tmp_path / "dest") == raw.tree(tmp_path / "again")
    assert not list(tmp_path.glob(".ucp*"))


def test_without_resume_an_interruption_leaves_nothing(source: Path, tmp_path: Path) -> None:
    part = interrupted(source, tmp_path / "new" / "dest", resume=False)
    assert not part.parent.exists()


def test_a_damaged_source_leaves_nothing_to_continue(source: Path, tmp_path: Path) -> None:
    consolidated = tmp_path / "consolidated"
    ucp.convert(source, consolidated)
    raw.flip(consolidated / "optimizer.exp_avg-00001-of-00001.safetensors", 10 * CHUNK, 1)
    with pytest.raises(DigestMismatch, match="chunk 10 "):
        ucp.convert(consolidated, tmp_path / "dest")
    assert not list(tmp_path.glob(".ucp*"))


def test_only_one_process_converts_to_a_destination(source: Path, tmp_path: Path) -> None:
    def second(done: int, total: int) -> None:
        with pytest.raises(DestinationError, match="another process converts to it"):
            ucp.convert(source, tmp_path / "dest")

    ucp.convert(source, tmp_path / "dest", progress=second)
    assert (tmp_path / "dest").is_dir()


def test_a_full_disk_is_named_and_continued_from(source: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that fills up after the space was checked."""
    import resource

    expected = whole(source, tmp_path / "expected")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, hard))
    try:
        with pytest.raises(DestinationError, match="cannot be written"):
            ucp.convert(source, tmp_path / "dest", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "dest").exists()
    ucp.convert(source, tmp_path / "dest")
    assert raw.tree(tmp_path / "dest") == expected


@pytest.fixture
def heeded(number: int) -> Iterator[None]:
    """Programs started here heed the signal: what a shell runs in the background ignores SIGINT, and so do children."""
    before = signal.signal(number, lambda *_: None)
    yield
    signal.signal(number, before)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("heeded")
def test_the_command_stops_cleanly(tmp_path: Path, number: int) -> None:
    made = raw.make(tmp_path / "raw", shapes={"w": (16000, 2000)}, states=("param", "exp_avg", "exp_avg_sq"))
    source = raw.virtual_checkpoint(tmp_path / "source", made)
    command = [sys.executable, "-m", "ucp.cli.convert", source, tmp_path / "dest", "--max-memory", "12MiB"]
    for _ in range(30):
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and process.poll() is None:
                if any(path.stat().st_size for path in tmp_path.glob(".ucp-part-dest/journal/*")):
                    process.send_signal(number)
                    break
                time.sleep(0.002)
            _, stderr = process.communicate(timeout=60)
        if process.returncode:
            break
        shutil.rmtree(tmp_path / "dest")  # it was done before the signal came
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "ucp-convert: interrupted"
    assert not (tmp_path / "dest").exists()
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "continuing in" in done.stderr
    with ucp.open(tmp_path / "dest") as checkpoint:
        assert checkpoint.verify() > 0
        for name, state in made.truth:
            assert checkpoint.read(name, state).equal(made.tensor(name, state))


def test_logging_is_no_part_of_it(caplog: Any, source: Path, tmp_path: Path) -> None:
    with caplog.at_level(logging.WARNING):
        ucp.convert(source, tmp_path / "dest")
    assert not caplog.records
