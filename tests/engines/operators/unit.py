"""Sources of DeepSpeed's operators as one unit, which is compiled in a fraction of the time.

DeepSpeed compiles each source by itself, and each takes in all of torch's headers. Here they take in the part that they
use (the folder beside this file), once.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

_CONSTANT = re.compile(r"^(?:static )?const [\w:]+ (c_\w+) =", re.MULTILINE)


def library(folder: Path, name: str) -> Path:
    """The file of the operator ``name``, for these releases alone."""
    return folder / name / f"{name}-{version('deepspeed')}-{version('torch')}.so"


def lines(name: str, sources: Sequence[Path]) -> list[str]:
    """Those of one operator's sources in a unit, where each may have constants of the same names."""
    out = [f"#undef TORCH_EXTENSION_NAME\n#define TORCH_EXTENSION_NAME {name}"]
    for number, source in enumerate(sources):
        constants = _CONSTANT.findall(source.read_text())
        out += [f"#define {constant} {constant}_{name}_{number}" for constant in constants]
        out += [f'#include "{source}"', *(f"#undef {constant}" for constant in constants)]
    return out


def compile_unit(text: Sequence[str], options: Sequence[str], includes: Sequence[Path], to: Path) -> None:
    """Make the library ``to`` of a unit's lines. Raises CalledProcessError where that fails."""
    import torch

    to.parent.mkdir(parents=True, exist_ok=True)
    unit, unfinished = to.parent / "unit.cpp", to.parent / "unfinished.so"
    unit.write_text("\n".join(text) + "\n")
    of_torch = Path(torch.__file__).parent
    system = [of_torch / "include", of_torch / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    command = [
        *("c++", *options, "-w", "-std=c++20", "-fPIC", "-shared", "-fopenmp"),
        *(f"-I{place}" for place in (Path(__file__).parent, *includes)),
        *(f"-isystem{place}" for place in system),
        *(str(unit), "-o", str(unfinished), f"-L{of_torch / 'lib'}"),
        *("-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"),
    ]
    subprocess.run(command, check=True)
    os.replace(unfinished, to)


def use(builder: str, name: str, path: Path) -> None:
    """Have DeepSpeed's class ``builder`` give the operator ``name`` from this file, in this process and its forks.
    Where there is no such file, DeepSpeed builds it by itself."""
    for module in list(sys.modules.values()):  # the accelerator may have found a builder of its own
        other: Any = getattr(module, builder, None)
        if isinstance(other, type):
            other.load = _loader(other.load, name, path)  # type: ignore[attr-defined]


def _loader(own: Callable[..., ModuleType], name: str, path: Path) -> Callable[..., ModuleType]:
    def load(self: Any, verbose: bool = True) -> ModuleType:
        return _module(name, path) if path.exists() else own(self, verbose)

    return load


@cache
def _module(name: str, path: Path) -> ModuleType:
    loader = ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module: Any = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
