"""Planted pickles in what a running program loads: nothing of them runs, and nothing of the program changes."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import ucp
from tests.attacks import formats
from tests.formats.dcp import states
from ucp.errors import UcpError, UnsafePickle


def planted(raw: bytes, flag: Path) -> bytes:
    """The archive with a call of os.system as another item of the root of its pickle."""
    call = b"cposix\nsystem\nX" + len(f"touch {flag}").to_bytes(4, "little") + f"touch {flag}".encode() + b"\x85R"
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    entries[name] = entries[name][:-1] + b"0" + call + b"."
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for other, content in entries.items():
            archive.writestr(other, content)
    return stream.getvalue()


def test_a_state_dict(tmp_path: Path) -> None:
    """`ucp.load` of a DCP folder whose metadata is a pickle that calls."""
    run, flag = formats.make("dcp", tmp_path), tmp_path / "flag"
    call = f"touch {flag}".encode()
    (run / ".metadata").write_bytes(b"\x80\x02cposix\nsystem\nX" + len(call).to_bytes(4, "little") + call + b"\x85R.")
    loaded = states.blank(states.nested())
    before = repr(loaded)
    with pytest.raises(UnsafePickle, match=r"names posix\.system"):
        ucp.load(loaded, run)
    assert repr(loaded) == before
    assert not flag.exists()
    # The attack is a real one.
    import pickle

    pickle.loads((run / ".metadata").read_bytes())
    assert flag.exists()


@pytest.mark.parametrize("name", ["zero1", "zero3", "zero0"])
def test_a_training_program(tmp_path: Path, name: str) -> None:
    """`ucp.load_training` of DeepSpeed's files, each of them with a call in it."""
    run = formats.make(name, tmp_path)
    for path in sorted(run.rglob("*.pt")):
        flag = tmp_path / f"flag-{path.stem}"
        kept = path.read_bytes()
        path.write_bytes(planted(kept, flag))
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(UcpError) as caught:
            ucp.load_training(run, model=model, optimizer=optimizer)
        assert isinstance(caught.value, UnsafePickle), path.name
        assert not flag.exists(), path.name
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert not optimizer.state
        path.write_bytes(kept)
    assert os.listdir(run)
    shutil.rmtree(run)
