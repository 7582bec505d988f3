"""A plain writer of the same bytes: a folder's files read and written in windows as a conversion does it, and synced.

Nothing is planned, no digest is made or compared. What a conversion takes beyond this is its own work.

    python scripts/copy_plain.py SOURCE OUT
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ucp.storage.writeback import write_past_cache

WINDOW = 8 << 20


class Rooms(threading.local):
    """A thread's memory, aligned to pages."""

    def __init__(self) -> None:
        self.window = memoryview(mmap.mmap(-1, WINDOW))


rooms = Rooms()
turn = threading.Lock()


def copy_window(file: int, to: int, at: int) -> None:
    size = os.preadv(file, [rooms.window], at)
    with turn:  # one thread at a time in the file, as the kernel has it
        write_past_cache(to, rooms.window[:size], at)


def main() -> None:
    source, out = map(Path, sys.argv[1:])
    opened, work = [], []
    with ThreadPoolExecutor(3) as pool:
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            there = out / path.relative_to(source)
            there.parent.mkdir(parents=True, exist_ok=True)
            file, to = os.open(path, os.O_RDONLY), os.open(there, os.O_RDWR | os.O_CREAT)
            opened += [file, to]
            work += [pool.submit(copy_window, file, to, at) for at in range(0, path.stat().st_size, WINDOW)]
        for one in work:
            one.result()
    for file in opened:
        os.fsync(file)
        os.close(file)


if __name__ == "__main__":
    main()
