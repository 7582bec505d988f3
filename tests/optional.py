"""Modules of tests that need a package which may not be installed."""

from __future__ import annotations

import importlib.util

import pytest


def skip_without(package: str) -> None:
    """Skip the calling module's tests where the package is not installed.

    Unlike ``pytest.importorskip``, it does not import the package: while tests are collected, each worker would spend
    seconds on that, whatever tests it then gets.
    """
    at_hand = all(importlib.util.find_spec(name) for name in _with_parents(package))
    if not at_hand:
        pytest.skip(f"needs {package}", allow_module_level=True)


def _with_parents(package: str) -> list[str]:
    parts = package.split(".")
    return [".".join(parts[: k + 1]) for k in range(len(parts))]
