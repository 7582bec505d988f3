"""What ranks do in test_ranks.py."""

from __future__ import annotations

from ucp.errors import Mismatch, UcpError
from ucp.job import ranks


def distinct(values: list[str]) -> tuple[list[str], list[int]]:
    """values: what each rank says."""
    return ranks.distinct(values[ranks.rank()])


def refused_on_all_ranks() -> tuple[str, str]:
    """What this rank raises where every rank has a long refusal of its own."""

    def refuse() -> None:
        names = ", ".join(f"'of rank {ranks.rank()}, {k}'" for k in range(99))
        raise Mismatch(f"nothing was loaded: {names}")

    try:
        ranks.all_or_none(refuse)
    except UcpError as error:
        return type(error).__name__, str(error)
    return "", ""
