"""The shape of plain values as they come out of a pickle: how deep they nest, what they share, what copies would take.

A pickle can hold one list in many places, and that list can hold others in the same way. Forty such steps take a
kilobyte in the file, but walking them as a tree visits a million million values. Here each container is visited once.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ucp import limits
from ucp.errors import Unsupported
from ucp.storage.torch_pt.values import Size, Standin

_POINTER, _OBJECT = 8, 56  # bytes, about
_MOST = 1 << 62
HEAVY = 1024
"""Bytes from which on a text or an array counts as shared, as a container does."""
_TEXTS = (str, bytes, bytearray)
_ITERABLE = frozenset((list, tuple, set, frozenset, deque, Size))
_SMALL = frozenset((int, float, bool, type(None)))
_ROWS = frozenset((list, tuple, Size))


@dataclass(frozen=True)
class Measure:
    """What values measure.

    depth: of the nesting.
    folded: bytes of all values, each counted once.
    unfolded: bytes if everything that is shared is copied for each of its places, and ranges are written out.
    again: the identities of containers, long texts and arrays that were met more than once.
    """

    depth: int
    folded: int
    unfolded: int
    again: frozenset[int]

    @property
    def is_spread(self) -> bool:
        """Whether copies of what is shared stay within what metadata may take."""
        return self.unfolded <= limits.metadata_bytes(self.folded)


class ContainsItselfError(ValueError):
    """A container contains itself, directly or through others."""


def measure(value: Any) -> Measure:
    """Measure a value. Raises ContainsItselfError."""
    done: dict[int, tuple[int, int]] = {}
    opened: set[int] = set()
    again: set[int] = set()
    heavy: set[int] = set()
    folded = 0
    # One frame for each open container: its identity, its remaining items, its depth and its unfolded bytes so far.
    frames: list[list[Any]] = [[0, iter((value,)), 0, 0]]
    while True:
        frame = frames[-1]
        for child in frame[1]:
            kind = type(child)
            if kind in _SMALL:  # most values are, and need no further calls
                folded += _POINTER
                frame[3] += _POINTER
                continue
            if kind is str and len(child) < HEAVY:
                folded += _POINTER + len(child)
                frame[3] += _POINTER + len(child)
                continue
            key = id(child)
            if key in done:
                again.add(key)
                folded += _POINTER
                frame[2] = max(frame[2], done[key][0])
                frame[3] = min(frame[3] + done[key][1], _MOST)
                continue
            if kind in _ROWS and _SMALL.issuperset(map(type, child)):  # as shapes are
                done[key] = 1, _OBJECT + _POINTER * len(child)
                folded += done[key][1]
                frame[2] = frame[2] or 1
                frame[3] += done[key][1]
                continue
            inner = _children(child, kind)
            if inner is None:
                own, spread = _bytes_of(child, kind)
                if spread >= HEAVY:
                    (again if key in heavy else heavy).add(key)
                folded += own
                frame[3] += spread
                continue
            if key in opened:
                raise ContainsItselfError(f"a {kind.__name__} contains itself")
            opened.add(key)
            folded += _OBJECT
            frames.append([key, inner, 0, _OBJECT])
            break
        else:
            frames.pop()
            if not frames:
                return Measure(frame[2], folded, frame[3], frozenset(again))
            opened.discard(frame[0])
            done[frame[0]] = frame[2] + 1, frame[3]
            frames[-1][2] = max(frames[-1][2], frame[2] + 1)
            frames[-1][3] = min(frames[-1][3] + frame[3], _MOST)


def check(path: str, value: Any, spread: Any = None) -> None:
    """Check what a file's pickle holds before anything walks through it.

    value: all of it. It must not contain itself, nor nest deeper than `limits.NESTING`.
    spread: the part of it that will be walked as a tree (None: all). Copies of what it shares must fit into the memory
    that metadata may take.

    Raises Unsupported.
    """
    try:
        found = measure(value)
        if found.depth > limits.NESTING:
            raise Unsupported(
                f"{path}: its values are nested {found.depth} deep, and {limits.NESTING} is the most that is read"
            )
        if spread is not None and found.unfolded > limits.metadata_bytes(0):  # a part of little is little
            found = measure(spread)
    except ContainsItselfError as error:
        raise Unsupported(f"{path}: {error}, which cannot be read") from error
    if not found.is_spread:
        raise Unsupported(
            f"{path}: {found.folded} bytes of values stand for {found.unfolded}, since lists in it are used in many "
            f"places or ranges are long; {limits.metadata_bytes(found.folded)} is the most that is read"
        )


def _children(value: Any, kind: type) -> Iterator[Any] | None:
    """What a container holds; None for a value that is not a container."""
    if kind in _ITERABLE:
        return iter(value)
    if kind is str:
        return None
    if isinstance(value, dict):
        hung = getattr(value, "__dict__", None)
        return chain(value, value.values(), hung.values() if hung else ())
    if kind is argparse.Namespace:
        return iter(vars(value).values())
    if kind is Standin:
        return iter((value.class_args, value.state))
    if kind is slice:
        return iter((value.start, value.stop, value.step))
    return None


def _bytes_of(value: Any, kind: type) -> tuple[int, int]:
    """About how many bytes a plain value takes, and how many if it is written out."""
    if kind in _TEXTS:
        return _POINTER + len(value), _POINTER + len(value)
    if kind is range:
        return _OBJECT, _OBJECT + min(_POINTER * max((value.stop - value.start) // value.step, 0), _MOST)
    if kind is np.ndarray:
        return _OBJECT, _OBJECT + value.nbytes
    return _POINTER, _POINTER
