"""A pipe, a socket or a device under the name of a checkpoint's file: refused at once, wherever that file is read."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import ucp
from tests.attacks import formats
from tests.attacks.arena import fight
from tests.slow_cases import slow_but
from ucp.inspection.listing import listing
from ucp.inspection.verify import verify
from ucp.merging import language
from ucp.spec import changes
from ucp.storage import locations, metrics
from ucp.storage.files import Files


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_pipe(path: Path) -> None:
    target = path.with_name(".pipe")
    if not target.exists():
        os.mkfifo(target)
    path.symlink_to(target)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # an address is short, and a test's folder is not
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


KINDS = [pipe, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (link_to_pipe, device, bound_socket))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", slow_but(list(formats.FORMATS)[::2], formats.FORMATS))
def test_every_file_of_every_format(tmp_path: Path, name: str, kind: Callable[[Path], None]) -> None:
    run = formats.make(name, tmp_path)
    truth = formats.everything(run)
    tag = (run / "latest").read_text() if (run / "latest").exists() else None

    def attack(path: Path) -> Callable[[], str]:
        def run_attack() -> str:
            content = path.read_bytes()
            stat = path.stat()
            path.unlink()
            kind(path)
            try:
                listing(run)
                verify(run)
                found = formats.everything(run)
                verify(run, tag)
                assert found == truth or "index" in path.name or "config" in path.name
                return "the same"
            finally:
                path.unlink()
                path.write_bytes(content)
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

        return run_attack

    paths = formats.files(run)
    assert paths
    for path, verdict in zip(paths, fight([attack(path) for path in paths]), strict=True):
        assert verdict.within_limits, f"{path.name}: {verdict}"
    assert formats.everything(run) == truth


@pytest.mark.parametrize("kind", KINDS)
def test_reading_by_every_way(tmp_path: Path, kind: Callable[[Path], None]) -> None:
    kind(tmp_path / "x")
    with pytest.raises(OSError, match=r"no regular file|No such device"):
        locations.read(tmp_path / "x")
    with pytest.raises(OSError, match=r"no regular file|No such device"), locations.opened(tmp_path / "x"):
        pass
    with Files() as files, pytest.raises(ucp.errors.DamagedCheckpoint, match=r"no regular file|No such device"):
        files.read_into(tmp_path / "x", 0, bytearray(1))
    with pytest.raises(IsADirectoryError):
        locations.read(tmp_path)


def test_a_pipe_for_a_conversion_to_continue_from(tmp_path: Path) -> None:
    """What is left of an interrupted conversion is looked at as well, and begun anew where it is none."""
    run = formats.make("consolidated", tmp_path)
    part = tmp_path / ".ucp-part-out"
    part.mkdir()
    os.mkfifo(part / "identity")
    ucp.convert(run, tmp_path / "out")
    with ucp.open(tmp_path / "out") as opened:
        assert opened.parameters


def test_a_pipe_for_the_timings(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / metrics.NAME)
    assert metrics.read_metrics(tmp_path) == []
    metrics.append(tmp_path, {"what": "save"})


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def link_in_a_circle(path: Path) -> None:
    path.symlink_to(path.name)


IN_WORDS = {
    pipe: "a pipe",
    link_to_pipe: "a pipe",
    device: "a device",
    bound_socket: "a socket",
    link_to_nothing: "a link to nothing",
    link_in_a_circle: "a link that leads in a circle",
}


@pytest.mark.parametrize(("kind", "words"), IN_WORDS.items())
def test_what_is_no_file_is_told_in_words(tmp_path: Path, kind: Callable[[Path], None], words: str) -> None:
    """As a checkpoint's path, as the file that names one, and as a spec, a recipe or a file of changes: none of them is
    waited for, and a device without an end is not read."""
    kind(tmp_path / "x")
    for look in (ucp.open, listing, verify, lambda path: ucp.convert(path, tmp_path / "out")):
        with pytest.raises(ucp.errors.NotACheckpoint, match=f"x: is {words}"):
            look(tmp_path / "x")
    run = formats.make("consolidated", tmp_path)
    kind(run.parent / "latest")
    with pytest.raises(ucp.errors.NotACheckpoint, match=f"latest: .*{words}"):
        ucp.open(run.parent)
    with pytest.raises(ucp.errors.BadArgument, match=words):
        ucp.open(run, spec=tmp_path / "x")
    with pytest.raises(ucp.errors.BadArgument, match=words):
        changes.read(tmp_path / "x")
    with pytest.raises(OSError, match=words):
        language.load(tmp_path / "x")


def test_a_file_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    run = formats.make("consolidated", tmp_path)
    for path, nbytes in ((run.parent / "latest", 1 << 17), (run / "ucp.json", 1 << 40)):
        with open(path, "ab") as stream:
            stream.truncate(nbytes)
        with pytest.raises(ucp.errors.UcpError, match=f"it has {nbytes} bytes, and at most"):
            ucp.open(path.parent)
