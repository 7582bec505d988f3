"""A keeper: the process that holds one node's snapshots of one run, whatever happens to the trainers.

It belongs to no trainer's session, and ignores what terminals and schedulers send to a job's processes. It serves this
node's processes on a Unix socket, and the other nodes' keepers on TCP. Both have to prove that they know the run's
token. It ends when the program has ended normally on this node. Otherwise it ends if nobody has asked for
`limits.KEEPER_LINGER_SECONDS` and no trainer is alive. It leaves nothing behind, since its memory has no name in any
file system.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ucp import limits
from ucp.memory.answers import Answers
from ucp.memory.peers import Peers
from ucp.memory.shelf import Shelf
from ucp.printable import logger
from ucp.storage.kept import places
from ucp.storage.kept.client import proof_of
from ucp.storage.kept.places import Note
from ucp.storage.kept.wire import receive, send

log = logger(__name__)


class Server:
    """The sockets of one keeper. note: what it leaves in the file system, so that others can find it."""

    def __init__(self, run: str, node: str, domain: str, host: str, token: str, said: Sequence[str] = ()) -> None:
        self._folder = places.folder()
        path = str(self._folder / f"{places.stem(run, node)}.sock")
        with suppress(FileNotFoundError):
            os.unlink(path)
        before = os.umask(0o177)
        try:
            self._near = socket.socket(socket.AF_UNIX)
            self._near.bind(path)
        finally:
            os.umask(before)
        self._near.listen(limits.KEEPER_BACKLOG_COUNT)
        self._far = socket.create_server((host, 0), backlog=limits.KEEPER_BACKLOG_COUNT)
        port = self._far.getsockname()[1]
        self.note = Note(run, node, domain, os.getpid(), host, port, token, path)
        self.answers = Answers(Shelf(node), Peers(run, node, token), self.note, self.end, said)
        self._ended = threading.Event()
        self._left: Path | None = None

    def serve(self) -> None:
        """Answer until the end."""
        for listener in (self._near, self._far):
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        self._left = places.leave(self.note)
        while not self._ended.wait(limits.KEEPER_WATCH_SECONDS):
            if time.monotonic() - self.answers.heard > limits.KEEPER_LINGER_SECONDS and not self.answers.is_attended():
                log.warning("nobody has asked for %s s; ending", limits.KEEPER_LINGER_SECONDS)
                self.end()
        self._clear()

    def end(self) -> None:
        self._ended.set()

    def _clear(self) -> None:
        if places.note_of(self.note.run, self.note.node) != self.note:
            return  # another keeper has taken this one's place
        for path in (self._left, Path(self.note.socket)):
            with suppress(OSError):
                if path is not None:
                    path.unlink()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                channel, _ = listener.accept()
                threading.Thread(target=self._converse, args=(channel,), daemon=True).start()
            except (OSError, RuntimeError) as error:
                # No descriptor or thread to spare. Those who do not show the token are let go in a few seconds.
                log.warning("a connection was not taken: %s", error)
                time.sleep(limits.KEEPER_BREATH_SECONDS)

    def _converse(self, channel: socket.socket) -> None:
        with channel, suppress(OSError):
            far = channel.family != socket.AF_UNIX
            if far:
                channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            channel.settimeout(limits.KEEPER_CONNECT_SECONDS)
            nonce = secrets.token_hex(16)
            send(channel, {"nonce": nonce})
            hello = receive(channel, limits.KEEPER_HELLO_BYTES)
            if hello is None or not self._knows(hello.header, nonce):
                send(channel, {"fault": f"the run or its token is another one here than '{self.note.run}'"})
                return
            send(channel, {})
            channel.settimeout(None)
            while (frame := receive(channel)) is not None:
                answer = self.answers.to(frame, far)
                send(channel, answer.header, answer.body, None if far else answer.file)

    def _knows(self, hello: Mapping[str, Any], nonce: str) -> bool:
        proof = proof_of(self.note.token, nonce, self.note.run)
        return hello.get("run") == self.note.run and hmac.compare_digest(
            str(hello.get("proof", "")).encode("utf-8", "surrogatepass"), proof.encode()
        )


class Said(logging.Handler):
    """Keeps the last warnings. A keeper has no terminal, and reports them with its status."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=limits.KEEPER_LINES_COUNT)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{time.strftime('%H:%M:%S')} {self.format(record)}")


def main(run: str, node: str, domain: str, host: str, token: str) -> None:
    """The process's program: become a daemon, say over standard output that it is there, and serve."""
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    said = Said()
    logging.basicConfig(level=logging.WARNING, handlers=[said], force=True)
    try:
        server = Server(run, node, domain, host, token, said.lines)
    except BaseException as error:
        os.write(1, f"failed: {error}\n".encode())
        raise
    with suppress(OSError):
        os.nice(limits.WRITER_NICENESS)
    threading.Thread(target=_say, args=(server,), daemon=True).start()
    server.serve()


def _say(server: Server) -> None:
    """Once the note is there, tell the process that waits, and release standard output."""
    while places.note_of(server.note.run, server.note.node) != server.note:
        time.sleep(limits.RECEIPT_POLL_SECONDS[0])
    os.write(1, b"ready\n")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
