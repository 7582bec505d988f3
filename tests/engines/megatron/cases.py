"""What a Megatron run is like, and the values that its tensors get: the same for every layout."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

LAYERS, HIDDEN, HEADS, GROUPS, FFN, VOCAB, SEQUENCE, EXPERTS = 4, 32, 4, 4, 48, 64, 16, 4


@dataclass(frozen=True)
class Case:
    """A run. kind: 'llama', 'gpt' or 'moe'. sharding: the distributed optimizer's, None for none. per_layer: layers
    have keys of their own."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1
    kind: str = "llama"
    bf16: bool = False
    sharding: str | None = "fully_reshardable"
    per_layer: bool = False

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def name(self) -> str:
        return (
            "-".join(f"{key}={value}" for key, value in asdict(self).items() if value != getattr(Case(), key)) or "one"
        )

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)


def values(what: str, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """float32 elements of a box of a global tensor, made by a hash of the key and each element's index."""
    index = np.zeros(sizes, np.uint64)
    for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        at = np.arange(offset, offset + size, dtype=np.uint64).reshape(
            [-1 if k == axis else 1 for k in range(len(sizes))]
        )
        index = index * np.uint64(shape[axis]) + at
    seed = np.uint64(zlib.crc32(f"{what}:{key}".encode()))
    with np.errstate(over="ignore"):
        mixed = (index + seed * np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
    return ((mixed >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)) * np.float32(0.2)
