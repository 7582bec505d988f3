"""What costs a training run and is only read afterwards: made once in a session, by whichever worker needs it first."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.engines.packing import packed


class Kept:
    """Values by key, each with a folder of its own under ``root``. Workers that have the same root share them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._values: dict[str, Any] = {}

    def get(self, key: object, make: Callable[[str], Any]) -> Any:
        """The value of ``key`` (told apart by its repr): ``make(folder)``, unless it was made before."""
        text = repr(key)
        if text not in self._values:
            self._values[text] = self._shared(text, make)
        return self._values[text]

    def _shared(self, text: str, make: Callable[[str], Any]) -> Any:
        folder = self._root / hashlib.sha256(text.encode()).hexdigest()[:16]
        done = folder.with_suffix(".pickle")
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if done.exists():
                return pickle.loads(done.read_bytes())
            shutil.rmtree(folder, ignore_errors=True)  # of one who failed
            value = make(str(folder))
            part = folder.with_suffix(".part")
            part.write_bytes(packed(value))
            os.replace(part, done)
            return value
