"""Asking a keeper: over its Unix socket on the same machine, over TCP from another node's keeper."""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ucp import limits
from ucp.storage.kept.places import Note
from ucp.storage.kept.wire import Frame, receive, send

# Requests that a keeper may take long to answer.
_LONG = ("recover", "scrub", "adopt", "lease")


class KeeperGone(ConnectionError):
    """There is no keeper, or it has ended, or it does not answer."""


class Client:
    """Asks one keeper. Several threads may use it at once, each with a connection of its own."""

    def __init__(self, who: str, connect: Callable[[], socket.socket]) -> None:
        self.who = who
        self._connect = connect
        self._idle: list[socket.socket] = []
        self._lock = threading.Lock()
        self._process = os.getpid()

    def ask(self, op: str, body: Any = b"", **fields: Any) -> Frame:
        """The answer to a request. Raises KeeperGone, and OSError for what the keeper refuses."""
        taken = self._take()
        patience = limits.KEEPER_ANSWER_SECONDS if op in _LONG else limits.KEEPER_WORD_SECONDS
        try:
            channel = taken or self._connect()
            channel.settimeout(patience)
            try:
                answer = self._exchange(channel, op, body, fields)
            except OSError as error:
                channel.close()
                if taken is None or isinstance(error, TimeoutError):
                    raise
                channel = self._connect()  # the kept connection was to a keeper that has ended
                channel.settimeout(patience)
                answer = self._exchange(channel, op, body, fields)
        except OSError as error:
            raise KeeperGone(errno.ECONNREFUSED, f"{self.who} is not reached: {error.strerror or error}") from error
        with self._lock:
            self._idle.append(channel)
        fault = answer.header.get("fault")
        if fault is not None:
            if answer.file is not None:
                os.close(answer.file)
            number = int(answer.header.get("errno") or errno.EIO)
            raise OSError(number, str(fault))
        return answer

    def close(self) -> None:
        """Close the connections. Asking again opens new ones."""
        with self._lock:
            for channel in self._idle:
                channel.close()
            self._idle.clear()

    def _take(self) -> socket.socket | None:
        with self._lock:
            if self._process != os.getpid():  # after a fork, the connections are the parent's
                self._idle, self._process = [], os.getpid()
            return self._idle.pop() if self._idle else None

    @staticmethod
    def _exchange(channel: socket.socket, op: str, body: Any, fields: Mapping[str, Any]) -> Frame:
        send(channel, {"op": op, **fields}, body)
        answer = receive(channel)
        if answer is None:
            raise ConnectionError("the connection was closed")
        return answer


def of_note(note: Note) -> Client:
    """A client of a keeper on this machine."""

    def connect() -> socket.socket:
        channel = socket.socket(socket.AF_UNIX)
        try:
            channel.settimeout(limits.KEEPER_CONNECT_SECONDS)
            channel.connect(note.socket)
            peer = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            if struct.unpack("3i", peer)[1] != os.getuid():
                raise PermissionError(errno.EPERM, "the socket is another user's")
            greet(channel, note.run, note.token)
        except BaseException:
            channel.close()
            raise
        return channel

    return Client(f"the keeper of '{note.run}' on {note.node}", connect)


def of_address(run: str, node: str, host: str, port: int, token: str) -> Client:
    """A client of another node's keeper."""

    def connect() -> socket.socket:
        channel = socket.create_connection((host, port), limits.KEEPER_CONNECT_SECONDS)
        try:
            channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            greet(channel, run, token)
        except BaseException:
            channel.close()
            raise
        return channel

    return Client(f"the keeper of '{run}' on {node}", connect)


def greet(channel: socket.socket, run: str, token: str) -> None:
    """Show that this side knows the run's token, without sending it. Raises OSError."""
    hello = receive(channel, limits.KEEPER_HELLO_BYTES)
    nonce = "" if hello is None else str(hello.header.get("nonce", ""))
    send(channel, {"op": "hello", "run": run, "proof": proof_of(token, nonce, run)})
    answer = receive(channel, limits.KEEPER_HELLO_BYTES)
    if answer is None or "fault" in answer.header:
        why = "it closed the connection" if answer is None else str(answer.header["fault"])
        raise PermissionError(errno.EPERM, why)


def proof_of(token: str, nonce: str, run: str) -> str:
    """The proof that somebody knows the token."""
    text = f"{nonce}\n{run}".encode("utf-8", "surrogatepass")
    return hmac.new(token.encode(), text, hashlib.sha256).hexdigest()
