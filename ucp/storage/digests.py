"""Digests of a file's chunks, so that a partial read verifies just the chunks that it touches.

Chunk k of a file is its bytes `[k * CHUNK, (k + 1) * CHUNK)`; the last one may be shorter. The digest is xxh3_64 (8
bytes, big-endian): it finds damage, not forgery.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from ucp import limits
from ucp.errors import BadArgument, DamagedCheckpoint, DigestMismatch
from ucp.storage.files import Files

CHUNK = 1 << 20  # bytes
WIDTH = 8  # bytes of one digest


def chunk_count(size: int) -> int:
    """Number of chunks of a file of `size` bytes."""
    return -(-size // CHUNK)


@dataclass(frozen=True, slots=True)
class ChunkDigests:
    """The digests of all chunks of a file of `size` bytes: `table` holds 8 bytes for each.

    Raises `DamagedCheckpoint` if the table's length does not fit the size.
    """

    size: int
    table: bytes

    def __post_init__(self) -> None:
        wanted = chunk_count(self.size) * WIDTH
        if self.size < 0 or len(self.table) != wanted:
            raise DamagedCheckpoint(
                f"a table of chunk digests for {self.size} bytes should have {wanted} bytes and has {len(self.table)}"
            )

    def __getitem__(self, index: int) -> bytes:
        return self.table[index * WIDTH : (index + 1) * WIDTH]

    @property
    def text(self) -> str:
        """The table in base64, as a manifest has it."""
        return base64.b64encode(self.table).decode("ascii")

    @classmethod
    def from_text(cls, size: int, text: str) -> ChunkDigests:
        """The inverse of `text`. Raises `DamagedCheckpoint` for what is not base64 or does not fit the size."""
        try:
            table = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError, TypeError) as error:
            raise DamagedCheckpoint(f"a table of chunk digests is not base64: {error}") from error
        return cls(size, table)


def digest_chunks(data: Any) -> bytes:
    """The digests, one after the other, of data that begins at a chunk's start."""
    view = memoryview(data)
    if view.nbytes == 0:
        return b""
    view = view.cast("B")
    return b"".join(xxhash.xxh3_64_digest(view[at : at + CHUNK]) for at in range(0, len(view), CHUNK))


def digest_file(
    path: str | os.PathLike[str], files: Files | None = None, seen: Callable[[int, memoryview], None] | None = None
) -> ChunkDigests:
    """The digests of a local file, read in pieces. seen: called with each piece's first byte and the piece.

    Raises `DamagedCheckpoint` if it cannot be read, and what ``seen`` raises.
    """
    if files is None:
        with Files() as own:
            return digest_file(path, own, seen)
    size = files.size(path)
    table = bytearray()
    buffer = memoryview(bytearray(min(size, limits.DIGEST_BATCH_BYTES)))
    for at in range(0, size, limits.DIGEST_BATCH_BYTES):
        piece = buffer[: min(limits.DIGEST_BATCH_BYTES, size - at)]
        files.read_into(path, at, piece)
        if seen is not None:
            seen(at, piece)
        table += digest_chunks(piece)
    return ChunkDigests(size, bytes(table))


def covering(start: int, stop: int, size: int | None = None) -> tuple[int, int]:
    """The byte range of whole chunks that holds `[start, stop)`, cut at the file's `size` if that is given."""
    if stop <= start:
        return start, start
    low, high = start // CHUNK * CHUNK, chunk_count(stop) * CHUNK
    return low, high if size is None else min(high, size)


def check_aligned(size: int, offset: int, length: int) -> int:
    """The index of the first chunk of a range made of whole chunks of a file; raises `BadArgument` for other ranges."""
    stop = offset + length
    if offset % CHUNK or stop > size or (stop % CHUNK and stop != size):
        raise BadArgument(f"bytes {offset} to {stop} are not whole chunks of a file of {size} bytes")
    return offset // CHUNK


def verify_chunks(path: str | os.PathLike[str], digests: ChunkDigests, first: int, data: Any) -> None:
    """Check data that begins at chunk `first` and consists of whole chunks (the file's last may be shorter).

    Raises `DigestMismatch` with the file, the chunk and its bytes.
    """
    view = memoryview(data)
    if view.nbytes == 0:
        return
    view = view.cast("B")
    check_aligned(digests.size, first * CHUNK, len(view))
    # Many threads do this at once, and what needs the interpreter keeps the others waiting.
    digest, table, at = xxhash.xxh3_64_digest, digests.table, first * WIDTH
    for start in range(0, len(view), CHUNK):
        found = digest(view[start : start + CHUNK])
        if found != table[at : at + WIDTH]:
            _compare(path, digests, at // WIDTH, found)
        at += WIDTH


def verify_parts(path: str | os.PathLike[str], digests: ChunkDigests, index: int, parts: Sequence[Any]) -> None:
    """Check one whole chunk that lies in several buffers, one after the other. Raises `DigestMismatch`."""
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(memoryview(part).cast("B"))
    _compare(path, digests, index, state.digest())


def _compare(path: str | os.PathLike[str], digests: ChunkDigests, index: int, found: bytes) -> None:
    wanted = digests[index]
    if found != wanted:
        start = index * CHUNK
        raise DigestMismatch(
            f"{os.fspath(path)}: chunk {index} (bytes {start} to {min(start + CHUNK, digests.size)}) is damaged: its "
            f"digest should be {wanted.hex()} and is {found.hex()}"
        )


def verify_range(files: Files, path: str | os.PathLike[str], digests: ChunkDigests, start: int, stop: int) -> None:
    """Read and check all chunks that touch the bytes `[start, stop)`.

    Raises `DigestMismatch` for a damaged chunk, `DamagedCheckpoint` for a truncated file or a range beyond the digests.
    """
    _check_inside(path, digests, start, stop)
    low, high = covering(start, stop, digests.size)
    buffer = memoryview(bytearray(min(high - low, limits.DIGEST_BATCH_BYTES)))
    for at in range(low, high, limits.DIGEST_BATCH_BYTES):
        piece = buffer[: min(limits.DIGEST_BATCH_BYTES, high - at)]
        files.read_into(path, at, piece)
        verify_chunks(path, digests, at // CHUNK, piece)


def _check_inside(path: str | os.PathLike[str], digests: ChunkDigests, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= digests.size:
        raise DamagedCheckpoint(
            f"{os.fspath(path)}: bytes {start} to {stop} are wanted, and its digests cover {digests.size} bytes"
        )
