"""The stand-ins of enumerations against the classes themselves, as every Python writes their members."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.storage.torch_pt.graphs import FORMATS, save
from tests.storage.torch_pt.test_unsafe_pickles import Call
from ucp.storage.torch_pt.reader import load
from ucp.storage.torch_pt.standins import MEMBERS


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("key", MEMBERS, ids=lambda key: key[1])
def test_members_by_value_and_by_name(key: tuple[str, str], file_format: str, tmp_path: Path) -> None:
    module, name = key
    pytest.importorskip(module.partition(".")[0])
    kind = getattr(importlib.import_module(module), name)
    assert set(MEMBERS[key]) == {member.name for member in kind}
    by_value = [Call(kind, member.value) for member in kind]
    by_name = [Call(getattr, kind, member.name) for member in kind]
    read = load(save([by_value, by_name, list(kind)], tmp_path / "a.pt", file_format))
    assert read[0] == read[1] == read[2]
    assert len({str(standin.value) for standin in read[1]}) == len(kind)
