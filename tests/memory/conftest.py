"""A folder for keepers, and an end to every one that a test has started there."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucp.storage.kept import places


@pytest.fixture
def keepers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where keepers leave their notes and sockets; a short path, as sockets need. None outlives the test."""
    folder = Path(tempfile.mkdtemp(prefix="ucpk-", dir="/tmp"))
    monkeypatch.setenv(places.FOLDER, str(folder))
    yield folder
    for note in places.notes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(note.pid, signal.SIGKILL)
    shutil.rmtree(folder)
