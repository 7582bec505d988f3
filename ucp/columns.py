"""Many frozen objects at once, from columns of their fields' values.

The constructor of a frozen dataclass takes microseconds, mostly to get around its own lock. A checkpoint of thousands
of small tensors is read in less time than thousands of those take. So what is described in columns is made by columns.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import fields
from itertools import count, repeat
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
R = TypeVar("R", bound=tuple[Any, ...])


def made_of(kind: type[T], many: int, *columns: Iterable[Any]) -> list[T]:
    """So many objects of a dataclass with slots and without ``__post_init__``. columns: the values of all its fields,
    in their order; one that is `itertools.repeat` gives all objects the same.

    Raises TypeError for another class, and ValueError for another number of fields or of values.
    """
    names: Sequence[str] = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if hasattr(kind, "__post_init__") or not set(names) <= set(getattr(kind, "__slots__", ())):
        raise TypeError(f"{kind.__name__} is no dataclass with slots and nothing but fields")
    if len(names) != len(columns):
        raise ValueError(f"{kind.__name__} has {len(names)} fields, and there are {len(columns)} columns")
    out = list(map(object.__new__, repeat(kind, many)))
    for name, column in zip(names, columns, strict=True):
        if not isinstance(column, repeat) and len(column) != many:  # type: ignore[arg-type]
            raise ValueError(f"there are {len(column)} values of {name} for {many} objects")  # type: ignore[arg-type]
        deque(map(getattr(kind, name).__set__, out, column), 0)
    return out


def tuples_of(kind: type[R], *columns: Iterable[Any]) -> list[R]:
    """Named tuples from the columns of all their fields, in their order, the first of which is as long as there are
    tuples. Others may be `itertools.repeat`.

    Raises TypeError for another number of fields.
    """
    if len(kind._fields) != len(columns):  # type: ignore[attr-defined]
        raise TypeError(f"{kind.__name__} has {len(kind._fields)} fields, not {len(columns)}")  # type: ignore[attr-defined]
    return list(map(tuple.__new__, repeat(kind), zip(*columns, strict=False)))


def different(many: Iterable[T]) -> tuple[list[T], NDArray[np.int64]]:
    """The objects that are not the same one, each once, and (n,) which of them each of the many is."""
    held = list(many)
    ids = list(map(id, held))
    objects = dict(zip(ids, held, strict=True))
    numbers = {found: k for k, found in enumerate(objects)}
    return list(objects.values()), np.fromiter(map(numbers.__getitem__, ids), np.int64, len(ids))


def numbered(values: Iterable[Hashable]) -> NDArray[np.int64]:
    """(n,) a number for each value, the same for equal ones. They are given out in order, from 0 on."""
    numbers: defaultdict[Hashable, int] = defaultdict(count().__next__)
    return np.array(list(map(numbers.__getitem__, values)), np.int64)


def firsts(numbers: NDArray[np.int64]) -> list[int]:
    """Where each number is for the first time, of numbers that were given out in that order, from 0 on."""
    highest = np.maximum.accumulate(np.concatenate([np.full(1, -1), numbers]))
    return np.flatnonzero(np.diff(highest)).tolist()
