"""What DeepSpeed's compiled optimizers need on a GPU: set before ranks start, by the tests and the benchmarks."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

ARCHITECTURES = "TORCH_CUDA_ARCH_LIST"


def plain_architectures(environment: MutableMapping[str, str] = os.environ) -> None:
    """Leave the letters out of ``TORCH_CUDA_ARCH_LIST``: DeepSpeed's builder takes "9.0" and fails on "9.0a"."""
    found = environment.get(ARCHITECTURES)
    if found:
        environment[ARCHITECTURES] = " ".join(part.rstrip("af") for part in found.replace(";", " ").split())
