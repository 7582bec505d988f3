"""Bytes that zstd has compressed, decompressed up to a bound. Any of three packages does it, whichever is installed."""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib import import_module
from typing import BinaryIO

from ucp import limits
from ucp.errors import DamagedCheckpoint, Unsupported

# Python's own since 3.14, then the two that torch knows.
_PACKAGES = ("compression.zstd", "zstandard", "pyzstd")


def read(path: str, raw: bytes, most: int) -> bytes:
    """All of it. Raises DamagedCheckpoint where it is damaged or longer than ``most`` bytes, Unsupported where no
    package can do it."""
    found = begin(path, raw, most + 1)
    if len(found) > most:
        raise DamagedCheckpoint(
            f"{path}: {len(raw)} bytes decompress to more than {most}, which is the most for what they are said to hold"
        )
    return found


def begin(path: str, raw: bytes, count: int) -> bytes:
    """Its first bytes, at most ``count``. Raises as `read` does."""
    open_, kinds = _opener(path)
    faults: tuple[type[Exception], ...] = (*kinds, EOFError, MemoryError)
    out = io.BytesIO()
    try:
        with open_(io.BytesIO(raw)) as stream:
            while out.tell() < count:
                piece = stream.read(min(count - out.tell(), limits.ZSTD_STEP_BYTES))
                if not piece:
                    break
                out.write(piece)
    except faults as error:
        raise DamagedCheckpoint(f"{path}: what zstd has compressed there is damaged ({error})") from error
    return out.getvalue()


def _opener(path: str) -> tuple[Callable[[BinaryIO], BinaryIO], tuple[type[Exception], ...]]:
    """What opens a stream of compressed bytes, and the errors that reading it raises."""
    for name in _PACKAGES:
        try:
            package = import_module(name)
        except ImportError:
            continue
        if name == "zstandard":
            return package.ZstdDecompressor().stream_reader, (package.ZstdError,)
        return package.ZstdFile, (package.ZstdError,)
    raise Unsupported(
        f"{path}: its records are compressed by zstd, and no package that reads that is installed; pip install "
        "zstandard, or 'universal-checkpoint[zstd]'"
    )
