"""Random numbers that belong to samples and not to ranks: the same in every layout.

A stream cannot be divided among another number of ranks. Here every sample has streams of its own, keyed by the run's
seed, the step, the sample's number in the global order, and the use. So a sample's augmentation and its dropout masks
are the same on any rank and in any micro-batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from ucp.errors import BadArgument
from ucp.units import counted


def per_sample(seed: int, step: int, sample: int, use: str = "") -> torch.Generator:
    """A generator on the CPU for one sample in one step. use: what it is for. Each use has its own stream."""
    text = f"{seed}\n{step}\n{sample}\n{use}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1)


@dataclass
class _Now:
    """The samples of the current forward pass."""

    seed: int
    step: int
    samples: tuple[int, ...]
    calls: dict[str, int] = field(default_factory=dict)


_now: ContextVar[_Now | None] = ContextVar("ucp_samples", default=None)


@contextmanager
def samples(seed: int, step: int, numbers: Sequence[int]) -> Iterator[None]:
    """In this block `SampleDropout` uses the masks of these samples. Give them in the order of the batch."""
    token = _now.set(_Now(seed, step, tuple(map(int, numbers))))
    try:
        yield
    finally:
        _now.reset(token)


class SampleDropout(torch.nn.Module):
    """Dropout whose masks belong to samples; the batch is the first dimension.

    p: which share is dropped. name: a different one for each place in the model. In training a forward pass has to be
    inside `samples`. Raises BadArgument if it is not, or if the batch has another size.
    """

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise BadArgument(f"dropout of {p} is not between 0 and 1")
        self.p, self.name = p, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.p:
            return x
        return x * self.mask(x.shape).to(x.device, x.dtype) / (1 - self.p)

    def mask(self, shape: Sequence[int]) -> torch.Tensor:
        """What is kept, as booleans."""
        now = _now.get()
        if now is None or len(now.samples) != shape[0]:
            found = "no samples" if now is None else counted(len(now.samples), "sample")
            raise BadArgument(
                f"dropout '{self.name}' of a batch of {shape[0]} needs to know their numbers, and there are {found}; "
                "run the model within ucp.job.streams.samples(seed, step, numbers)"
            )
        call = now.calls[self.name] = now.calls.get(self.name, -1) + 1
        rows = []
        for number in now.samples:
            generator = per_sample(now.seed, now.step, number, f"{self.name}\n{call}")
            rows.append(torch.rand(tuple(shape[1:]), generator=generator) >= self.p)
        return torch.stack(rows)
