"""The installed release."""

from __future__ import annotations

from functools import cache


@cache
def version() -> str:
    """The distribution's version; '0+unknown' in a source tree that was never installed."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed  # imported late: it takes longer than most commands' start

    try:
        return installed("universal-checkpoint")
    except PackageNotFoundError:
        return "0+unknown"
