"""Names that come from a checkpoint, as names of files and folders: refused or escaped, here and nowhere else.

A parameter, a state or a tag may be called anything. A name that becomes part of a path goes through one of these:
`entry` refuses a name that is not a plain file name on every system, and `escaped` makes one of it. What is joined to a
folder goes through `below`, which checks every part of a planned file's name once more.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from urllib.parse import quote

import xxhash

from ucp.errors import UcpError, Unsupported
from ucp.storage import locations

LONGEST = 255
"""Bytes that a file's name may have on the file systems that checkpoints lie on."""

# Names by which Windows opens a device in any folder. (Since Windows 11 they are files if they have an extension, and
# parameters such as 'aux.weight' are common. So only the bare words are refused.)
_DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³"
}
_FORBIDDEN = set('/\\<>:"|?*')


def entry(name: str, what: str, error: type[UcpError] = Unsupported, advice: str = "") -> str:
    """The name, if it can be that of one file or folder on every system; ``error`` otherwise.

    what: what has the name, for the error (``parameter``, ``tag``). advice: what to do instead, to end the sentence.
    """
    reason = _reason(name)
    if reason is not None:
        raise error(f"{what} {name!r} cannot be a file's name, since it {reason}{advice and '; '}{advice}")
    return name


def escaped(name: str) -> str:
    """A part of a file name for any text: letters, digits and ``_.-~`` stay, the rest is percent-encoded. Never long.

    It is not a whole name by itself: something plain has to stand before it.
    """
    text = quote(name, safe="", errors="surrogatepass")
    if len(text) <= 128:
        return text
    return f"{text[:90]}~{xxhash.xxh3_128_hexdigest(name.encode('utf-8', 'surrogatepass'))}"


def below(folder: str | os.PathLike[str], name: str, error: type[UcpError] = Unsupported) -> str:
    """The path or URL of a file by its name relative to a folder. ``/`` separates parts, and each is an `entry`."""
    parts = [entry(part, f"part of the planned file {name!r}:", error) for part in name.split("/")]
    if locations.is_remote(folder):
        return "/".join([os.fspath(folder).rstrip("/"), *parts])
    return os.path.join(folder, *parts)


def check_planned(names: Iterable[str]) -> None:
    """Raise Unsupported if planned files have impossible names, or if two names are the same on some file systems.

    Many file systems do not distinguish small and capital letters, or the two ways to write an accent.
    """
    seen: dict[str, tuple[str, bool]] = {}
    folders: set[str] = set()
    for name in names:
        below("", name)
        parts = name.split("/")
        for depth in range(1, len(parts) + 1):
            path, is_file = "/".join(parts[:depth]), depth == len(parts)
            folded = _folded(path)
            known, was_file = seen.setdefault(folded, (path, False))
            if known != path:
                raise Unsupported(
                    f"{known!r} and {path!r} would be one file on systems that do not tell such letters apart; the "
                    "universal format (--to universal) keeps names out of paths"
                )
            if was_file or (is_file and folded in folders):
                raise Unsupported(f"{path!r} would be a file and a folder, or two files; rename what is called so")
            if is_file:
                seen[folded] = (path, True)
            else:
                folders.add(folded)


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _reason(name: str) -> str | None:
    """Why a name cannot be a file's name; None if it can."""
    if not name or name in (".", ".."):
        return "is empty" if not name else "names a folder relative to another"
    try:
        width = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if width > LONGEST:
        return f"has {width} bytes, and at most {LONGEST} are possible"
    if odd := sorted(_FORBIDDEN.intersection(name)):
        return f"has {odd[0]!r} in it"
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp") for letter in name):
        return "has control characters in it"
    if name[-1] in ". ":
        return "ends in a dot or a space, which some systems drop"
    if name.lower() in _DEVICES:
        return "is a device's on Windows"
    return None
