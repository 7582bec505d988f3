"""Work that makes many objects and no garbage goes without Python's collections of garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """Switch garbage collection off for a while. In a process with torch one collection takes a tenth of a second and
    more, which can be longer than all the rest of the work. What is let go of is freed at once all the same, unless it
    refers to itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
