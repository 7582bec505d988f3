"""DeepSpeed's native operators, which some optimizers need: are they built, and build them.

``python -m tests.engines.operators`` builds them all, in about a minute. Tests that need one wait for a build that is
under way, and skip where there was none.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.engines.configs import OPERATORS
from tests.engines.operators import async_io, optimizers


def folder() -> Path:
    """Where operators are built: every environment has a folder of its own, as torch's default one is shared by all."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix) / "torch_extensions")


def are_built(*names: str) -> bool:
    """Whether the operators that these optimizers of cases need (if any) are there. Waits for a build under way."""
    needed = {OPERATORS[name] for name in names if name in OPERATORS}
    if not needed or not folder().exists():
        return not needed
    with _building(fcntl.LOCK_SH):
        return all(optimizers.library(folder(), builder).exists() for builder in needed)


def has_async_io() -> bool:
    """Whether DeepSpeed's asynchronous files, by which it offloads to NVMe, are there. Waits for a build under way."""
    if not folder().exists():
        return False
    with _building(fcntl.LOCK_SH, async_io.NAME):
        return async_io.library(folder()).exists()


def build() -> bool:
    """Build the operators that are missing, each part in a process of its own; whether all are there. What cannot be
    built, its tests skip."""
    folder().mkdir(parents=True, exist_ok=True)
    with _building(fcntl.LOCK_EX):
        with _building(fcntl.LOCK_EX, async_io.NAME):
            done = async_io.library(folder()).exists() or _run("async_io")
        return _run("optimizers") and done


def _run(part: str) -> bool:
    script = f"from tests.engines.operators import {part}, folder; {part}.build(folder())"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder()), "DS_ACCELERATOR": "cpu"}
    return subprocess.run([sys.executable, "-c", script], check=False, env=environment).returncode == 0


@contextmanager
def _building(how: int, what: str = "") -> Iterator[None]:
    with (folder() / f".building{what}").open("a") as lock:
        fcntl.flock(lock, how)
        yield
