"""What passes between keepers and those who ask them: one frame each way.

A frame is two lengths, a header in JSON and bytes. Over a Unix socket a frame may bring one file descriptor. Nothing is
unpickled, and lengths beyond a bound are refused.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ucp import limits

_LENGTHS = struct.Struct("!IQ")


@dataclass(frozen=True, eq=False)
class Frame:
    """One message. header: plain JSON. body: bytes. file: a descriptor that came with it; the receiver closes it."""

    header: Mapping[str, Any]
    body: bytes | memoryview = b""
    file: int | None = None


def send(to: socket.socket, header: Mapping[str, Any], body: Any = b"", file: int | None = None) -> None:
    """Send a frame. Raises OSError."""
    head = json.dumps(header, separators=(",", ":")).encode()
    lengths = _LENGTHS.pack(len(head), len(body)) + head
    if file is None:
        to.sendall(lengths)
    else:
        sent = socket.send_fds(to, [lengths], [file])
        to.sendall(lengths[sent:])
    if len(body):
        to.sendall(body)


def receive(source: socket.socket, most: int | None = None) -> Frame | None:
    """The next frame; None if the other side has closed. Raises OSError, also for data that is not a frame.

    most: how many bytes a header may have, and no body then: for one who has not shown yet that they know the token.
    """
    first, files = _first(source)
    if not first:
        return None
    while len(first) < _LENGTHS.size:
        first += _some(source, _LENGTHS.size - len(first))
    head, body = _LENGTHS.unpack(first)
    if head > (most or limits.KEEPER_HEADER_BYTES) or body > (0 if most else limits.KEEPER_BODY_BYTES):
        raise ConnectionError(f"a frame of {head} and {body} bytes is more than a keeper's frames have")
    try:
        header = json.loads(bytes(_exactly(source, head)))
    except (ValueError, RecursionError) as error:
        raise ConnectionError("what came is no keeper's frame") from error
    if not isinstance(header, dict):
        raise ConnectionError("what came is no keeper's frame")
    return Frame(header, _exactly(source, body), files[0] if files else None)


def _first(source: socket.socket) -> tuple[bytes, list[int]]:
    if source.family != socket.AF_UNIX:
        return source.recv(_LENGTHS.size), []
    raw, files, _, _ = socket.recv_fds(source, _LENGTHS.size, 1)
    return raw, list(files)


def _some(source: socket.socket, count: int) -> bytes:
    raw = source.recv(count)
    if not raw:
        raise ConnectionError("the connection ended within a frame")
    return raw


def _exactly(source: socket.socket, count: int) -> memoryview:
    """Exactly ``count`` bytes."""
    out = memoryview(bytearray(count))
    at = 0
    while at < count:
        got = source.recv_into(out[at:])
        if not got:
            raise ConnectionError("the connection ended within a frame")
        at += got
    return out
