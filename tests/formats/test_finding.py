"""How a folder's format is found: one look for all formats, one search for a conversion."""

from __future__ import annotations

from pathlib import Path

import pytest

import ucp
from tests.formats import raw
from ucp import formats
from ucp.errors import BadArgument
from ucp.formats.base import OBJECT
from ucp.storage import locations


def test_one_listing_serves_all_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("nothing that a format knows")
    listed: list[str] = []
    names = locations.names
    monkeypatch.setattr(locations, "names", lambda folder: (listed.append(str(folder)), names(folder))[1])
    assert formats.find(tmp_path) is None
    assert listed == [str(tmp_path)]


def test_a_conversion_looks_at_its_source_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.write_consolidated(tmp_path / "source", raw.make(tmp_path / "raw").catalog)
    seen: list[Path] = []
    look = formats.look
    monkeypatch.setattr(formats, "look", lambda path: (seen.append(path), look(path))[1])
    ucp.convert(tmp_path / "source", tmp_path / "dest")
    around = tmp_path  # a framework may have left something there (`Format.completes`)
    assert [path for path in seen if path != around] == [tmp_path / "source"]
    assert seen.count(around) <= 2


def test_a_folder_that_cannot_be_listed_is_asked_for_names_that_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind an address that serves files and lists none."""
    raw.write_consolidated(tmp_path / "source", raw.make(tmp_path / "raw").catalog)

    def refuse(folder: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(locations, "names", refuse)
    found = formats.find(tmp_path / "source")
    assert found is not None
    assert found.name == "universal"


def test_a_folder_with_the_name_of_a_manifest_is_none(tmp_path: Path) -> None:
    for name in ("ucp.json", ".metadata", "model.safetensors"):
        (tmp_path / name).mkdir()
    assert formats.find(tmp_path) is None


def test_names_of_formats_targets_and_options_are_told_apart() -> None:
    known = formats.built_in()
    targets = [target.name for one in known for target in one.targets]
    assert len({one.name for one in known}) == len(known)
    assert len(set(targets)) == len(targets)
    for one in known:
        assert formats.named(one.name) is one
        for option in (*one.read_options, *(option for target in one.targets for option in target.options)):
            assert option.about
            assert option.kind == OBJECT or option.flag.startswith("--")


def test_options_of_built_in_targets_load_no_other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for other packages' formats takes longer than a virtual checkpoint of a small model."""
    raw.write_consolidated(tmp_path / "source", raw.make(tmp_path / "raw").catalog)

    def refuse() -> tuple[formats.Format, ...]:
        raise AssertionError("other packages' formats were looked for")

    monkeypatch.setattr(formats, "registered", refuse)
    ucp.convert(tmp_path / "source", tmp_path / "pointer", virtual=True)
    with pytest.raises(BadArgument, match="dtype is for 'megatron' or 'huggingface' only"):
        ucp.convert(tmp_path / "source", tmp_path / "dest", dtype="bf16")
