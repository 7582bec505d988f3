"""The installed release."""

from __future__ import annotations

from functools import cache

from ucp import installed

_PACKAGE = "universal-checkpoint"


@cache
def version() -> str:
    """The distribution's version; '0+unknown' in a source tree that was never installed."""
    known = installed.version_of(_PACKAGE)
    if known is not None:
        return known
    from importlib.metadata import PackageNotFoundError  # late: it takes longer than most commands' start
    from importlib.metadata import version as found

    try:
        return found(_PACKAGE)
    except PackageNotFoundError:
        return "0+unknown"
