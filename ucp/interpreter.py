"""How Python runs for a while: work that makes many objects and no garbage, and threads that wait for one another."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ucp import limits


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


@contextmanager
def quick_turns() -> Iterator[None]:
    """Let threads that read take turns sooner than Python's 5 ms for a while. A thread comes back to the interpreter
    after every read and every digest; where another one imports modules or compiles meanwhile, as before a first proof,
    each of them would wait so long each time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, limits.SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
