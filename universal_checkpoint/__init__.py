"""This project under a name that nobody else has: ``import universal_checkpoint as ucp``.

It is the same package, module for module: a class is the same class under both names. What it does not do is make room
for RAPIDS' ucx-py, which also imports as ``ucp``: the two still need an environment each.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

import ucp

_NAME = __name__


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


sys.meta_path.insert(0, _Alias())
sys.modules[_NAME] = ucp
