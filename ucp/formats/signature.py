"""Keywords that formats declare, shown in the signatures of the functions that take them.

A function takes the formats' own options as ``**``, so its signature would not tell what they are. Once it is
decorated, it shows each of them to ``help``, notebooks and tests. How it is called does not change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ucp import formats
from ucp.formats.base import WriteTarget

F = TypeVar("F", bound=Callable[..., Any])


def showing(keywords: Mapping[str, Any]) -> Callable[[F], F]:
    """A decorator. keywords: name -> default, of those that the function takes as ``**``."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = list(signature.parameters.values())
        kind = inspect.Parameter.KEYWORD_ONLY
        added = [inspect.Parameter(name, kind, default=default) for name, default in keywords.items()]
        shown = signature.replace(parameters=[*own[:-1], *added, own[-1]])
        function.__signature__ = shown  # type: ignore[attr-defined]
        return function

    return decorate


def defaults_of(targets: Iterable[WriteTarget] | None = None) -> dict[str, Any]:
    """The options of these targets, or of all built-in ones, with their defaults."""
    if targets is None:
        targets = [one for known in formats.built_in() for one in known.targets]
    return {option.name: option.default for one in targets for option in one.options}
