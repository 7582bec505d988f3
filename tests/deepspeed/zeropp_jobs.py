"""Jobs that run on the ranks: ZeRO++'s quantized weights. DeepSpeed quantizes them with a CUDA kernel, whose place
torch takes here; all else is DeepSpeed's: when it quantizes, what it exchanges, and what it keeps."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer

from tests.deepspeed import save_jobs
from tests.engines import load_jobs, sources
from tests.engines import resume as native
from tests.engines.build import build_engine
from tests.engines.configs import Case
from tests.engines.runs import Run


class TorchQuantizer:
    """The kernel's two functions: symmetric codes of 8 bits, with a scale for each group of elements."""

    Symmetric = 0

    def __init__(self) -> None:
        self.quantized = 0

    def quantize(self, values: torch.Tensor, groups: int, bits: int, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.quantized += values.numel()
        parts = values.float().view(groups, -1)
        scales = (parts.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        return (parts / scales).round().to(torch.int8).view(values.shape), scales.view(-1)

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor, groups: int, bits: int, kind: int) -> torch.Tensor:
        return (codes.view(groups, -1).float() * scales.view(-1, 1)).half().view(codes.shape)


def install() -> TorchQuantizer:
    CUDAQuantizer.quantizer_cuda_module = TorchQuantizer()
    return CUDAQuantizer.quantizer_cuda_module


def train(case: Case, folder: str) -> tuple[Run, int]:
    """The run, and how many elements were quantized."""
    used = install()
    return sources.train(case, folder), used.quantized


def save_untrained(case: Case, folder: str) -> None:
    """A checkpoint of DeepSpeed's own before any step."""
    install()
    build_engine(case).save_checkpoint(folder)


def resume(case: Case, run: Run, trained: int) -> load_jobs.Resumed:
    install()
    return load_jobs.resume(case, run.folder, run.tag, run.steps, trained=trained)


def resume_natively(case: Case, run: Run, trained: int) -> Run:
    """DeepSpeed's own load."""
    install()
    return native.resume(case, run.folder, run.tag, run.steps, before=trained)


def save_and_resume(case: Case, folder: str) -> Any:
    install()
    return save_jobs.save_and_resume(case, folder)
