"""Put a checkpoint of any layout into a live training process, all of it or nothing.

Three steps, each agreed on by all ranks before the next: compare and plan (nothing is touched), read this rank's byte
ranges into host memory (nothing is touched), apply. A rank that finds something wrong in the first two makes all ranks
refuse.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ucp.catalog import Catalog
from ucp.storage.dtypes import itemsize, to_torch
from ucp.storage.files import Files
from ucp.training import ranks
from ucp.training.match import Plan, Wish, plan
from ucp.training.target import Loaded, Slot, Target
from ucp.transfer.gather import Bytes, Reader, Want, gather


@dataclass(frozen=True)
class LoadReport:
    """What a load did, for people and logs.

    nbytes: of the tensors brought to this rank; bytes_read: what was read of the files for them, gaps between short
    runs and whole digest chunks included. seconds: by stage, on this rank.
    """

    tensors: int
    nbytes: int
    bytes_read: int
    source: str
    target: str
    seconds: Mapping[str, float]
    plan: Plan

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        text = (
            f"restored {self.tensors} tensors ({_size(self.nbytes)} on this rank) from {self.source} to {self.target} "
            f"in {total:.2f} s"
        )
        if self.plan.left:
            text += f"; left as they were: {len(self.plan.left)} ({', '.join(self.plan.left[:4])}, …)"
        if self.plan.unused:
            text += f"; not used: {len(self.plan.unused)} ({', '.join(self.plan.unused[:4])}, …)"
        return text


def load(
    catalog: Catalog, target: Target, wish: Wish, *, verify: bool = True, threads: int | None = None
) -> LoadReport:
    """Restore the target from the catalog. Collective: all ranks call it with the same catalog and wish.

    verify: check the chunks read against the checkpoint's digests, where it has them. Raises Mismatch (nothing was
    changed) when anything would stay unrestored or unused against the wish, DamagedCheckpoint when files do.
    """
    clock = [time.perf_counter()]
    state = None if wish.weights_only else catalog.training_state
    what = ranks.together(lambda: _checked_plan(catalog, target, wish))
    clock.append(time.perf_counter())
    tensors, nbytes, bytes_read = ranks.together(lambda: read(catalog, target, what, verify, threads))
    clock.append(time.perf_counter())
    target.apply(Loaded(tensors, what.scalars, what.options, what.sources, state))
    clock.append(time.perf_counter())
    seconds = dict(zip(("plan", "read", "apply"), np.diff(clock).tolist(), strict=True))
    count = len({(w.tensor.name, w.tensor.state) for wants in what.wants.values() for w in wants})
    return LoadReport(
        count, nbytes, bytes_read, f"{catalog.format} {catalog.layout}", str(target.layout), seconds, what
    )


def _checked_plan(catalog: Catalog, target: Target, wish: Wish) -> Plan:
    what = plan(catalog, target, wish)
    if not wish.weights_only:
        target.check(catalog.training_state, what.sources)
    return what


def read(
    catalog: Catalog, target: Target, what: Plan, verify: bool, threads: int | None
) -> tuple[dict[tuple[int, str], torch.Tensor], int, int]:
    """This rank's slots, filled in host memory; elements that nothing is brought for keep their present values.

    Returns them with their bytes and with the bytes read.
    """
    slots = {s.key: s for s in target.slots}
    tensors: dict[tuple[int, str], torch.Tensor] = {}
    buffers: list[Bytes] = []
    wants: list[Want] = []
    for (key, state, dtype), found in what.wants.items():
        tensor = _blank(target, slots[key], state, dtype, complete=len(found) == len(slots[key].members))
        wants += [Want(w.tensor, w.blocks.in_buffer(len(buffers)), w.dtype) for w in found]
        buffers.append(tensor.view(torch.uint8).numpy())
        tensors[key, state] = tensor
    with Files() as files:
        nbytes = gather(Reader(catalog, files, verify), wants, buffers, threads or reading_threads())
        return tensors, nbytes, files.bytes_read


def _blank(target: Target, slot: Slot, state: str, dtype: str, complete: bool) -> torch.Tensor:
    if not complete:
        current = target.current(slot.key, state)
        if current is not None:
            return current.to(to_torch(dtype))
    # numpy's zeros are the system's own, in large pages where it has them: twice as fast to read into as torch's.
    raw = np.zeros(slot.placement(state).length * itemsize(dtype), np.uint8)
    return torch.from_numpy(raw).view(to_torch(dtype))


def reading_threads() -> int:
    """Reading threads for this process: the machine's processors over the ranks on it, at most 8."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    return max(1, min(8, (os.cpu_count() or 1) // max(local, 1)))


def _size(nbytes: int) -> str:
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
