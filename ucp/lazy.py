"""A package's public names, each imported from its module when it is first asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from ucp.interpreter import no_collections


def names_of(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The package's ``__getattr__``.

    Parameters
    ----------
    package
        its name.
    homes
        each public name, and the module that has it.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        from importlib import import_module

        with no_collections():  # one takes longer than all the modules
            value = getattr(import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return find
