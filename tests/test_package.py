"""The built package, installed by itself: what comes along, the commands, and what a user's type checker sees."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests import package

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta; build_meta.build_{}('dist')"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_and_works(tmp_path: Path, kind: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tree)
    for name in ("ucp", "universal_checkpoint"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD.format(kind)], cwd=tree, check=True, capture_output=True)
    (built,) = (tree / "dist").iterdir()
    if kind == "sdist":
        with tarfile.open(built) as sdist:
            assert {"CHANGELOG.md", "LICENSE", "README.md"} <= {name.partition("/")[2] for name in sdist.getnames()}
    package.check(built)
