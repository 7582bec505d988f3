"""What the parts of a keeper need from the whole keeper."""

from __future__ import annotations

from typing import Any, Protocol

from ucp.memory.peers import Peers
from ucp.memory.shelf import Shelf
from ucp.storage.kept.wire import Frame


class Keeper(Protocol):
    """A keeper, as its parts see it. `ask` asks any node's keeper, this one included, and raises OSError."""

    shelf: Shelf
    peers: Peers

    def ask(self, node: str, op: str, body: Any = b"", **fields: Any) -> Frame: ...
