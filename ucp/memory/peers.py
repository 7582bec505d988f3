"""The other keepers of a run, as one of them sees them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucp.printable import logger
from ucp.storage.kept.client import Client, KeeperGone, of_address

log = logger(__name__)


@dataclass(frozen=True)
class NodeAddress:
    """A node of the job. domain: the part of the machines that fails together with it. host, port: its keeper's."""

    node: str
    domain: str
    host: str
    port: int


class Peers:
    """The other keepers of the job that runs now.

    former: nodes of the run that are not part of this job. What they hold may be needed to resume.
    """

    def __init__(self, run: str, node: str, token: str) -> None:
        self._run, self._node, self._token = run, node, token
        self._clients: dict[str, Client] = {}
        self._lost: set[str] = set()
        self._lock = threading.Lock()
        self.members: tuple[NodeAddress, ...] = ()
        self.former: tuple[NodeAddress, ...] = ()

    def join(self, members: Sequence[Mapping[str, Any]]) -> None:
        """Set the job's nodes, with this one."""
        with self._lock:
            for client in self._clients.values():
                client.close()
            before = {one.node: one for one in (*self.former, *self.members)}
            self.members = tuple(NodeAddress(**one) for one in members)
            self._lost.clear()
            self._clients = {}
            self._know([one for one in self.members if one.node != self._node])
            here = {one.node for one in self.members}
            self.former = tuple(one for name, one in before.items() if name not in here)
            self._know(self.former)

    def learn(self, members: Sequence[Mapping[str, Any]]) -> list[str]:
        """Take over nodes that another keeper knows from before, and this one does not. Returns their names."""
        with self._lock:
            here = {self._node, *self._clients}
            new = [NodeAddress(**one) for one in members if one["node"] not in here]
            self.former += tuple(new)
            self._know(new)
        return [one.node for one in new]

    def part(self) -> None:
        """Let the keepers of former nodes end, since what they hold is no longer needed."""
        with self._lock:
            former, self.former = self.former, ()
            clients = [self._clients.pop(one.node) for one in former]
        for client in clients:
            try:
                client.ask("leave")
            except OSError as error:
                log.warning("a keeper of a node that left was not told to end, and may stay: %s", error)
            client.close()

    def _know(self, members: Sequence[NodeAddress]) -> None:
        for one in members:
            self._clients[one.node] = of_address(self._run, one.node, one.host, one.port, self._token)

    @property
    def nodes(self) -> list[str]:
        """The job's other nodes, in order."""
        return sorted({one.node for one in self.members} - {self._node})

    @property
    def known(self) -> list[dict[str, Any]]:
        """The job's nodes and the former ones, in the form in which other keepers get them."""
        return [vars(one) for one in (*self.members, *self.former)]

    @property
    def lost(self) -> list[str]:
        """The nodes that were not reached when they were last asked."""
        return sorted(self._lost)

    def ask(self, node: str, op: str, body: Any = b"", **fields: Any) -> Any:
        """One peer's answer. Raises KeeperGone, and OSError for what it refuses."""
        client = self._clients.get(node)
        if client is None:
            raise KeeperGone(111, f"node '{node}' is no part of this job")
        try:
            answer = client.ask(op, body, **fields)
        except KeeperGone as error:
            if node not in self._lost:
                log.warning("%s", error.strerror or error)
            self._lost.add(node)
            raise
        self._lost.discard(node)
        return answer

    def tell(self, op: str, body: Any = b"", **fields: Any) -> None:
        """Send the same message to all of them. Those that cannot be reached do not get it. Raises what one refuses."""
        for node in self.nodes:
            if node in self._lost:
                continue
            try:
                self.ask(node, op, body, **fields)
            except KeeperGone:
                continue

    def reach(self) -> list[str]:
        """Try the lost nodes again. Returns those that are still lost."""
        for node in self.lost:
            try:
                self.ask(node, "ping")
            except OSError:
                continue
        return self.lost
