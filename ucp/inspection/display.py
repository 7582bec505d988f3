"""Numbers and cuts in the words that people read."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np

from ucp.geometry import Blocks, Shape, numel, row_major
from ucp.units import counted


def count_text(count: int) -> str:
    """``7.24 billion`` from a million on, all digits below."""
    for limit, word in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if count >= limit:
            return f"{count / limit:.2f} {word}"
    return f"{count:,}"


def scalar_text(value: object) -> str:
    """A number that an optimizer keeps, as it is counted: ``40`` for a step of 40.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def seconds_text(seconds: float) -> str:
    """``1 h 05 min``, ``3 min 20 s``, ``1.4 s``, ``less than 0.1 s``."""
    if seconds < 0.1:
        return "less than 0.1 s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def age_text(when: float, now: float | None = None) -> str:
    """How long ago a time (seconds since the epoch) was: ``3 days ago``."""
    ago = max((time.time() if now is None else now) - when, 0)
    for size, word in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if ago >= size:
            n = int(ago // size)
            return f"{n} {word}{'s' if n > 1 else ''} ago"
    return "just now"


def shape_text(shape: Shape) -> str:
    """``4096 × 11008``; ``scalar`` for no dimension."""
    return " × ".join(map(str, shape)) if shape else "scalar"


def span_text(first: int, end: int) -> str:
    """``4 to 7`` for the numbers from 4 up to 8, ``4`` for one, ``none`` for none."""
    if end - first < 2:
        return str(first) if end > first else "none"
    return f"{first} to {end - 1}"


def cut_text(shape: Shape, blocks: Blocks, holders: Sequence[str]) -> str:
    """How a tensor is cut into fragments, seen from the fragments alone: ``2 parts of dimension 0, over 2 ranks``.

    holders: the ranks or files that hold some.
    """
    n = len(blocks)
    if numel(shape) == 0:
        return "empty"
    if n <= 1:
        return "whole"
    word = holder_word(holders)
    over = f"over {counted(len(holders), word)}" if len(holders) > 1 else f"in one {word}"
    size = np.array(shape, np.int64)
    cut = [k for k in range(len(shape)) if np.any(blocks.sizes[:, k] != size[k])]
    if len(cut) == 1:
        k = cut[0]
        pieces = len(np.unique(blocks.offsets[:, k]))
        return f"{counted(pieces, 'part')} of dimension {k}, {over}"
    first = blocks.offsets @ np.array(row_major(shape), np.int64)
    order = np.argsort(first)
    dense = np.all(first[order][1:] == (first + blocks.counts)[order][:-1])
    return f"{'flat ranges' if dense else f'{n} boxes'} {over}"


def holder_word(holders: Iterable[str]) -> str:
    """What the holders of fragments are, by their names: ``rank`` if all of them are ranks, else ``file``."""
    return "rank" if all(name.startswith("rank") for name in holders) else "file"
