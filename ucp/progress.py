"""The progress of long work: bytes, rate and time left, on stderr or in the log.

On a terminal it is tqdm's bar, redrawn every `limits.PROGRESS_REDRAW_SECONDS` once `PROGRESS_PATIENCE_SECONDS` are
over. Elsewhere it is a line of its own every `PROGRESS_LOG_SECONDS`, the first one after that time. So short work shows
nothing. Only the first rank of a job shows progress. The environment variable ``UCP_PROGRESS=0`` turns it off.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ucp import limits
from ucp.printable import line, logger

log = logger(__name__)


class ProgressBar:
    """Called with the bytes done and the bytes in all, as often as one likes. A context manager.

    quiet: show nothing.
    what: what is being done, in one word.
    line: takes the lines if stderr is not a terminal. By default they go to stderr.
    """

    def __init__(self, quiet: bool, what: str = "", line: Callable[[str], None] | None = None) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = not quiet and os.environ.get("RANK", "0") == "0" and os.environ.get("UCP_PROGRESS") != "0"
        self._what = f"{what} " if what else ""
        self._line = line or _on_stderr
        self._started = self._last = time.monotonic()
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._shown or (
            self._terminal and self._bar is None and now - self._started < limits.PROGRESS_PATIENCE_SECONDS
        ):
            return
        pause = limits.PROGRESS_REDRAW_SECONDS if self._terminal else limits.PROGRESS_LOG_SECONDS
        last = self._terminal and done >= total
        if now - self._last < pause and not last:
            return
        self._last = now
        text = self._text(done, total, now - self._started)
        if not self._terminal:
            self._line(text)
        elif self._bar is None:
            self._bar = _drawn(text, done, total)
        else:
            self._bar.n, self._bar.total, self._bar.desc = done, total, text
            self._bar.refresh()

    def _text(self, done: int, total: int, seconds: float) -> str:
        rate = done / max(seconds, 1e-6)
        share = done / total if total else 1.0
        left = f", {_duration((total - done) / rate)} left" if rate and done < total else ""
        unit, digits, word = (1e9, 2, "GB") if total >= 1e9 else (1e6, 1, "MB")
        amount = f"{done / unit:.{digits}f} of {total / unit:.{digits}f} {word}"
        return f"{self._what}{share:4.0%}  {amount}, {rate / 1e6:.0f} MB/s{left}"

    def finish(self, total: int) -> None:
        """Show that all is done, if any progress was shown before."""
        if self._bar is not None:
            self(total, total)

    def close(self) -> None:
        """End the line, so that what follows begins on a line of its own."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def watching(what: str, done: Callable[[], int], total: int, shown: bool = True) -> Iterator[None]:
    """Show how far the work in this block is.

    done: gives the bytes done so far; another thread calls it a few times a second.
    total: about how many bytes there are in all.
    shown: False on all ranks but one.
    """
    if not shown or total <= 0:
        yield
        return
    over = threading.Event()
    bar = ProgressBar(False, what, _in_the_log)
    well = begun = False

    def show() -> None:
        nonlocal begun
        if over.wait(limits.PROGRESS_PATIENCE_SECONDS):
            return
        begun = True
        with bar:
            while not over.wait(limits.PROGRESS_REDRAW_SECONDS):
                bar(min(done(), total - 1), total)  # it isn't over until the block is
            if well:
                bar.finish(total)

    thread = threading.Thread(target=show, name="ucp-progress", daemon=True)
    thread.start()
    try:
        yield
        well = True
    finally:
        over.set()
        if begun:
            thread.join()  # otherwise it ends by itself and shows nothing


def tell(logger: logging.Logger, text: str) -> None:
    """Show a line that has to be seen: in the log, or on stderr if the program shows no INFO records."""
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("%s", text)
    else:
        _on_stderr(f"ucp: {text}")


def _in_the_log(text: str) -> None:
    tell(log, text)


def _drawn(text: str, done: int, total: int) -> Any:
    """A tqdm bar that has just been drawn. The text is ours, so that a bar and a log say the same."""
    from tqdm import tqdm  # imported late: it takes longer than most commands' start

    class Bar(tqdm):
        monitor_interval = 0  # no thread to redraw bars that are updated too seldom

    columns = _columns()
    return Bar(
        desc=text,
        initial=done,
        total=total,
        bar_format="[{bar:30}] {desc}" if columns >= 100 else "[{bar:10}] {desc}",
        ascii=" #",
        # A terminal that does not know its size says 0, and tqdm would draw nothing there.
        **({"dynamic_ncols": True} if _columns(0) else {"ncols": columns, "nrows": 20}),
    )


def _columns(unknown: int = 120) -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or unknown
    except (OSError, ValueError):
        return unknown


def _on_stderr(text: str) -> None:
    sys.stderr.write(f"{line(text)}\n")
    sys.stderr.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
