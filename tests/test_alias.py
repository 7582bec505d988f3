"""``universal_checkpoint`` is ``ucp``, module for module, whichever is imported first, and beside RAPIDS' ucx-py."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ucp

ROOT = Path(__file__).parents[1]
OLDER = ROOT / "tests/formats/deepspeed/older/0.14.4-z1-bf16"

ALIKE = """
assert alias is ucp and alias_names is names and names.__spec__.name == "ucp.storage.names"
import universal_checkpoint.errors, ucp.errors
assert universal_checkpoint.errors.UcpError is ucp.errors.UcpError is alias.UcpError
"""
OURS = "import ucp, ucp.storage.names as names"
ALIAS = "import universal_checkpoint as alias, universal_checkpoint.storage.names as alias_names"


@pytest.mark.parametrize("order", [(OURS, ALIAS), (ALIAS, OURS)], ids=["ucp first", "alias first"])
def test_it_is_the_same_package(order: tuple[str, str]) -> None:
    subprocess.run([sys.executable, "-c", "\n".join([*order, ALIKE])], check=True)


def rapids(folder: Path) -> Path:
    """A distribution with the names of ucx-py's, as an installer leaves it."""
    package = folder / "ucp"
    (package / "_libs").mkdir(parents=True)
    (package / "__init__.py").write_text("from .core import get_address\n")
    (package / "core.py").write_text("def get_address():\n    return 'theirs'\n")
    (folder / "ucx_py_cu12-0.41.0.dist-info").mkdir()
    (folder / "ucx_py_cu12-0.41.0.dist-info/METADATA").write_text("Name: ucx-py-cu12\nVersion: 0.41.0\n")
    return folder


def with_path(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)


SAVES = """
import torch, universal_checkpoint as ucp
there = {place!r}
ucp.async_save({{"w": torch.arange(3.0)}}, there).result()  # written by a process of its own
with ucp.open(there) as checkpoint:
    print(checkpoint.read("w").tolist(), ucp.__file__)
"""


def test_beside_ucx_py_it_is_this_project(tmp_path: Path) -> None:
    theirs = rapids(tmp_path / "rapids")
    assert with_path("import ucp; print(ucp.get_address())", theirs, ROOT).stdout == "theirs\n"
    done = with_path(SAVES.format(place=str(tmp_path / "made")), theirs, ROOT)
    assert done.stdout == f"[0.0, 1.0, 2.0] {ROOT / 'ucp/__init__.py'}\n", done.stderr
    command = f"import sys; from universal_checkpoint.cli.main import main; sys.exit(main(['verify', {str(OLDER)!r}]))"
    done = with_path(command, theirs, ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_commands_run_as_modules_beside_it(tmp_path: Path) -> None:
    """As launchers start them: torchrun -m …; and what an issue report has says that there are two."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (rapids(tmp_path / "rapids"), ROOT)))}
    command = [sys.executable, "-m", "universal_checkpoint.cli.convert", "--quiet", str(OLDER), str(tmp_path / "made")]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "made/ucp.json").exists()
    command = [sys.executable, "-m", "universal_checkpoint.cli.main", "doctor"]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert "another 'ucp'\tucx_py_cu12-0.41.0\tRAPIDS', in " in done.stdout, done.stderr


def test_where_theirs_is_imported_already_it_says_so(tmp_path: Path) -> None:
    theirs = rapids(tmp_path / "rapids")
    done = with_path("import ucp, universal_checkpoint", theirs, ROOT)
    assert f"another package named 'ucp' ({theirs / 'ucp/__init__.py'})" in done.stderr
    assert "import universal_checkpoint first" in done.stderr


def test_where_theirs_has_overwritten_ours_it_says_so(tmp_path: Path) -> None:
    theirs = rapids(tmp_path / "rapids")
    shutil.copytree(ROOT / "universal_checkpoint", theirs / "universal_checkpoint")
    done = with_path("import universal_checkpoint", theirs)
    assert f"{theirs / 'ucp'} is another package named 'ucp'" in done.stderr
    # Installed after ours: of our files only those are gone whose names theirs has, too.
    shutil.copy(ROOT / "ucp/_neighbours.py", theirs / "ucp")
    done = with_path("import universal_checkpoint", theirs)
    assert f"{theirs / 'ucp'} is another package named 'ucp'" in done.stderr


def test_by_its_other_name_it_says_how(tmp_path: Path) -> None:
    done = with_path("import ucp", ROOT, rapids(tmp_path / "rapids"))
    assert "'import universal_checkpoint as ucp' is this project all the same" in done.stderr


def test_a_type_checker_finds_every_public_name_under_the_other_one() -> None:
    tree = ast.parse((ROOT / "universal_checkpoint/__init__.py").read_text(encoding="utf-8"))
    told = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "ucp"]
    assert sorted(alias.asname or "" for node in told for alias in node.names) == sorted(ucp.__all__)
