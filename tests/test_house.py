"""The house's rules, read from the source: floors, no circles, no private names of others, short files and functions.

The exceptions only shrink: one that is no longer needed fails, too.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = {
    8: ("ucp", "ucp.cli", "ucp.dcp"),
    7: ("ucp.deepspeed", "ucp.torchdist", "ucp.megatron", "ucp.memory", "ucp.elastic"),
    6: ("ucp.loading", "ucp.saving", "ucp.changes", "ucp.conversion", "ucp.merging", "ucp.repair", "ucp.inspection"),
    5: ("ucp.checkpoint", "ucp.job", "ucp.run_folder", "ucp.settings"),
    4: ("ucp.formats", "ucp.transfer"),
    3: ("ucp.catalog", "ucp.spec", "ucp.specs"),
    2: ("ucp.parallel", "ucp.storage", "ucp.logical"),
    1: (
        "ucp.geometry",
        "ucp.layers",
        "ucp.errors",
        "ucp.lazy",
        "ucp.limits",
        "ucp.printable",
        "ucp.tested",
        "ucp.units",
        "ucp.progress",
        "ucp.columns",
        "ucp.interpreter",
        "ucp.installed",
        "ucp.version",
        "ucp._neighbours",
    ),
}

# room -> rooms above it that it imports; each is a debt.
UPWARD: set[tuple[str, str]] = set()
CIRCLES: set[frozenset[str]] = set()
SAME_CLASSES: set[str] = set()

# Private names of ours that DeepSpeed, torch or others have, too, and which tests use as theirs.
FOREIGN = {"_config", "_metadata", "_tensor"}

TOP_LEVEL = {".ci", ".gitignore", "CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
TOP_LEVEL |= {"scripts", "specs", "tests", "ucp", "universal_checkpoint"}

LINES_OF_A_FILE = 450
LINES_OF_A_FUNCTION = 60


@cache
def modules() -> dict[str, list[ast.AST]]:
    """The nodes of the package's modules by name, read when the first test asks, which is in one worker alone."""
    out = {}
    for path in sorted((ROOT / "ucp").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = nodes_of(path)
    return out


def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def room(module: str) -> str:
    """The first two parts of a module's name: a room, or a module that stands by itself."""
    return ".".join(module.split(".")[:2])


def floor(module: str) -> int:
    return next(number for number, rooms in FLOORS.items() if room(module) in rooms)


def imported(nodes: list[ast.AST]) -> Iterator[tuple[str, str, str]]:
    """(module, name in it or nothing, the name here) of everything of ours that a module imports, wherever."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "ucp":
                    yield alias.name, "", alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ucp":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in modules():
                    yield whole, "", alias.asname or alias.name
                else:
                    yield node.module, alias.name, alias.asname or alias.name


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def test_every_room_has_a_floor() -> None:
    known = {name for rooms in FLOORS.values() for name in rooms}
    assert {room(module) for module in modules()} <= known


def test_rooms_import_from_floors_below_only() -> None:
    found = {
        (room(module), room(other))
        for module, nodes in modules().items()
        for other, _, _ in imported(nodes)
        if floor(other) > floor(module)
    }
    assert found == UPWARD


def test_no_circles_between_rooms() -> None:
    uses: dict[str, set[str]] = defaultdict(set)
    for module, nodes in modules().items():
        if module != "ucp":  # the public face is imported by whoever imports anything
            uses[room(module)] |= {
                room(other) for other, _, _ in imported(nodes) if room(other) not in (room(module), "ucp")
            }
    found = {frozenset((a, b)) for a in uses for b in reached(uses, a) if a != b and a in reached(uses, b)}
    assert found == CIRCLES


def reached(uses: dict[str, set[str]], start: str) -> set[str]:
    out: set[str] = set()
    left = [start]
    while left:
        for other in uses.get(left.pop(), ()):
            if other not in out:
                out.add(other)
                left.append(other)
    return out


def test_no_private_name_of_another_module() -> None:
    found = []
    for module, nodes in modules().items():
        here = {}
        for other, name, alias in imported(nodes):
            if is_private(name):
                found.append(f"{module}: from {other} import {name}")
            if not name:
                here[alias] = other
        for node in nodes:
            if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in here:
                found.append(f"{module}: {ast.unparse(node)}")
    assert found == []


def privates() -> set[str]:
    """Every name with a leading underscore that the package gives to something of its own."""
    nodes = [node for found in modules().values() for node in found]
    named = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    held = {
        n.attr
        for n in nodes
        if isinstance(n, ast.Attribute)
        and isinstance(n.ctx, ast.Store)
        and getattr(n.value, "id", "") in ("self", "cls")
    }
    return {name for name in named | stored | held if is_private(name)}


def by_its_text(function: ast.expr) -> bool:
    """Whether this takes a name as text: getattr, setattr and their like, and patch.object."""
    if isinstance(function, ast.Name):
        return function.id.endswith("attr")
    if not isinstance(function, ast.Attribute):
        return False
    return function.attr.endswith("attr") or (
        function.attr == "object" and ast.unparse(function).endswith("patch.object")
    )


def test_tests_and_scripts_use_no_private_name() -> None:
    """Nor of each other: neither imported, nor reached, nor patched, nor in a program that a test starts."""
    known = privates() - FOREIGN
    found = []
    for path in sorted((*(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"))):
        nodes = nodes_of(path)
        here = set()
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("ucp", "tests", "scripts"):
                here |= {alias.asname or alias.name for alias in node.names}
                found += [f"{path.name}: import {alias.name}" for alias in node.names if is_private(alias.name)]
        for node in nodes:
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                owner = ast.unparse(node.value)
                if owner in here or (owner not in ("self", "cls") and node.attr in known):
                    found.append(f"{path.name}:{node.lineno}: {owner}.{node.attr}")
            elif isinstance(node, ast.Call) and by_its_text(node.func):
                names = {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
                found += [f"{path.name}:{node.lineno}: {name} by its text" for name in sorted(names & known)]
            elif isinstance(node, ast.Constant) and "from ucp" in str(node.value):
                names = known & set(re.findall(r"\.(_[a-z]\w*)", str(node.value)))
                found += [f"{path.name}:{node.lineno}: {name} in a program" for name in sorted(names)]
    assert found == []


def test_files_are_short() -> None:
    counts = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "ucp").rglob("*.py")
    }
    assert {path for path, count in counts.items() if count > LINES_OF_A_FILE} == set()


def test_functions_are_short() -> None:
    found = {
        f"{module}.{node.name}"
        for module, nodes in modules().items()
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > LINES_OF_A_FUNCTION
    }
    assert found == set()


def test_no_module_hides_behind_another_name() -> None:
    found = [
        f"{module}: {other} as {alias}"
        for module, nodes in modules().items()
        for other, name, alias in imported(nodes)
        if not name and alias not in (other, other.rpartition(".")[2])
    ]
    assert found == []


def test_no_class_has_the_name_of_another_rooms() -> None:
    """Private ones, too; below `ucp.formats` each format is a room of its own."""
    places: dict[str, set[str]] = defaultdict(set)
    for module, nodes in modules().items():
        for node in nodes[0].body:
            if isinstance(node, ast.ClassDef):
                places[node.name].add(".".join(module.split(".")[: 3 if room(module) == "ucp.formats" else 2]))
    assert {name for name, rooms in places.items() if len(rooms) > 1} == SAME_CLASSES


def test_nothing_stands_at_the_top_without_a_reason() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a clone")
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert {name.split("/")[0] for name in kept if name} == TOP_LEVEL
