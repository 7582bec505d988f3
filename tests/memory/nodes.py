"""Keepers of several nodes on this machine, and generations that a test puts into them without a trainer."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ucp.formats.universal import manifest
from ucp.memory import start
from ucp.storage.digests import ChunkDigests, digest_chunks
from ucp.storage.kept.client import Client, of_note
from ucp.storage.kept.places import Note

RUN = "/runs/llama"


class Nodes:
    """Keepers by node."""

    def __init__(self, names: Sequence[str], redundancy: int = 1, **job: Any) -> None:
        self.token = secrets.token_hex(16)
        self.job = {"redundancy": redundancy, "keep": 2, "limit": None, "network": None, **job}
        self.notes: dict[str, Note] = {}
        self.clients: dict[str, Client] = {}
        self.start(names)

    def start(self, names: Sequence[str]) -> None:
        """The job begins, anew, on these nodes."""
        for name in names:
            self.notes[name], _ = start.started(RUN, name, token=self.token)
            self.clients[name] = of_note(self.notes[name])
        members = [
            {"node": n, "domain": n, "host": self.notes[n].host, "port": self.notes[n].port} for n in sorted(names)
        ]
        for name in names:
            self.clients[name].ask("job", job={**self.job, "members": members, "groups": [sorted(names)]})

    def split(self, *sides: Sequence[str]) -> list[Wire]:
        """The job begins anew on all nodes. Those of different sides reach each other over wires that can be cut."""
        wires = {n: Wire(self.notes[n].host, self.notes[n].port) for n in self.clients}
        for side in sides:
            for name in side:
                members = [
                    {"node": n, "domain": n, "host": self.notes[n].host, "port": port}
                    for n in sorted(self.clients)
                    for port in [self.notes[n].port if n in side else wires[n].port]
                ]
                self.clients[name].ask("job", job={**self.job, "members": members, "groups": [sorted(self.clients)]})
        return list(wires.values())

    def kill(self, name: str) -> None:
        os.kill(self.notes[name].pid, signal.SIGKILL)
        wait_for(lambda: not os.path.exists(f"/proc/{self.notes[name].pid}"))

    def save(self, step: int, size: int = 3_000_000, protected: bool = True) -> dict[str, bytes]:
        """A generation of one file a node, of different sizes; the bytes by path."""
        tag, save = f"global_step{step}", secrets.token_hex(8)
        rng = np.random.default_rng(step)
        files: dict[str, bytes] = {}
        for k, (name, client) in enumerate(sorted(self.clients.items())):
            body = rng.integers(0, 256, size + 1000 * k, dtype=np.uint8).tobytes()
            path = f"{tag}/{save}/rank-{k:05d}.safetensors"
            client.ask("store", body, path=path)
            files[path] = body
            assert name
        first = self.clients[min(self.clients)]
        first.ask("put", framed(tag, files), path=f"{tag}/{manifest.NAME}")
        if protected:
            wait_for(lambda: self.status()[0]["protected"], 20, self.all_status)
        return files

    def flip(self, name: str, size: int, at: int) -> None:
        """Change a byte of the keeper's memory that has this size, past the keeper."""
        for link in Path(f"/proc/{self.notes[name].pid}/fd").iterdir():
            if "ucp-kept" in os.readlink(link) and os.stat(link).st_size == size:
                with open(link, "r+b") as stream:
                    stream.seek(at)
                    byte = stream.read(1)[0]
                    stream.seek(at)
                    stream.write(bytes([byte ^ 16]))
                return
        raise AssertionError(f"no memory of {size} bytes")

    def status(self, node: str | None = None) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.clients[node or min(self.clients)].ask("status").header["generations"]
        return found

    def all_status(self) -> list[Any]:
        return [client.ask("status").header for client in self.clients.values()]

    def recover(self, node: str | None = None) -> Mapping[str, Any]:
        return self.clients[node or min(self.clients)].ask("recover").header

    def read(self, path: str, size: int, node: str | None = None) -> bytes:
        return bytes(self.clients[node or min(self.clients)].ask("read", path=path, start=0, stop=size).body)


class Wire:
    """A TCP connection's way to a keeper, which can be cut and mended. Nothing passes a cut one, and nobody listens."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._open: list[socket.socket] = []
        self._listener = socket.create_server((host, 0))
        self.port = self._listener.getsockname()[1]
        self._listen()

    def cut(self) -> None:
        for one in (self._listener, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open.clear()

    def mend(self) -> None:
        self._listener = socket.create_server((self._to[0], self.port))
        self._listen()

    def _listen(self) -> None:
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self._to)
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while raw := source.recv(1 << 16):
            sink.sendall(raw)
    for one in (source, sink):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def framed(tag: str, files: Mapping[str, bytes]) -> bytes:
    """A manifest with the table of files, all that keepers read of one."""
    table = {
        "path": [path.removeprefix(f"{tag}/") for path in files],
        "size": [len(body) for body in files.values()],
        "digests": [ChunkDigests(len(body), digest_chunks(body)).text for body in files.values()],
    }
    return manifest.frame({"ucp": manifest.VERSION, "files": table})


def wait_for(what: Callable[[], Any], seconds: float = 20.0, told: Callable[[], Any] = str) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, told()
        time.sleep(0.01)
