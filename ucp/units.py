"""Sizes and counts in the words that people read: one unit for each size, wherever it is told."""

from __future__ import annotations

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def bytes_text(count: float) -> str:
    """``1.23 GB``: three digits, in powers of 1000, as disks and networks are sold."""
    value, unit = float(count), _UNITS[0]
    for unit in _UNITS:
        if abs(value) < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1000
    if unit == "B":
        return f"{value:.0f} B"
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"


def took(seconds: float, planned: bool) -> str:
    """What ends a sentence about what was written: `` in 1.2 s``; planned: nothing was, that alone took time."""
    return f"; planned in {seconds:.1f} s" if planned else f" in {seconds:.1f} s"


def each_text(smallest: float, largest: float) -> str:
    """Of several sizes: ``264 kB each`` where they read alike, else ``198 kB to 264 kB each``."""
    low, high = bytes_text(smallest), bytes_text(largest)
    return f"{high} each" if low == high else f"{low} to {high} each"


def counted(count: int, one: str, many: str = "") -> str:
    """``1 file``, ``2 files``; many: the plural, if it isn't ``one`` with an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"
