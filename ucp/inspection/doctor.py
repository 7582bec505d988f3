"""What an issue report needs: versions and what of them the tests have run, the accelerator, compilers, a folder."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ucp._neighbours import installed_ucx_py
from ucp.errors import BadArgument
from ucp.tested import TESTED
from ucp.units import bytes_text, counted
from ucp.version import version as own_version

_PACKAGES = ("torch", "deepspeed", "numpy", "transformers", "accelerate", "pytorch-lightning", "peft", "safetensors")


@dataclass(frozen=True)
class Fact:
    """One line: what was looked at, what was found, and a remark that may be empty."""

    name: str
    found: str
    remark: str = ""


def examine(folder: str | os.PathLike[str]) -> list[Fact]:
    """Look at this environment and at a folder. Raises BadArgument if it is not a folder."""
    place = os.fspath(folder)
    if not os.path.isdir(place):
        raise BadArgument(f"{place}: is no folder; name one that checkpoints are or will be in")
    return [*_versions(), *_neighbours(), *_accelerator(), _compiler(), *_builds(), *_storage(place)]


def _versions() -> Iterator[Fact]:
    yield Fact("universal-checkpoint", own_version())
    yield Fact("python", platform.python_version(), f"{platform.system()} {platform.machine()}")
    for package in _PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            yield Fact(package, "not installed")
            continue
        tested = TESTED.get(package)
        ran = tested is None or found.partition("+")[0] in tested
        yield Fact(package, found, "" if tested is None else _remark(ran, tested))


def _neighbours() -> Iterator[Fact]:
    """Another package that imports as ``ucp``, beside which this one goes by its other name."""
    for folder, name in installed_ucx_py(sys.path):
        yield Fact("another 'ucp'", name, f"RAPIDS', in {folder}; 'import universal_checkpoint as ucp' is this project")


def _remark(ran: bool, tested: tuple[str, ...]) -> str:
    return "the tests have run with it" if ran else f"the tests have run with {', '.join(tested)}"


def _accelerator() -> Iterator[Fact]:
    try:
        import torch
    except ImportError as error:
        yield Fact("accelerator", "unknown", f"torch can't be imported: {error}")
        return
    if not torch.cuda.is_available():
        yield Fact("accelerator", "none", "computes on the CPU")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Fact(f"accelerator {index}", properties.name, bytes_text(properties.total_memory))


def _compiler() -> Fact:
    """Whether DeepSpeed can compile its optimizers at their first use."""
    found = [os.environ.get("CXX") or "c++", "ninja"]
    missing = [name for name in found if shutil.which(name) is None]
    if missing:
        return Fact("compiled optimizers", "no", f"{' and '.join(missing)} not found: FusedAdam, CPUAdam need them")
    return Fact("compiled optimizers", "yes", f"{', '.join(found)} found")


def _builds() -> Iterator[Fact]:
    """Compilations that are under way, or were killed: torch then leaves a lock behind, and whoever wants the same
    extension waits for it without a word, DeepSpeed already where an engine is made."""
    for lock in sorted(_builds_folder().glob("**/lock")):
        try:
            minutes = max(0, int(time.time() - lock.lstat().st_mtime) // 60)
        except OSError:
            continue  # it has just ended
        remark = f"since {counted(minutes, 'minute')}; if no compiler runs, DeepSpeed waits for ever: delete '{lock}'"
        yield Fact("being compiled", lock.parent.name, remark)


def _builds_folder() -> Path:
    """Where torch compiles extensions."""
    if own := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def _storage(place: str) -> Iterator[Fact]:
    usage = shutil.disk_usage(place)
    yield Fact(f"free in {place}", bytes_text(usage.free), f"of {bytes_text(usage.total)}")
    yield Fact(f"direct I/O in {place}", *_direct(place))


def _direct(place: str) -> tuple[str, str]:
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return "no", "this system has none"
    try:
        handle, path = tempfile.mkstemp(prefix=".ucp-doctor-", dir=place)
    except OSError as error:
        return "unknown", f"nothing can be written there: {error.strerror}"
    os.close(handle)
    try:
        os.close(os.open(path, os.O_RDONLY | flag))
    except OSError as error:
        return "no", str(error.strerror)
    finally:
        os.unlink(path)
    return "yes", ""
