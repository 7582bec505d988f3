"""What reading a file raises if its structure is not as its format says, turned into an error that says so.

A reader takes a file's object graph apart by keys, types and lengths. A damaged or foreign file fails at any of these,
by whatever Python raises there. Readers do that work in this block, so that the file is named and not this project
blamed. Every format's `read` is called in one (`ucp.formats.read`); blocks may be nested, the innermost tells: a reader
names the one file that it looks at where there is one.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ucp.errors import DamagedCheckpoint, UcpError

# What taking values apart raises on other values than expected, and what the standard library's readers do, and torch's
# (RuntimeError). Errors of ours, of the system and of memory pass, and so does what only a program's own fault raises.
_RAISED = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@contextmanager
def malformed(path: str | Path, what: str = "") -> Iterator[None]:
    """Raise DamagedCheckpoint for what the block raises on malformed content of this file (or folder).

    what: the key or part that is looked at, for the message.
    """
    try:
        yield
    except (UcpError, NotImplementedError):
        raise
    except _RAISED as error:
        where = f"{path}: {what} is" if what else f"{path}: is"
        reason = f"it lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise DamagedCheckpoint(
            f"{where} not what is written there ({reason[:300]}); the file is damaged, or another program's"
        ) from error
