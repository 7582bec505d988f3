"""Which rank wrote a file, by its name: every format that ranks write in parallel numbers its files.

A file with any other name counts as an owner of its own, with that name. Files of one name in several folders have
their folder's before it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ucp import formats
from ucp.catalog import Catalog


@dataclass(frozen=True)
class FileOwners:
    """names: every owner once, ranks in order of their numbers. of_file: for each file, which of them wrote it."""

    names: tuple[str, ...]
    of_file: NDArray[np.int64]

    def __getitem__(self, file: int) -> str:
        return self.names[int(self.of_file[file])]


def file_owners(catalog: Catalog) -> FileOwners:
    """Who wrote the catalog's files. All formats are asked: a virtual checkpoint has the files of another format."""
    bases = [os.path.basename(file.path) for file in catalog.files]
    several = Counter(bases)
    names = [
        "/".join(f.path.split("/")[-2:]) if several[base] > 1 else base
        for f, base in zip(catalog.files, bases, strict=True)
    ]
    known: dict[str, str] = {}
    for one in formats.those_of(catalog.format):
        known = {**one.file_owners([*bases, *names]), **known}
    found = [known.get(name) or known.get(base, name) for name, base in zip(names, bases, strict=True)]
    order = sorted(set(found), key=_natural)
    position = {name: k for k, name in enumerate(order)}
    return FileOwners(tuple(order), np.array([position[name] for name in found], np.int64))


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Sorts numbers in a text by their value."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]
