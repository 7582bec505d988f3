"""Configs: one object of JSON, or one clear sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

import ucp
from tests.formats import raw
from tests.formats.deepspeed.write.test_native import raw_source
from ucp.errors import BadArgument, DamagedCheckpoint
from ucp.inspection.planning import plan
from ucp.parallel.mesh import parse_layout
from ucp.spec.select import choose
from ucp.storage import configs

WRONG = {
    "cut off": (b'{"a": 1', "is not valid JSON: "),
    "no text": (b"\xff\xfe{", "is not valid JSON: "),
    "a list": (b"[]", "is not a JSON object"),
    "too deep": (b'{"a":' + b"[" * 100_000, "is not valid JSON: "),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_object(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for read in (configs.read, lambda path: configs.of_model(tmp_path / "none", path.parent)):
        with pytest.raises(DamagedCheckpoint, match=f"{path}: {message}"):
            read(path)
    for given in (path, tmp_path):
        with pytest.raises(BadArgument, match=f"{path}: {message}"):
            choose(None, given)


def test_none_and_a_folder_of_that_name(tmp_path: Path) -> None:
    assert configs.of_model(tmp_path, tmp_path / "none") is None
    with pytest.raises(DamagedCheckpoint, match=r"config\.json: there is no such file"):
        configs.read(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(DamagedCheckpoint, match=r"config\.json: cannot be read: Is a directory"):
        configs.of_model(tmp_path)


def test_the_first_folder_counts(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"is": "{name}"}}')
    assert configs.of_model(tmp_path / "none", tmp_path / "b", tmp_path / "a") == {"is": "b"}


def test_beside_a_checkpoint_it_counts_where_it_is_needed(tmp_path: Path) -> None:
    """Over one tensor rank nothing is cut, and no config is asked for; what needs one does not take it for none."""
    raw.write_consolidated(tmp_path / "universal", raw_source(tmp_path / "raw").catalog)
    ucp.convert(tmp_path / "universal", tmp_path / "native", "deepspeed", "dp=2,zero=1")
    (tmp_path / "native" / "config.json").write_text("{")
    (tmp_path / "universal" / "config.json").write_text("{")
    with ucp.open(tmp_path / "native") as checkpoint:
        assert checkpoint.parameters
    with pytest.raises(DamagedCheckpoint, match=r"native/config\.json: is not valid JSON"):
        ucp.open(tmp_path / "native", "llama")
    with (
        ucp.open(tmp_path / "universal") as checkpoint,
        pytest.raises(DamagedCheckpoint, match=r"universal/config\.json: is not valid JSON"),
    ):
        plan(checkpoint, parse_layout("dp=1,tp=2,zero=1"))
