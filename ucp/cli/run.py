"""What all commands share: exit codes, one-line errors and sizes on the command line.

Exit codes: 0 done; 1 the answer is no; 2 the input or the arguments are at fault; 3 an internal error.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from ucp import printable
from ucp.errors import BadArgument, UcpError
from ucp.formats import base
from ucp.formats.base import Option

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
        self.exit(AT_FAULT, f"{self.prog}: error: {printable.line(message)} (see {self.prog} --help)\n")


class Version(argparse.Action):
    """The option ``--version``. The number is looked up only then, since that takes longer than all else."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from ucp.version import version

        sys.stdout.write(f"{parser.prog} {version()}\n")
        parser.exit(DONE)


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
    """``NAME=N`` pairs as a mapping. Raises BadArgument for anything else."""
    out = {}
    for pair in pairs:
        name, sign, number = pair.partition("=")
        if not sign or not number.strip().isascii() or not number.strip().isdigit():
            raise BadArgument(f"--set {pair}: write NAME=N with a whole number, such as --set vocab=32000")
        out[name.strip()] = int(number)
    return out


def add_option(parser: argparse.ArgumentParser, option: Option, suffix: str = "") -> None:
    """Add a format's own option as an argument, unless only Python can give it. An option that is not given is not in
    the result."""
    if option.kind == base.FLAG:
        parser.add_argument(option.flag, action="store_true", default=argparse.SUPPRESS, help=f"{option.about}{suffix}")
    elif option.kind != base.OBJECT:
        parser.add_argument(
            option.flag,
            type=size if option.kind == base.SIZE else str,
            default=argparse.SUPPRESS,
            metavar=option.metavar,
            help=f"{option.about}{suffix}",
        )


def option(pair: str, takes: Mapping[str, Option]) -> tuple[str, Any]:
    """``NAME=VALUE`` as an option's name and its value. takes: the options that there are. Raises BadArgument."""
    name, sign, text = pair.partition("=")
    name = name.strip().replace("-", "_")
    if not sign or name not in takes:
        known = f"known are {', '.join(takes)}" if takes else "this format has none"
        raise BadArgument(f"--option {pair}: write NAME=VALUE with the name of an option; {known}")
    kind = takes[name].kind
    if kind == base.FLAG and text in ("true", "false"):
        return name, text == "true"
    if kind == base.FLAG:
        raise BadArgument(f"--option {pair}: write {name}=true or {name}=false")
    if kind == base.SIZE:
        try:
            return name, size(text)
        except argparse.ArgumentTypeError as error:
            raise BadArgument(f"--option {pair}: {error}") from error
    return name, text


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
        # The reader of the output has seen enough. Nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:  # the last line of defence: whatever it is, it becomes exit code 3
        if debug:
            logging.getLogger(program).debug("traceback", exc_info=True)
        hint = "" if debug else " (run again with --debug for where it happened, and report it)"
        text = " ".join(str(error).splitlines())  # other libraries' messages may have several lines
        say(f"{program}: internal error: {type(error).__name__}: {text}{hint}")
        return INTERNAL


def start_logging(program: str, quiet: bool, debug: bool) -> None:
    """Send the library's warnings (everything, with ``debug``) to stderr, each as a line."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine(program))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    level = logging.DEBUG if debug else logging.ERROR if quiet else logging.WARNING
    for name in ("ucp", program):
        logging.getLogger(name).setLevel(level)


class _OneLine(logging.Formatter):
    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        text = printable.line(f"{self._program}: {record.levelname.lower()}: {record.getMessage()}")
        if not record.exc_info:
            return text
        return f"{text}\n{printable.lines(self.formatException(record.exc_info))}"


def say(line: str) -> None:
    """A line on stderr, whatever the message quotes."""
    sys.stderr.write(printable.line(line) + "\n")
