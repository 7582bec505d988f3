"""What all commands share: exit codes, one-line errors, sizes on the command line and progress on a terminal.

Exit codes: 0 done; 1 the answer is no; 2 the input or the arguments are at fault; 3 an internal error.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from ucp.errors import BadArgument, UcpError

DONE, NO, AT_FAULT, INTERNAL = 0, 1, 2, 3
INTERRUPTED = 130  # as shells count a program that ended by Ctrl-C
PIPE_CLOSED = 141  # as they count one whose reader went away

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(AT_FAULT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def size(text: str) -> int:
    """Bytes of ``2GiB``, ``500MB``, ``1.5G`` or ``1048576``. For argparse: raises ArgumentTypeError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; use bytes or a unit, such as 2GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def count(text: str) -> int:
    """A whole number of at least 1. For argparse: raises ArgumentTypeError otherwise."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The option ``--set``, of every command that binds a spec; `sizes` reads it."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=N", help="a size, or a key as config.KEY=N; may be repeated"
    )


def sizes(pairs: Sequence[str]) -> dict[str, int]:
    """``NAME=N`` pairs as a mapping. Raises BadArgument for what is none."""
    out = {}
    for pair in pairs:
        name, sign, number = pair.partition("=")
        if not sign or not number.strip().isascii() or not number.strip().isdigit():
            raise BadArgument(f"--set {pair}: write NAME=N with a whole number, such as --set vocab=32000")
        out[name.strip()] = int(number)
    return out


def guarded(program: str, job: Callable[[], int], debug: bool) -> int:
    """Run a command's job and turn what goes wrong into one line on stderr and an exit code."""
    try:
        return job()
    except UcpError as error:
        if debug:
            logging.getLogger(program).debug("traceback", exc_info=True)
        say(f"{program}: error: {error}")
        return AT_FAULT
    except KeyboardInterrupt:
        say(f"{program}: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough; nothing more can be written, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:  # the last line of defence: whatever it is, it becomes exit code 3
        if debug:
            logging.getLogger(program).debug("traceback", exc_info=True)
        hint = "" if debug else " (run again with --debug for where it happened, and report it)"
        say(f"{program}: internal error: {type(error).__name__}: {error}{hint}")
        return INTERNAL


def start_logging(program: str, quiet: bool, debug: bool) -> None:
    """Send the library's warnings (everything, with ``debug``) to stderr, each as a line."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Line(program))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    level = logging.DEBUG if debug else logging.ERROR if quiet else logging.WARNING
    for name in ("ucp", program):
        logging.getLogger(name).setLevel(level)


class _Line(logging.Formatter):
    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        text = f"{self._program}: {record.levelname.lower()}: {record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def say(line: str) -> None:
    """A line on stderr; a message of several lines is joined, so that it stays one."""
    sys.stderr.write(" ".join(line.splitlines()) + "\n")


class ProgressBar:
    """How far a long command is: bytes, rate and time left, on stderr.

    On a terminal a line that is rewritten a few times a second. In a log file a line of its own every ``LOG_EVERY``
    seconds, the first after as long, so that short commands stay silent. Of the ranks of one job only the first shows
    any.
    """

    LOG_EVERY = 15.0

    def __init__(self, quiet: bool, what: str = "") -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = not quiet and os.environ.get("RANK", "0") == "0"
        self._what = f"{what} " if what else ""
        self._started = self._last = time.monotonic()
        self._drawn = False

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        pause = 0.2 if self._terminal else self.LOG_EVERY
        last = self._terminal and done >= total
        if not self._shown or (now - self._last < pause and not last):
            return
        self._last = now
        text = self._text(done, total, now - self._started)
        if self._terminal:
            self._drawn = True
            bar = "#" * int(30 * (done / total if total else 1.0))
            sys.stderr.write(f"\r[{bar:<30}] {text}\x1b[K")
        else:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def _text(self, done: int, total: int, seconds: float) -> str:
        rate = done / max(seconds, 1e-6)
        share = done / total if total else 1.0
        left = f", {_duration((total - done) / rate)} left" if rate and done < total else ""
        return f"{self._what}{share:4.0%}  {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s{left}"

    def close(self) -> None:
        """End the line, so that what follows begins on its own."""
        if self._drawn:
            sys.stderr.write("\n")
            self._drawn = False

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
