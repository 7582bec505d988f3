"""A proxy before a test's S3 server, which remembers every request and spoils those that a test picks."""

from __future__ import annotations

import http.client
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

UNAVAILABLE, DROPPED, CUT = "503", "dropped", "cut"
"""Answers that spoil a request: 'try later'; none at all; the right one, which ends in the middle."""


@dataclass
class Request:
    """What was asked. target: path and query. began, ended: seconds of the monotonic clock."""

    method: str
    target: str
    range: str | None
    began: float
    ended: float = 0.0

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query, keep_blank_values=True)


@dataclass
class Proxy:
    """spoil: how a request is to fail, or None. delay: seconds that every request takes at least."""

    requests: list[Request] = field(default_factory=list)
    spoil: Callable[[Request], str | None] = lambda request: None
    delay: float = 0.0

    def of(self, method: str, name: str = "") -> list[Request]:
        """The requests of this method whose path contains the name."""
        return [r for r in self.requests if r.method == method and name in r.path]


def most_at_once(requests: list[Request]) -> int:
    """How many of the requests were under way at the same time."""
    return max((sum(r.began <= other.began < r.ended for r in requests) for other in requests), default=0)


@contextmanager
def between() -> Iterator[Proxy]:
    """Everything that this process asks the S3 server goes through the proxy meanwhile; below ours there are few
    retries, so that what keeps failing does so soon."""
    import s3fs

    server = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    proxy = Proxy()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            request = Request(self.command, self.path, self.headers.get("Range"), time.monotonic())
            proxy.requests.append(request)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            time.sleep(proxy.delay)
            try:
                self.answer(request, body)
            finally:
                request.ended = time.monotonic()

        def answer(self, request: Request, body: bytes) -> None:
            fault = proxy.spoil(request)
            if fault == DROPPED:
                self.close_connection = True
                with suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                return
            if fault == UNAVAILABLE:
                self.reply(503, {}, b"<Error><Code>ServiceUnavailable</Code><Message>later</Message></Error>")
                return
            onward = http.client.HTTPConnection(server.hostname or "", server.port, timeout=60)
            onward.request(self.command, self.path, body, dict(self.headers))
            found = onward.getresponse()
            raw = found.read()
            headers = {k: v for k, v in found.getheaders() if k.lower() not in ("content-length", "connection")}
            self.reply(found.status, headers, raw, found.getheader("Content-Length"), cut=fault == CUT)
            onward.close()

        def reply(
            self, status: int, headers: dict[str, str], raw: bytes, length: str | None = None, cut: bool = False
        ) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(raw)))
            self.end_headers()
            self.wfile.write(raw[: len(raw) // 2] if cut else raw)
            if cut:
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Nothing is told of each request."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, daemon=True)
        thread.start()
        before = dict(os.environ)
        os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{listener.server_port}", "AWS_MAX_ATTEMPTS": "2"}
        s3fs.S3FileSystem.clear_instance_cache()
        retries, s3fs.S3FileSystem.retries = s3fs.S3FileSystem.retries, 2
        try:
            yield proxy
        finally:
            s3fs.S3FileSystem.retries = retries
            os.environ.clear()
            os.environ |= before
            s3fs.S3FileSystem.clear_instance_cache()
            listener.shutdown()
            thread.join()
