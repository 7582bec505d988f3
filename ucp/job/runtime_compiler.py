"""CUDA's runtime compiler, by torch's own way to find and load, without what torch imports besides.

``torch.cuda._compile_kernel`` imports ``torch.utils.cpp_extension`` for paths that our kernel does not need, and with
it setuptools. In a process that has not imported them, a load's threads wait for the interpreter meanwhile: the first
load of 12 GB took 1.2 s instead of 0.86.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch


def kernel(source: str, name: str) -> Any:
    """A kernel that is declared ``extern "C"``, for the current device, as ``torch.cuda._compile_kernel`` gives it.

    Raises RuntimeError if it cannot be compiled, and AttributeError, ImportError, OSError, TypeError or ValueError
    where torch has no such ways.
    """
    from torch.cuda import _utils as ways

    library = ways._get_nvrtc_library()
    major, minor = torch.cuda.get_device_capability()
    code = _compiled(library, source, name, f"--gpu-architecture=sm_{major}{minor}")
    return ways._cuda_load_module(code, [name])[name]  # type: ignore[index]


def _compiled(library: Any, source: str, name: str, option: str) -> bytes:
    """The program for a device. Raises RuntimeError with the error's number."""
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None))
    try:
        options = (ctypes.c_char_p * 1)(option.encode())
        _check(library.nvrtcCompileProgram(program, len(options), options))
        size = ctypes.c_size_t()
        _check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetCUBIN(program, code))
        return code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _check(result: int) -> None:
    if result:
        raise RuntimeError(f"NVRTC's error {result}")
