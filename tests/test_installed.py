"""What the packages of this environment say of themselves, read from their folders: as `importlib.metadata` says it."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from ucp import installed
from ucp.formats import GROUP
from ucp.version import version


def test_it_says_what_importlib_says() -> None:
    for package in ("universal-checkpoint", "numpy", "PyYAML", "typing_extensions"):
        assert installed.version_of(package) == metadata.version(package)
    assert installed.version_of("no-such-package") is None
    assert version() == metadata.version("universal-checkpoint")
    for group in ("console_scripts", "pytest11", GROUP, "no.such.group"):
        assert bool(metadata.entry_points(group=group)) <= installed.may_declare(group)
    assert not installed.may_declare("no.such.group")


def test_where_it_cannot_tell_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    archive = tmp_path / "packages.zip"
    archive.write_bytes(b"")
    monkeypatch.setattr(sys, "path", [*sys.path, str(archive)])
    assert installed.may_declare("no.such.group")
    assert installed.version_of("numpy") is None
    assert version.__wrapped__() == metadata.version("universal-checkpoint")  # found in the other way


def test_a_finder_of_metadata_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder(metadata.DistributionFinder):
        def find_distributions(self, context: object = None) -> list[metadata.Distribution]:
            return []

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder()])
    assert installed.may_declare("no.such.group")


def test_a_package_that_declares_the_group_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "some_format-1.2.dist-info"
    folder.mkdir()
    (folder / "entry_points.txt").write_text(f"[{GROUP}]\nsome = some_format\n")
    assert not installed.may_declare(GROUP)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert installed.may_declare(GROUP)
    assert installed.version_of("Some.Format") == "1.2"
