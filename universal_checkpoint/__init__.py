"""This project under a name that nobody else has: ``import universal_checkpoint as ucp``.

It is the same package, module for module: a class is the same class under both names. RAPIDS' ucx-py also imports as
``ucp``. Where it is found first, this takes this project's own folder all the same, in every process that has not
imported theirs; from then on ``ucp`` is this project in that process. Both in one folder overwrite each other's files,
which no name can help: there the import says so.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what a type checker finds under this name; below, one module takes the other's place
    from ucp import Checkpoint as Checkpoint
    from ucp import ConversionReport as ConversionReport
    from ucp import Layout as Layout
    from ucp import MergeReport as MergeReport
    from ucp import ParameterInfo as ParameterInfo
    from ucp import ParamGroup as ParamGroup
    from ucp import TrainingState as TrainingState
    from ucp import UcpError as UcpError
    from ucp import __version__ as __version__
    from ucp import affine_map as affine_map
    from ucp import async_save as async_save
    from ucp import convert as convert
    from ucp import digest as digest
    from ucp import load as load
    from ucp import load_training as load_training
    from ucp import merge as merge
    from ucp import open as open  # noqa: A004 (as in `ucp`)
    from ucp import save as save
    from ucp import save_training as save_training

_NAME = __name__
_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _own() -> ModuleType:
    """This project's ``ucp``, from beside this folder, whatever comes first on the path."""
    home, found = os.path.join(_HOME, "ucp"), sys.modules.get("ucp")
    if found is not None and hasattr(found, "_neighbours"):
        return found
    if found is not None:
        raise ImportError(
            f"this process has imported another package named 'ucp' ({getattr(found, '__file__', None)}), such as "
            "RAPIDS' ucx-py; import universal_checkpoint first, or in a process that does not need the other one",
            name=_NAME,
        )
    overwritten = ImportError(
        f"{home} is another package named 'ucp', such as RAPIDS' ucx-py, which has overwritten this project's; "
        "install universal-checkpoint into a folder of its own (pip install --target), or an environment",
        name=_NAME,
    )
    if os.path.isdir(home) and not os.path.exists(os.path.join(home, "_neighbours.py")):
        raise overwritten
    spec = importlib.machinery.PathFinder.find_spec("ucp", [_HOME]) or importlib.util.find_spec("ucp")
    if spec is None or spec.loader is None:
        raise ImportError(f"{_HOME} has no package 'ucp' beside {_NAME}", name=_NAME)
    module = sys.modules["ucp"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "_neighbours"):  # theirs came later: our files are there, but for those of their names
            raise overwritten
    except BaseException:
        del sys.modules["ucp"]
        raise
    return module


ucp = _own()


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """``universal_checkpoint.x`` is the module ``ucp.x``, which keeps its own spec."""

    def __init__(self) -> None:
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{_NAME}."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module("ucp" + spec.name.removeprefix(_NAME))
        self._specs[module.__name__] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It was imported by its own name already."""
        module.__spec__ = self._specs.pop(module.__name__)

    def get_code(self, fullname: str) -> CodeType | None:
        """What ``python -m universal_checkpoint.cli.convert`` runs, as launchers start it."""
        name = "ucp" + fullname.removeprefix(_NAME)
        spec = importlib.util.find_spec(name)
        loader = None if spec is None else spec.loader
        return loader.get_code(name) if isinstance(loader, importlib.abc.InspectLoader) else None


sys.meta_path.insert(0, _Alias())
sys.modules[_NAME] = ucp
