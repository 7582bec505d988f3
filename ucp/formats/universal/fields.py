"""A manifest's fields, checked as they are taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ucp.errors import DamagedCheckpoint
from ucp.geometry import Ints

LIMIT = 1 << 62
"""What no number in a manifest reaches."""


class Fields:
    """A manifest's fields, checked as they are taken."""

    def __init__(self, path: str, body: Mapping[str, Any]) -> None:
        self.path = path
        self.body = body

    def damaged(self, what: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"{self.path}: {what}")

    def _typed(self, name: str, kind: type) -> Any:
        value = self.body.get(name)
        if not isinstance(value, kind):
            raise self.damaged(f"'{name}' should be a {kind.__name__} and is {type(value).__name__}")
        return value

    def text(self, name: str) -> str:
        return self._typed(name, str)

    def mapping(self, name: str) -> dict[str, Any]:
        return self._typed(name, dict)

    def listing(self, name: str) -> list[Any]:
        return self._typed(name, list)

    def choice(self, name: str, allowed: Sequence[str]) -> str:
        value = self.body.get(name)
        if value not in allowed:
            raise self.damaged(f"'{name}' is {value!r}; known are {', '.join(allowed)}")
        return str(value)

    def column(self, table: str, name: str, kind: Any) -> list[Any]:
        values = self.mapping(table).get(name)
        if not isinstance(values, list) or not all(issubclass(found, kind) for found in set(map(type, values))):
            raise self.damaged(f"'{table}.{name}' is missing or holds something else than it should")
        return values

    def integers(self, table: str, name: str, count: int | None = None, below: int = LIMIT) -> Ints:
        """A column of integers from 0 to ``below``, exclusive."""
        values = self.column(table, name, int)
        if count is not None and len(values) != count:
            raise self.damaged(f"'{table}.{name}' has {len(values)} entries where {count} are expected")
        if values and (min(values) < 0 or max(values) >= below):
            raise self.damaged(f"'{table}.{name}' holds a number outside 0 to {below - 1}")
        return np.array(values, np.int64).reshape(len(values))
