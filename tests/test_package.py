"""The built package, installed by itself: what comes along, the commands, and what a user's type checker sees."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests import package, rendering

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta; build_meta.build_{}('dist')"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_and_works(tmp_path: Path, kind: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tree)
    for name in ("ucp", "universal_checkpoint"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD.format(kind)], cwd=tree, check=True, capture_output=True)
    (built,) = (tree / "dist").iterdir()
    if kind == "sdist":
        with tarfile.open(built) as sdist:
            assert {"CHANGELOG.md", "LICENSE", "README.md"} <= {name.partition("/")[2] for name in sdist.getnames()}
    told = rendering.description(built)
    assert told.startswith("# ")
    assert rendering.relative_links(told) == []
    assert "All commands, and what to do when something is wrong (`ucp/cli/README.md`)" in told
    package.check(built)


def test_the_page_of_an_index_names_files_where_the_readme_has_links() -> None:
    told = runpy.run_path(str(ROOT / "setup.py"))["page"]
    code = "```\n[k](v)\n```\n"
    text = f"# T\n\nSee [a](ucp/a.md#b), [ucp/x](ucp/x/README.md), [w](https://w.org), [c](#c).\n![p](q.png)\n{code}"
    assert told(text).partition("repository.\n\n")[2] == (
        f"See a (`ucp/a.md`), `ucp/x/README.md`, [w](https://w.org), [c](#c).\n*p*\n{code}"
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(rendering.relative_links(readme)) > 10
    assert rendering.relative_links(told(readme)) == []
    assert "| `ucp/specs/README.md` |" in told(readme)
