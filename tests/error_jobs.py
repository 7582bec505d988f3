"""What ranks do in test_errors.py: each returns the error that it got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import ucp
from ucp.errors import Position, SpecError
from ucp.job import ranks

Seen = tuple[str, str, list[Any], str]  # class, text, position, picture


def _seen(work: Callable[[], object]) -> Seen:
    try:
        work()
    except SpecError as error:
        at = error.position
        return type(error).__name__, error.whole, [] if at is None else [at.file, at.line, at.column], error.picture
    except Exception as error:  # noqa: BLE001 - the test compares it
        return type(error).__name__, error.whole, [], ""
    return "", "", [], ""


def refused_on_one_rank() -> Seen:
    def work() -> None:
        if ranks.rank() == 1:
            raise SpecError("no such axis", Position("my.yaml", 1, 2), "picture")

    return _seen(lambda: ranks.all_or_none(work))


def loads_with_spec(path: str, spec: str) -> Seen:
    return _seen(lambda: ucp.load({"w": torch.ones(2)}, path, spec=spec))
