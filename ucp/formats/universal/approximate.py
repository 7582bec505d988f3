"""The manifest's ``approximate``: parameters that a repair has filled in, and how. A checkpoint without any has no such
entry."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ucp.catalog import Catalog
from ucp.errors import DamagedCheckpoint

NAME = "approximate"


def encode(catalog: Catalog) -> dict[str, Any]:
    return {NAME: dict(catalog.approximate)} if catalog.approximate else {}


def decode(path: str, body: Mapping[str, Any], parameters: Collection[str]) -> dict[str, str]:
    """The manifest's entry. Raises DamagedCheckpoint if it is malformed, or names something that is no parameter."""
    found = body.get(NAME, {})
    if not isinstance(found, dict) or not all(isinstance(how, str) and n in parameters for n, how in found.items()):
        raise DamagedCheckpoint(f"{path}: '{NAME}' should map parameters to how they were filled in")
    return found
