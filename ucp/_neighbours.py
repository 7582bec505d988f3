"""RAPIDS' ucx-py is another project whose package is also called ``ucp``; the two cannot share a process.

Python imports whichever of the two comes first, so one of them would silently be the other. Where this package is the
one that is found, it says so at import instead. No distribution metadata is parsed: one listing of each folder on the
path tells, at a cost well below a millisecond each.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator

# What ucx-py has in its package folder and this project will not: its compiled core. Both installed into one folder
# overwrite each other file by file.
_MARKS = ("_libs", "core.py", "comm.py", "endpoint_reuse.py")


def refuse_ucx_py(path: Iterable[str] | None = None, package: str | None = None) -> None:
    """Raise ImportError where ucx-py is installed beside this package.

    path: the folders to look in (default: ``sys.path``; none under the alias, which finds this package by its place).
    package: this package's own folder.
    """
    if path is None:
        path = () if "universal_checkpoint" in sys.modules else sys.path
    package = package or os.path.dirname(os.path.abspath(__file__))
    marks = [mark for mark in _MARKS if os.path.exists(os.path.join(package, mark))]
    if marks:
        raise ImportError(
            f"{package} holds files of RAPIDS' ucx-py ({', '.join(marks)}): it also installs a package named 'ucp', "
            "and the two overwrote each other; uninstall both, and install universal-checkpoint in an environment of "
            "its own",
            name="ucp",
        )
    for folder, _ in installed_ucx_py(path):
        raise ImportError(
            f"RAPIDS' ucx-py is installed in {folder} and also imports as 'ucp', so only one of the two can be "
            "imported in a process; 'import universal_checkpoint as ucp' is this project all the same, where "
            "theirs is in a folder of its own; or use an environment without it ('pip uninstall ucx-py')",
            name="ucp",
        )


def installed_ucx_py(path: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Where on this path ucx-py is installed, and what each installation calls itself: ``ucx_py_cu12-0.41.0``."""
    for folder in path:
        try:
            names = os.listdir(folder or os.curdir)
        except OSError:
            continue  # a zip archive, or an entry that does not exist
        for name in sorted(names):
            # Distributions are ucx_py, ucx_py_cu11, ucx_py_cu12, ...; folder names spell the dash as an underscore.
            if name.startswith("ucx_py") and name.endswith((".dist-info", ".egg-info")):
                yield folder, os.path.splitext(name)[0]
