"""The manifest's frame: one JSON object that begins with the digest of everything that follows.

The first bytes of ``ucp.json`` are always ``{"digest":"xxh3_128:<32 hexadecimal digits>",`` (54 bytes); the digest is
that of all bytes after this prefix, to the end of the file, byte for byte. So the file is ordinary JSON to any other
program, and here no byte of it is believed before all of them are checked.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import xxhash

from ucp import limits
from ucp.errors import DamagedCheckpoint, DigestMismatch, NotACheckpoint, Unsupported
from ucp.formats.universal import MANIFEST
from ucp.storage import locations
from ucp.version import version

NAME = MANIFEST
VERSION = "1.1"
"""Major.minor: another major version is refused; a greater minor one only adds what may be ignored."""

_HEAD = b'{"digest":"xxh3_128:'
_TAIL = b'",'
_PREFIX = len(_HEAD) + 32 + len(_TAIL)


def writer_name() -> str:
    """This project's name and version, as manifests have it."""
    return f"universal-checkpoint {version()}"


def frame(body: dict[str, Any]) -> bytes:
    """The manifest's bytes for a body without 'digest'."""
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")
    rest = text[1:]  # the object's opening brace is in the prefix
    return _HEAD + xxhash.xxh3_128_hexdigest(rest).encode("ascii") + _TAIL + rest


def load(path: str) -> dict[str, Any]:
    """The body of a manifest file, its digest and version checked.

    Raises NotACheckpoint where there is no such file, DigestMismatch where its bytes were changed, DamagedCheckpoint
    where it is no manifest at all, Unsupported for a major version that this release does not know.
    """
    try:
        raw = locations.read(path)
    except FileNotFoundError:
        raise NotACheckpoint(
            f"{path}: there is no manifest; a folder without one is not a universal checkpoint"
        ) from None
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: the manifest cannot be read: {error.strerror or error}") from error
    return parse(path, raw)


def parse(path: str, raw: bytes) -> dict[str, Any]:
    """Like `load`, from a manifest's bytes."""
    framed = raw.startswith(_HEAD) and raw[_PREFIX - len(_TAIL) : _PREFIX] == _TAIL
    wanted = raw[len(_HEAD) : len(_HEAD) + 32]
    found = xxhash.xxh3_128_hexdigest(raw[_PREFIX:]).encode("ascii")
    if framed and wanted == found:
        body = _parse(path, raw)
        check_version(path, body.get("ucp"))
        return body
    # A manifest of another major version may be framed in another way: say that, rather than "damaged".
    try:
        other = _parse(path, raw)
    except DamagedCheckpoint:
        other = {}
    if isinstance(other.get("ucp"), str):
        check_version(path, other["ucp"])
    if not framed:
        raise DamagedCheckpoint(
            f"{path}: is not a manifest: it does not begin with a digest; it is damaged or truncated"
        )
    raise DigestMismatch(
        f"{path}: the manifest is damaged or was edited: its digest should be {wanted.decode('ascii', 'replace')} and "
        f"is {found.decode('ascii')}"
    )


def digest_of(path: Path) -> str:
    """The digest that a manifest begins with, unchecked. It differs for every save. Raises OSError."""
    with locations.opened(path) as stream:
        return stream.read(_PREFIX)[len(_HEAD) : _PREFIX - len(_TAIL)].decode("ascii", "replace")


def check_version(path: str | os.PathLike[str], version: Any) -> None:
    """Raise Unsupported unless this release reads manifests of that version, DamagedCheckpoint if it is none."""
    major, dot, minor = str(version).partition(".")
    if not isinstance(version, str) or not dot or not major.isdecimal() or not minor.isdecimal():
        raise DamagedCheckpoint(f"{path}: manifest version {version!r} is no version; '{VERSION}' is one")
    own = VERSION.partition(".")[0]
    if int(major) != int(own):
        raise Unsupported(
            f"{path}: manifest version '{version}' is not supported; this release reads versions {own}.x, so use the "
            "release that wrote it, or a newer one"
        )


def _parse(path: str, raw: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON number")

    limits.check_json(path, raw)
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: the manifest is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise DamagedCheckpoint(f"{path}: the manifest is not a JSON object")
    return body
