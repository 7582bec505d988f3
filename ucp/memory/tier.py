"""A training program's side of the memory tier: its nodes' keepers, its snapshots, its end.

tier = Tier(options)
tier.attach("/data/runs/llama", nbytes)     # collective: every node has a keeper, and they know of each other
tier.snapshot(source, "global_step8")       # collective; goes on beside forward and backward, as a save does
tier.hold()                                 # before anything changes the weights or the optimizer's states
"""

from __future__ import annotations

import atexit
import os
import secrets
import socket
import sys
from collections.abc import Callable
from typing import Any

from ucp import limits
from ucp.errors import BadArgument, DestinationError, SaveFailed
from ucp.job import ranks
from ucp.memory import start
from ucp.memory.coding import check
from ucp.memory.groups import divided
from ucp.memory.options import Options, check_run
from ucp.memory.pool import LentPool
from ucp.printable import logger
from ucp.saving.background import Saver
from ucp.saving.save import SaveReport
from ucp.saving.source import Source
from ucp.storage.kept import places
from ucp.storage.kept.client import Client, of_note
from ucp.storage.kept.files import KeptPath, of_run

log = logger(__name__)

# Held until the program ends: a function that made one may have returned long before.
_tiers: set[Tier] = set()


class Tier:
    """The snapshots of one training state. done: as for `Saver`. skipped: how many were due and not taken, since the
    last one was still under way (policy 'skip')."""

    def __init__(self, options: Options, done: Callable[[SaveReport], None] | None = None) -> None:
        self.options = options
        self.run: str | None = None
        self.saver: Saver | None = None
        self._done = done
        self._nbytes = 0
        self.skipped = 0
        self._pool: LentPool | None = None
        self._own: Client | None = None

    @property
    def location(self) -> str:
        """The run's memory, as `ucp.open` takes it."""
        return str(KeptPath(self.run or ""))

    # --- keepers -----------------------------------------------------------------------------------------------------

    def attach(self, folder: str | os.PathLike[str], nbytes: int) -> None:
        """Make sure that every node has a keeper, and start missing ones. Collective. Does nothing the second time.

        folder: the run is named after it, unless the options name it. nbytes: about how many bytes this rank's file
        will have. Raises BadArgument if no keeper can be started, a keeper belongs to another run, or the limit is too
        small.
        """
        run = ranks.from_first(lambda: self.options.run or os.path.abspath(folder))
        check_run(run)
        if run == self.run:
            self._nbytes = nbytes or self._nbytes
            return
        if self.run is not None:
            raise BadArgument(
                f"snapshots go to the memory of '{self.run}', and '{run}' is another one; give both one name with "
                '"memory": {"run": ...}'
            )
        self._nbytes = nbytes
        self._join(run)
        self.run = run
        pool = self._pool = LentPool(of_run(run), ranks.rank())
        self.saver = Saver(self._done, pool=pool)
        _watch_end(self)

    def _join(self, run: str) -> None:
        """Find or start the keepers, and tell each about all of them."""
        nodes = ranks.gather((places.node(), self._nbytes))
        names = [name for name, _ in nodes]
        mine, first = places.node(), names.index(places.node()) == ranks.rank()
        self._check_limit(run, nodes)
        known = ranks.gather(_token(run, mine) if first else None)
        tokens = {found for found in known if found is not None}
        token = self._agreed(run, tokens)
        host = own_address()
        ranks.all_or_none(lambda: start.started(run, mine, host, token) if first else None)
        note, _ = ranks.all_or_none(lambda: start.started(run, mine, host, token))
        of_run(run).forget()
        own = self._own = of_note(note)
        here = ranks.all_or_none(lambda: own.ask("come", pid=os.getpid()).header)
        here = self._alone(run, dict(here))
        members = {name: dict(one) for name, one in zip(names, ranks.gather(here), strict=True)}
        ranks.all_or_none(lambda: check(self.options.redundancy))
        groups, alone = divided([(m["node"], m["domain"]) for m in members.values()], self.options)
        if alone and self.options.redundancy and ranks.rank() == 0:
            log.warning("%s", alone)
        job = {
            "members": list(members.values()),
            "groups": groups,
            "redundancy": self.options.redundancy,
            "keep": self.options.keep,
            "limit": self.options.limit,
            "network": self.options.network,
        }
        ranks.all_or_none(lambda: own.ask("job", job=job) if first else None)

    def _alone(self, run: str, here: dict[str, Any]) -> dict[str, Any]:
        """What this node's keeper says of itself, and a warning if another program that is alive keeps the same run."""
        ours = {pid for node, pid in ranks.gather((places.node(), os.getpid())) if node == places.node()}
        others = sorted(set(here.pop("trainers")) - ours)
        if others and min(ours) == os.getpid():
            log.warning(
                "memory of '%s': another program that is alive keeps the same run on node '%s' (processes %s); each "
                "resumes from the other's snapshots and replaces them, so end one of them, or give one another name "
                'with "memory": {"run": ...}',
                run,
                places.node(),
                ", ".join(map(str, others[:8])),
            )
        return here

    def _check_limit(self, run: str, nodes: list[tuple[str, int]]) -> None:
        """Refuse at the start if the snapshots would not fit."""
        if self.options.limit is None:
            return
        sums: dict[str, int] = {}
        for name, nbytes in nodes:
            sums[name] = sums.get(name, 0) + nbytes
        others = max(len(sums) - self.options.redundancy, 1)
        parity = max(sums.values()) * self.options.redundancy // others if len(sums) > 1 else 0
        for name, nbytes in sums.items():
            needed = self.options.keep * nbytes + 2 * parity
            if needed > self.options.limit:
                raise BadArgument(
                    f"memory of '{run}': node '{name}' needs {needed} bytes ({self.options.keep} generations of "
                    f"{nbytes} and the others' parity"
                    f'), and "memory": {{"limit"}} allows {self.options.limit}'
                )

    def _agreed(self, run: str, tokens: set[str]) -> str:
        if len(tokens) > 1:
            raise BadArgument(
                f"memory of '{run}': the keepers on its nodes are of {len(tokens)} different runs of that name; let go "
                "of the ones that are stale with 'ucp keeper drop'"
            )
        return next(iter(tokens), None) or ranks.from_first(lambda: secrets.token_hex(16))

    # --- snapshots ---------------------------------------------------------------------------------------------------

    def is_due(self) -> bool:
        """Whether a snapshot asked for now would be taken: not if the last one is still under way and the policy
        is to skip. Collective, unless the policy is to wait. Callers ask before they gather the state."""
        saver = self.saver
        if self.options.policy != "skip" or saver is None or ranks.from_first(lambda: saver.pending) is None:
            return True
        if not self.skipped:
            self._warn(f"a snapshot is skipped since {saver.pending} is still under way; more may be, without a word")
        self.skipped += 1
        return False

    def snapshot(self, source: Source, tag: str) -> bool:
        """Begin to copy the state into the keepers' memory. Collective. Returns whether that was begun.

        If something goes wrong with keepers, there is a warning, and training goes on unprotected.
        """
        if self.saver is None or self.run is None:
            raise BadArgument("no run is known to be kept in memory yet: load or save first, or name it in the options")
        if not self._is_ready():
            return False
        try:
            ranks.all_or_none(self.saver.wait)
        except (SaveFailed, DestinationError) as error:
            self._warn(f"the snapshot before '{tag}' was not finished: {error}")
        try:
            return self.saver.save(source, self.location, tag, timeout=limits.SNAPSHOT_TIMEOUT_SECONDS)
        except (SaveFailed, DestinationError) as error:
            self._warn(f"no snapshot of '{tag}', training goes on unprotected: {error}")
            return False

    def recover(self) -> dict[str, Any]:
        """Have the keepers make their newest generation whole. Returns the answer of rank 0's keeper. Collective."""

        def ask() -> dict[str, Any]:
            try:
                if self._own is None:
                    raise OSError("there is no keeper")
                return dict(self._own.ask("recover").header)
            except OSError as error:
                return {"tag": None, "refused": [{"tag": "", "why": str(error.strerror or error)}]}

        self.wait()
        return ranks.from_first(ask)

    def hold(self) -> None:
        """As `Saver.hold`."""
        if self.saver is not None:
            self.saver.hold()

    def wait(self) -> None:
        """Return once no snapshot is under way. If it went wrong, there is a warning."""
        if self.saver is not None:
            try:
                self.saver.wait()
            except (SaveFailed, DestinationError) as error:
                self._warn(f"the last snapshot was not finished: {error}")

    def end(self) -> None:
        """Tell the keeper that the program has ended normally on this rank. It ends with the last rank of the node."""
        if self._own is not None:
            self.wait()
            own, self._own = self._own, None
            try:
                own.ask("go", pid=os.getpid())
            except OSError as error:
                log.warning("memory of '%s': this node's keeper was not told to end, and may stay: %s", self.run, error)
            own.close()
        _tiers.discard(self)

    def _is_ready(self) -> bool:
        """Whether every node's keeper is there and reaches the others. Those that are gone are started again."""
        found = ranks.gather(self._fault())
        if not any(found):
            return True
        self._warn(f"{next(filter(None, found))}; it is started again, and training goes on unprotected until then")
        try:
            if self._pool is not None:
                self._pool.forget()
            self._join(self.run or "")
            found = ranks.gather(self._fault())
        except BadArgument as error:
            self._warn(f"no snapshot: {error}")
            return False
        if any(found):
            self._warn(f"no snapshot: {next(filter(None, found))}")
        return not any(found)

    def _fault(self) -> str | None:
        """What is wrong with this node's keeper, or None."""
        if self._own is None:
            return "there is no keeper on this node"
        try:
            lost = self._own.ask("reach").header["lost"]
        except OSError as error:
            return str(error.strerror or error)
        return f"the keeper on node '{places.node()}' does not reach {', '.join(lost)}" if lost else None

    def _warn(self, text: str) -> None:
        if ranks.rank() == 0:
            log.warning("memory of '%s': %s", self.run, text)


def _token(run: str, node: str) -> str | None:
    """The token of the keeper that is already on this node, or None."""
    note = start.alive(run, node)
    return None if note is None else note.token


def own_address() -> str:
    """The address by which other nodes reach this one. It is the one from which this node reaches the job's first."""
    master = os.environ.get("MASTER_ADDR", "localhost")
    if master == "localhost" or master.startswith("127."):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master, 9))
        except OSError as error:
            raise BadArgument(f"MASTER_ADDR '{master}' cannot be reached, so keepers have no address") from error
        return str(probe.getsockname()[0])


# --- leaving the process ---------------------------------------------------------------------------------------------

_exit_watched = False


def _watch_end(tier: Tier) -> None:
    global _exit_watched
    _tiers.add(tier)
    if not _exit_watched:
        _exit_watched = True
        atexit.register(_at_exit)


def _at_exit() -> None:
    """End the keepers at exit, unless there was an error: then the program may be started again and need its memory."""
    if getattr(sys, "last_value", None) is None:
        for tier in list(_tiers):
            tier.end()
