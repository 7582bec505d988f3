"""Whether a file is the one that its name says: torch keeps, in the archive, the name that it was written under.

Ranks' files differ only in their data, so two that were swapped would be read without a contradiction. torch makes the
file's name (without its extension) the root folder of the archive in it. A root that is the name of another DeepSpeed
file is refused. Some roots say nothing: a checkpoint engine that writes to a stream of its own
(``fast_checkpoint_engine.py``) leaves "archive", torch's older format keeps no name, and tools may write under a
temporary name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ucp.errors import DamagedCheckpoint, UcpError, UnsafePickle
from ucp.formats.deepspeed.read.names import is_ours
from ucp.printable import logger, short
from ucp.storage.torch_pt.reader import TorchFile

log = logger(__name__)


@dataclass
class Unchecked:
    """Files of one checkpoint for which a check was not possible.

    renamed: files that are another rank's, each with a sentence on that.
    names: files that could not be checked by their stem.
    bytes: files that could not be checked by CRC-32.
    surplus: keys that are neither DeepSpeed's nor client state of rank 0, with the first file that has them.
    """

    renamed: dict[Path, str] = field(default_factory=dict)
    names: dict[Path, None] = field(default_factory=dict)
    bytes: dict[Path, None] = field(default_factory=dict)
    surplus: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def sentences(self) -> tuple[str, ...]:
        """What to tell, at most one line for each check."""
        out = []
        if self.names:
            out.append(
                f"{_counted(self.names)} not the name that it was written under, so it could not be checked that no "
                "two ranks' files are swapped"
            )
        if self.bytes:
            out.append(
                f"{_counted(self.bytes)} no CRC-32s, so flipped bits in it can't be seen (torch's older format, or "
                "torch.serialization.set_crc32_options(False))"
            )
        for keys, path in self.surplus.items():
            shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
            out.append(
                f"not read, being no keys of DeepSpeed's, and not in rank 0's model file: {shown} of '{path.name}'"
            )
        return tuple(out)


def note_surplus(path: Path, keys: Sequence[Any]) -> None:
    """Note keys of a file that nothing reads."""
    noted = _open.get()
    if noted is not None and keys:
        noted.surplus.setdefault(tuple(map(short, keys)), path)


def _counted(files: dict[Path, None]) -> str:
    first = next(iter(files)).name
    return f"'{first}' has" if len(files) == 1 else f"each of {len(files)} files ('{first}', …) has"


_open: ContextVar[Unchecked | None] = ContextVar("unchecked", default=None)


@contextmanager
def noting() -> Iterator[Unchecked]:
    """Collect, from all files that the block reads, what could not be checked.

    Raises DamagedCheckpoint at the end of the block if a file was written under another checkpoint file's name. Other
    faults that the block finds come first in the message: they may tell which tensors such files hold.
    """
    found = Unchecked()
    token = _open.set(found)
    try:
        yield found
    except UnsafePickle:
        raise
    except UcpError as error:
        if found.renamed:
            raise DamagedCheckpoint(f"{error}; {_swapped(found)}") from error
        raise
    finally:
        _open.reset(token)
    if found.renamed:
        raise DamagedCheckpoint(_swapped(found))


def _swapped(found: Unchecked) -> str:
    return next(iter(found.renamed.values()))


def note_swapped(path: Path, sentence: str) -> None:
    """Note that a file is another rank's, as the sentence says. Raises DamagedCheckpoint outside of `noting`."""
    noted = _open.get()
    if noted is None:
        raise DamagedCheckpoint(sentence)
    noted.renamed.setdefault(path, sentence)


def check(path: Path, file: TorchFile) -> None:
    """Note a file that was written under another file's name, or that does not say under which name."""
    noted = _open.get() or Unchecked()
    if not file.has_crcs:
        noted.bytes[path] = None
    if file.stem == path.name.removesuffix(".pt"):
        return
    if file.stem is not None and is_ours(f"{file.stem}.pt"):
        noted.renamed[path] = (
            f"{path}: was written as '{file.stem}.pt', as its archive says; the files of two ranks were swapped or "
            "renamed: give each the name that it was written under"
        )
    else:
        noted.names[path] = None
