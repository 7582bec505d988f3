"""A program that loads into tensors it has already, and says how much anonymous memory that took at the most.

python -m tests.loading.memory_program FOLDER READER MEMORY
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

import ucp
import ucp.dcp

SHAPES = {"square": (12_000, 12_000), "flat": (30_000_001,), "odd": (7, 5, 3), "half": (1000, 3333)}


def state(fill: float) -> dict[str, Any]:
    """About 700 MiB of tensors, all of whose pages are there."""
    out = {name: torch.full(shape, fill) for name, shape in SHAPES.items()}
    out["half"] = out["half"].to(torch.bfloat16)
    return {"model": out}


def anonymous() -> int:
    """Bytes of this process's anonymous memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


@contextmanager
def peak() -> Iterator[list[int]]:
    """Bytes that anonymous memory grew by at the most while this was entered: the list's only element, at the end."""
    before = most = anonymous()
    growth: list[int] = []
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.002):
            most = max(most, anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield growth
    finally:
        over.set()
        watching.join()
        growth.append(most - before)


def main() -> None:
    folder, reader, memory = sys.argv[1], sys.argv[2], int(sys.argv[3])
    live = state(7.0)
    small = {"model": {"odd": live["model"]["odd"]}}
    ucp.load(small, folder)  # imports what a load imports
    with peak() as growth:
        if reader == "load":
            report = ucp.load(live, folder, memory=memory)
        else:
            storage = ucp.dcp.StorageReader(folder, memory=memory)
            dcp.load(live, storage_reader=storage)
            assert storage.last_load is not None
            report = storage.last_load
    right = all(bool((value == 3.0).all()) for value in live["model"].values())
    print(f"{growth[0]} {right} {report.strategy}")


if __name__ == "__main__":
    main()
