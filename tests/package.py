"""A built wheel or sdist, installed by itself: ``python -m tests.package FILE``.

Into a folder of its own (``pip install --target``), which is then all of this project that an interpreter started
elsewhere sees. What it needs is taken from the environment that runs this, as `pip` would bring it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

OLDER = Path(__file__).parent / "formats/deepspeed/older/0.14.4-z1-bf16"
NEEDED = (
    "ucp/py.typed",
    "ucp/specs/llama.yaml",
    "ucp/cli/json.md",
    "ucp/deepspeed/README.md",
    "ucp/inspection/report/template.html",
    "universal_checkpoint/__init__.py",
    "universal_checkpoint/py.typed",
)
TYPED = """
import ucp

with ucp.open("x") as checkpoint:
    reveal_type(checkpoint)
    checkpoint.read(5)
ucp.opne("x")
"""
# Under its other name, with which it works beside RAPIDS' package.
ALIAS = TYPED.replace("import ucp", "import universal_checkpoint as ucp, universal_checkpoint.deepspeed")
ALIAS += "reveal_type(universal_checkpoint.deepspeed.attach)\nuniversal_checkpoint.deepspeed.attach()\n"
SEEN = ("ucp.checkpoint.Checkpoint", '"read" of "Checkpoint"', 'Module has no attribute "opne"')


def check(built: Path) -> None:
    """Raise where the built package does not install, lacks a file, or does not work."""
    with tempfile.TemporaryDirectory() as made:
        home = Path(made, "installed")
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
        run([*pip, "--no-build-isolation", "--target", str(home), str(built.resolve())], made)
        missing = [name for name in NEEDED if not (home / name).is_file()]
        if missing:
            raise SystemExit(f"{built}: lacks {', '.join(missing)}")
        environment = {**os.environ, "PYTHONPATH": str(home)}
        ours = run([sys.executable, "-c", "import ucp; print(ucp.__file__)"], made, environment)
        if not ours.startswith(str(home)):
            raise SystemExit(f"{built}: another ucp is imported ({ours.strip()})")
        for command in (
            ["ucp", "--version"],
            ["ucp", "doctor"],
            ["ucp", "verify", str(OLDER)],
            ["ucp", "report", str(OLDER), "-o", "report.html"],
            ["ucp-convert", str(OLDER), "universal"],
            ["ucp", "diff", str(OLDER), "universal"],
            ["ucp-spec", "check", "llama"],
        ):
            run([sys.executable, str(home / "bin" / command[0]), *command[1:]], made, environment)
        types = {"user.py": (TYPED, SEEN), "other.py": (ALIAS, (*SEEN, 'Missing positional argument "engine"'))}
        for name, (text, _) in types.items():
            Path(made, name).write_text(text, encoding="utf-8")
        mypy = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", *types],
            cwd=made,
            env={**environment, "MYPYPATH": str(home)},
            capture_output=True,
            text=True,
            check=False,
        )
        for name, (_, seen) in types.items():
            found = [line for line in mypy.stdout.splitlines() if line.startswith(name)]
            missing = [part for part in seen if not any(part in line for line in found)]
            if missing or mypy.stderr:
                raise SystemExit(f"{built}: a user's mypy does not see its types in {name}: {mypy.stdout}{mypy.stderr}")


def run(command: list[str], cwd: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    check(Path(sys.argv[1]))
