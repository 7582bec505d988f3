"""For programs that tests start: python imports this at its start, from this folder of their PYTHONPATH.

DeepSpeed compiles an operator for shared memory when a program first joins a process group on the CPU. That takes
minutes, serves inference alone, and a build that is killed leaves a lock at which every later program waits. The tests'
programs do without, as the ranks of the tests do (`tests.engines.zygote`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _WithoutSharedMemory(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "deepspeed.ops":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                module.__compatible_ops__["deepspeed_shm_comm"] = False

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _WithoutSharedMemory())
