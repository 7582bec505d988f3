"""What can go wrong, as classes that a caller can catch, and how an error reaches other processes.

Every message is one sentence or two: the file or tensor, what was expected, what was found and what to do. The command
line catches `UcpError` (exit code 2) and prints its message; any other exception is a fault of this project.

An error that another process has to raise travels as a note, which is plain JSON (`noted`), and is raised there as the
same class with the same details (`rebuilt`). Collectives, pipes and files carry the same notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ucp.printable import line


class UcpError(Exception):
    """The base of all errors that are the fault of the input, the arguments or the environment.

    Its text is one line: control characters in what it quotes are escaped (`ucp.printable`).

    Parameters
    ----------
    message: what is wrong, without the file.
    file: the file that the text begins with, or None if it begins with no file.
    """

    def __init__(self, message: str, *, file: str | None = None) -> None:
        super().__init__(message if file is None else f"{file}: {message}")
        self.message = message
        self.file = file
        self.whole = str(self)
        """All of the text, also where ``str`` is cut short because another rank of the job says all of it."""

    def __str__(self) -> str:
        return line(super().__str__())

    def details(self) -> dict[str, Any]:
        """What the error knows in addition to its text, as plain JSON."""
        return {}

    def restore(self, details: Mapping[str, Any]) -> None:
        """Take back what `details` gave."""


class NotACheckpoint(UcpError):
    """The path holds nothing that is recognised as a checkpoint of any supported format."""


class DamagedCheckpoint(UcpError):
    """Files of a checkpoint are missing, truncated, mixed from several runs, or contradict each other."""


class DigestMismatch(DamagedCheckpoint):
    """Bytes of a file differ from the digest that was recorded when they were written."""


class RemovedMeanwhile(DamagedCheckpoint):
    """The checkpoint's folder was removed while it was read, by a run's ``keep_last`` or by somebody."""


class ApproximateCheckpoint(UcpError):
    """The checkpoint has layers that a repair has filled in, and the caller did not ask for such a checkpoint."""


class UnsafePickle(UcpError):
    """A pickle names a class or function outside the allow-list; nothing of it was run."""


class Unsupported(UcpError):
    """The input is understood, but what it asks for is refused by name."""


class Mismatch(UcpError):
    """Source and target do not fit: names, shapes, dtypes or hyperparameters differ."""


class BadArgument(UcpError):
    """An argument of a call, a flag or a configuration key is wrong."""


class UnknownName(BadArgument, KeyError):
    """A checkpoint has no parameter of this name. A KeyError, too, as a mapping raises it."""

    def __str__(self) -> str:
        return line(self.message)


class DestinationError(UcpError):
    """The destination exists already, cannot be written, or has too little space."""


class ProofFailed(UcpError):
    """After a load, the logical digests of the live state and of the checkpoint differ. The state is already loaded."""


class PartlyLoaded(UcpError):
    """A load failed when it had begun to change what is live, which now holds old values and new ones.

    The checkpoint's files are as they were. Nothing may be trained on or saved until a load succeeds.
    """


class SaveFailed(UcpError):
    """A save was given up because one of its ranks failed. The checkpoints that were there before are unchanged."""


class ProcessLost(UcpError):
    """A process that shared the work failed, was lost or never came. What was written can be continued from."""


class Position(NamedTuple):  # no dataclass: importing that module takes longer than all else a command's --help needs
    """A position in a text. file: its name, for people. line, column: counted from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"

    def right(self, characters: int) -> Position:
        """The position so many characters further on in the line."""
        return Position(self.file, self.line, self.column + characters)


class SpecError(UcpError):
    """A spec, or what it says of a model, is refused.

    ``str()`` is one line that begins with the position. ``picture`` is the offending text with a line of marks under
    the part that is meant, or an empty string.
    """

    def __init__(self, message: str, position: Position | None = None, picture: str = "") -> None:
        super().__init__(message, file=None if position is None else str(position))
        self.position = position
        self.picture = picture

    def details(self) -> dict[str, Any]:
        return {"position": self.position and self.position._asdict(), "picture": self.picture}

    def restore(self, details: Mapping[str, Any]) -> None:
        at = details["position"]
        self.position = None if at is None else Position(**at)
        self.picture = details["picture"]


def described(error: BaseException) -> str:
    """An error's text for people. For an error that is not one of ours, its class is named, too."""
    return str(error) if isinstance(error, UcpError) else f"{type(error).__name__}: {error}"


def noted(error: BaseException) -> dict[str, Any]:
    """An error as a note for another process, in plain JSON."""
    if not isinstance(error, UcpError):
        return {"kind": "", "text": described(error), "details": {}}
    return {"kind": type(error).__name__, "text": str(error), "details": error.details()}


def rebuilt(note: Mapping[str, Any], start: str = "", otherwise: type[Exception] = SaveFailed) -> Exception:
    """The error that a note stands for, with ``start`` in front of its text.

    otherwise: the class to raise for an error that is not one of ours.
    """
    found = globals().get(note["kind"])
    if not (isinstance(found, type) and issubclass(found, UcpError)):
        return otherwise(start + note["text"])
    error = found(start + note["text"])
    error.restore(note["details"])
    return error
