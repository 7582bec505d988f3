"""What can go wrong, as classes that a caller can catch.

Every message is one sentence or two: the file or tensor, what was expected, what was found and what to do. The command
line catches `UcpError` (exit code 2) and prints its message; any other exception is a fault of this project.
"""

from __future__ import annotations

from ucp.printable import line


class UcpError(Exception):
    """The base of all errors that the input, the arguments or the environment are at fault for.

    Its text is one line: control characters in what it quotes are escaped (`ucp.printable`).
    """

    def __str__(self) -> str:
        return line(super().__str__())


class NotACheckpoint(UcpError):
    """The path holds nothing that is recognised as a checkpoint of any supported format."""


class DamagedCheckpoint(UcpError):
    """Files of a checkpoint are missing, truncated, mixed from several runs, or contradict each other."""


class DigestMismatch(DamagedCheckpoint):
    """Bytes of a file differ from the digest that was recorded when they were written."""


class RemovedMeanwhile(DamagedCheckpoint):
    """The checkpoint's folder was removed while it was read: by a run's ``keep_last``, or by somebody."""


class UnsafePickle(UcpError):
    """A pickle names a class or function outside the allow-list; nothing of it was run."""


class Unsupported(UcpError):
    """The input is understood, but what it asks for is refused by name."""


class Mismatch(UcpError):
    """Source and target do not fit: names, shapes, dtypes or hyperparameters differ."""


class BadArgument(UcpError):
    """An argument of a call, a flag or a configuration key is wrong."""


class DestinationError(UcpError):
    """The destination exists already, cannot be written, or has too little space."""


class SaveFailed(UcpError):
    """A save was given up, because of one of its ranks; the checkpoints that were there before are as they were."""


class ProcessLost(UcpError):
    """A process that shared the work failed, was lost or never came; what was written is there to continue from."""
