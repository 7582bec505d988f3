"""A real S3 server on this machine, for tests of what lies behind URLs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest


@contextmanager
def serve() -> Iterator[str]:
    """A bucket of a server process of its own; its URL."""
    s3fs = pytest.importorskip("s3fs")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr is not None
        address = next(line.split("http://")[1].strip() for line in server.stderr if "Running on http://" in line)
        # It tells of every request; once nobody read that any more, it would stop.
        Thread(target=deque, args=(server.stderr, 0), daemon=True).start()
        before = dict(os.environ)
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://{address}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        fs = s3fs.S3FileSystem(use_listings_cache=False)
        for _ in range(50):
            try:
                fs.mkdir("runs")
                break
            except OSError:
                time.sleep(0.1)
        yield "s3://runs"
    finally:
        server.terminate()
        server.wait(10)
        os.environ.clear()
        os.environ |= before


def put(folder: Path, url: str) -> None:
    """Copy a folder there, with the file system's own client."""
    import s3fs

    s3fs.S3FileSystem(use_listings_cache=False).put(str(folder), url, recursive=True)


def get(url: str, folder: Path) -> None:
    """Copy what lies below the URL into a new folder, with the file system's own client."""
    import s3fs

    s3fs.S3FileSystem(use_listings_cache=False).get(f"{url}/", str(folder), recursive=True)
