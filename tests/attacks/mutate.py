"""Mutations of files by seed: of their bytes as they are, and of what is inside checksums that are then made right."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from typing import Any

from ucp.formats.universal import manifest

INTERESTING = (0, 1, -1, 2, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**9, -(2**63))

WORDS = ("&a", "*a", "!!python/name:os.system", "{", "[", "- ", "~", "null", "9" * 21, "tp", "|", ":", "a*", "(")


def of_bytes(rng: random.Random, raw: bytes) -> bytes:
    """A bit, a byte or a range changed, cut out, doubled or moved."""
    if not raw:
        return bytes([rng.randrange(256)])
    data = bytearray(raw)
    at = rng.randrange(len(data))
    length = min(len(data) - at, rng.choice((1, 1, 2, 4, 8, 30, 200)))
    kind = rng.randrange(8)
    if kind <= 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif kind == 3:
        del data[at : at + length]
    elif kind == 4:
        data[at:at] = data[at : at + length]
    elif kind == 5:
        data[at : at + length] = bytes(length)
    elif kind == 6:
        data = data[:at]
    else:
        other = rng.randrange(len(data))
        data[at : at + length] = data[other : other + length]
    return bytes(data)


def of_pickle(rng: random.Random, raw: bytes) -> bytes:
    """The pickle in a torch file, the zip archive around it whole and its CRC right."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        entries[name] = of_bytes(rng, entries[name])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for other, content in entries.items():
            archive.writestr(zipfile.ZipInfo(other), content)  # of no particular time
    return stream.getvalue()


def of_header(rng: random.Random, raw: bytes) -> bytes:
    """A safetensors file's header, its length right."""
    length = int.from_bytes(raw[:8], "little")
    header, rest = raw[8 : 8 + length], raw[8 + length :]
    changed = of_json(rng, header) if rng.random() < 0.7 else of_bytes(rng, header)
    return len(changed).to_bytes(8, "little") + changed + rest


def of_manifest(rng: random.Random, raw: bytes) -> bytes:
    """A manifest's body, framed with its right digest."""
    body = json.loads(raw)
    del body["digest"]
    changed = json.loads(of_json(rng, json.dumps(body).encode()))
    return manifest.frame(changed) if isinstance(changed, dict) else raw


def of_json(rng: random.Random, raw: bytes) -> bytes:
    """A value somewhere in JSON text is another, gone, or in another's place."""
    found = json.loads(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(found))
        if not places:
            return of_bytes(rng, raw)
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            other, where = rng.choice(places)
            try:
                holder[key] = json.loads(json.dumps(other[where]))
            except (KeyError, IndexError):
                continue
        elif kind == 2 and isinstance(holder[key], str) and holder[key]:
            holder[key] = of_bytes(rng, holder[key].encode()).decode("utf-8", "replace")
        elif kind == 3 and isinstance(holder, list):
            holder.insert(key, holder[key])
        else:
            holder[key] = rng.choice((*INTERESTING, None, True, "", "x", "../x", "/etc/passwd", [], {}, 1.5, [[]] * 3))
    return json.dumps(found).encode()


def _places(value: Any) -> Any:
    """Every place of a value: the container and the key."""
    if isinstance(value, dict):
        for key in value:
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        for index in range(len(value)):
            yield value, index
            yield from _places(value[index])


def several_of_text(rng: random.Random, raw: bytes) -> str | None:
    """A text after one to three of these; None where it is no longer one."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        raw = of_text(rng, raw)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def of_text(rng: random.Random, raw: bytes) -> bytes:
    """Words and lines of a text dropped, doubled, exchanged, or some bytes changed."""
    if rng.random() < 0.4:
        return of_bytes(rng, raw)
    lines = raw.decode("utf-8", "replace").splitlines(keepends=True) or [""]
    at = rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[rng.randrange(len(lines))])
    elif kind == 2:
        lines[at] = "  " * rng.randrange(4) + lines[at].lstrip()
    else:
        words = lines[at].split(" ")
        words[rng.randrange(len(words))] = rng.choice(WORDS)
        lines[at] = " ".join(words)
    return "".join(lines).encode()


Mutation = Callable[[random.Random, bytes], bytes]
