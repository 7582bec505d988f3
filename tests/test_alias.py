"""``universal_checkpoint`` is ``ucp``, module for module, whichever is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
