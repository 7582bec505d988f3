"""DeepSpeed's native operators, which some optimizers need: are they built, and build them.

``python -m tests.engines.operators [BUILDER ...]`` builds them, all or these, which takes minutes. Tests that need one
wait for a build that is under way, and skip where there was none.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.engines import async_io
from tests.engines.configs import OPERATORS

# The library that each builder makes.
LIBRARIES = {"FusedAdamBuilder": "fused_adam", "CPUAdamBuilder": "cpu_adam", "CPULionBuilder": "cpu_lion"}
ASYNC_IO = "AsyncIOBuilder"  # built in a quicker way, and first


def folder() -> Path:
    """Where operators are built.

    They are built anew whenever an include path differs: two environments that share torch's default folder would
    rebuild each other's, for minutes each time. So every environment has its own.
    """
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix) / "torch_extensions")


def are_built(*optimizers: str) -> bool:
    """Whether the operators that these ``optimizers`` of cases need (if any) are there. Waits for a build under way."""
    needed = {OPERATORS[name] for name in optimizers if name in OPERATORS}
    if not needed or not folder().exists():
        return not needed
    with _building(fcntl.LOCK_SH):
        return all(_library(LIBRARIES[builder]).exists() for builder in needed)


def has_async_io() -> bool:
    """Whether DeepSpeed's asynchronous files, by which it offloads to NVMe, are there. Waits for a build under way."""
    if not folder().exists():
        return False
    with _building(fcntl.LOCK_SH, async_io.NAME):
        return async_io.library(folder()).exists()


def build(builders: Sequence[str] = ()) -> None:
    """Build the operators that are missing, one after the other, each in a process of its own."""
    folder().mkdir(parents=True, exist_ok=True)
    wanted = builders or (ASYNC_IO, *LIBRARIES)
    with _building(fcntl.LOCK_EX):
        if ASYNC_IO in wanted:
            with _building(fcntl.LOCK_EX, async_io.NAME):
                _build_async_io()
        for builder in wanted:
            name = LIBRARIES.get(builder)
            if name is None or _library(name).exists():
                continue
            script = f"from tests.engines.zygote import load_operator; load_operator({builder!r})"
            environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder()), "DS_ACCELERATOR": "cpu"}
            subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def _build_async_io() -> None:
    """Where it cannot be built, its tests skip, and the others are built all the same."""
    if not async_io.library(folder()).exists():
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", "tests.engines.async_io", str(folder())]
        subprocess.run(command, check=False, env=environment)


def _library(name: str) -> Path:
    return folder() / name / f"{name}.so"


@contextmanager
def _building(how: int, what: str = "") -> Iterator[None]:
    with (folder() / f".building{what}").open("a") as lock:
        fcntl.flock(lock, how)
        yield


if __name__ == "__main__":
    build(sys.argv[1:])
