"""Links that lie in wait where a conversion works: nothing is written or removed at their other end.

The folder in which a conversion grows lies beside its destination. That may be a folder which was downloaded, or that
others may write to, and archives may hold links.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import ucp
from tests.formats import raw
from ucp.errors import DestinationError
from ucp.merging.combine import merge
from ucp.storage import partial
from ucp.transfer import destination

TENSORS = {"w": torch.arange(12.0), "norm": torch.ones(3)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    ucp.save({"model": TENSORS}, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder of somebody who has nothing to do with it."""
    folder = tmp_path / "theirs"
    (folder / "photos").mkdir(parents=True)
    (folder / "diary").write_text("dear diary")
    (folder / "photos/cat").write_text("a cat")
    return folder


def test_the_folder_in_which_a_conversion_grows_is_no_link(tmp_path: Path, source: Path, theirs: Path) -> None:
    before = raw.tree(theirs)
    (tmp_path / ".ucp-part-out").symlink_to(theirs)
    with pytest.raises(DestinationError, match=r"'.*\.ucp-part-out', which is a link to '.*theirs'; look at it"):
        ucp.convert(source, tmp_path / "out")
    with pytest.raises(DestinationError, match="which is a link"):
        merge([source, source], tmp_path / "out", weights=(1, 1))
    assert raw.tree(theirs) == before
    assert not (tmp_path / "out").exists()
    (tmp_path / ".ucp-part-out").unlink()
    (tmp_path / ".ucp-part-out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DestinationError, match="which is a link to"):
        ucp.convert(source, tmp_path / "out")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("place", ["checkpoint", "journal", "team", "identity", "lock", "checkpoint/ucp.json"])
def test_links_in_it_are_not_followed(
    tmp_path: Path, source: Path, theirs: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where it looks as if this very conversion had been interrupted."""
    before = raw.tree(theirs)
    monkeypatch.setattr(destination, "identify", lambda plan: "0" * 32)
    part = tmp_path / ".ucp-part-out"
    part.mkdir()
    (part / "identity").write_text("0" * 32)
    path = part / place
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    is_folder = place in (partial.CHECKPOINT, partial.JOURNAL, partial.TEAM)
    path.symlink_to(theirs if is_folder else theirs / "diary")
    if place == "lock":
        with pytest.raises(DestinationError, match="lock: cannot be made"):
            ucp.convert(source, tmp_path / "out")
    else:
        ucp.convert(source, tmp_path / "out")
        with ucp.open(tmp_path / "out") as opened:
            assert torch.equal(opened.read("w"), TENSORS["w"])
        assert not any(item.is_symlink() for item in (tmp_path / "out").rglob("*"))
    assert raw.tree(theirs) == before


def test_a_link_for_a_tensors_file_is_not_written_through(tmp_path: Path, source: Path, theirs: Path) -> None:
    ucp.convert(source, tmp_path / "first")
    names = [path.name for path in (tmp_path / "first").iterdir() if path.suffix == ".safetensors"]
    before = raw.tree(theirs)
    part = tmp_path / ".ucp-part-out"
    (part / "checkpoint").mkdir(parents=True)
    for name in names:
        (part / "checkpoint" / name).symlink_to(theirs / "diary")
        with pytest.raises(OSError, match="symbolic links"):
            os.close(destination.disk.open_to_write(part / "checkpoint" / name, os.O_RDWR))
    ucp.convert(source, tmp_path / "out")
    assert raw.tree(theirs) == before
    assert raw.tree(tmp_path / "out").keys() == raw.tree(tmp_path / "first").keys()
