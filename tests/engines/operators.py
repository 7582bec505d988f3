"""DeepSpeed's native operators, which some optimizers need: are they built, and build them.

``python -m tests.engines.operators`` builds all of them, which takes minutes; the tests that need one skip until then.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.engines.configs import OPERATORS

# The library that each builder makes.
LIBRARIES = {"FusedAdamBuilder": "fused_adam", "CPUAdamBuilder": "cpu_adam", "CPULionBuilder": "cpu_lion"}


def folder() -> Path:
    """Where operators are built.

    They are built anew whenever an include path differs: two environments that share torch's default folder would
    rebuild each other's, for minutes each time. So every environment has its own.
    """
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix) / "torch_extensions")


def is_built(optimizer: str) -> bool:
    """Whether the operator that a case's ``optimizer`` needs (if any) is built, so that no test waits for that."""
    builder = OPERATORS.get(optimizer)
    if builder is None:
        return True
    name = LIBRARIES[builder]
    return (folder() / name / f"{name}.so").exists()


def build_all() -> None:
    """Build every operator that is missing, one after the other, each in a process of its own."""
    for builder, name in LIBRARIES.items():
        if (folder() / name / f"{name}.so").exists():
            continue
        script = f"from tests.engines.zygote import load_operator; load_operator({builder!r})"
        environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder()), "DS_ACCELERATOR": "cpu"}
        subprocess.run([sys.executable, "-c", script], check=True, env=environment)


if __name__ == "__main__":
    build_all()
