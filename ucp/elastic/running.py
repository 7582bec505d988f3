"""A training program under torchrun's agent: what ends it, and whether it is worth another try."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ucp import limits
from ucp.errors import DestinationError, ProcessLost, SaveFailed, UcpError, described
from ucp.printable import logger
from ucp.storage import atomic, locations, metrics
from ucp.storage.kept import places

log = logger(__name__)

REFUSED = 65  # the exit code of an error that another try would repeat (EX_DATAERR)
DRAINED = 75  # the exit code of a node that is to be left out (EX_TEMPFAIL)

DRAIN = "ucp-drain.json"
LEFT = "ucp-left.json"

FRESH_STORES = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""The variable by which torchrun's agent makes a store for every round."""

# Seconds that two nodes' clocks may differ. The next round, which may have as many ranks again, begins later than this:
# torch finds after 15 s that a node is gone.
_CLOCKS_APART = 10.0

# Errors that may not happen again the next time: a lost process, a full disk, a rank that died.
_PASSING = (SaveFailed, ProcessLost, DestinationError)


def run(main: Callable[[], Any], *, folder: str | os.PathLike[str] | None = None) -> None:
    """Run a training program as torchrun's worker.

    If the library refuses something (a checkpoint that does not fit, a number of ranks that cannot keep the global
    batch), or DeepSpeed its configuration, the agent ends too, since another try would end in the same way. After any
    other failure the agent starts again on the nodes that are left. folder: the run's. Its events are kept there, and
    the hosts to be left out.
    """
    place = None if folder is None else Path(folder)
    if place is not None and places.node() in drained(place):
        _event(place, "drained")
        log.warning("node '%s' is to be left out; its agent ends", places.node())
        _leave_word(place)
        _end_agent()
        sys.exit(DRAINED)
    if place is not None:
        _event(place, "started", since_process=_age())
        threading.Thread(target=_start_again_without, args=(place, time.time() - _age()), daemon=True).start()
    _warn_of_stale_store()
    try:
        main()
    except Exception as error:
        if not _would_come_again(error):
            raise
        log.error("%s", described(error))
        if place is not None:
            _event(place, "refused", text=described(error))
        if os.environ.get("RANK", "0") != "0":
            time.sleep(limits.REFUSAL_HEAD_START_SECONDS)
        _end_agent()
        # Not by an exception, so that the memory stays for a new start after the problem is solved.
        sys.stderr.flush()
        os._exit(REFUSED)
    except SystemExit as error:
        if error.code not in (None, 0):
            sys.last_value = error  # so that the keepers know that it did not end well
        raise


def _leave_word(place: Path) -> None:
    """Tell the other nodes' ranks that this node has left."""
    left = {"node": places.node(), "world": os.environ.get("WORLD_SIZE"), "at": time.time()}
    try:
        atomic.write_atomic(place / LEFT, json.dumps(left).encode())
    except DestinationError as error:
        log.warning("the other nodes are not told, and may wait for this one: %s", error)


def _start_again_without(place: Path, born: float) -> None:
    """End this rank once a node that was to be left out has left its round: this rank would wait for that node's, and
    the agent does not notice. Then the agent makes a round of those that are left. born: of this process."""
    while True:
        left = _left(place)
        # The nodes' clocks may differ. A later round has other ranks.
        if left is not None and left["world"] == os.environ.get("WORLD_SIZE") and left["at"] > born - _CLOCKS_APART:
            log.warning("node '%s' has left; starting again without it", left["node"])
            _event(place, "restarted", without=left["node"])
            os._exit(DRAINED)
        time.sleep(limits.LEFT_NODE_WATCH_SECONDS)


def _left(place: Path) -> dict[str, Any] | None:
    """The last node that has left: its name, the number of ranks of its round, and when."""
    try:
        raw = json.loads((place / LEFT).read_bytes())
        return {"node": str(raw["node"]), "world": raw["world"], "at": float(raw["at"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # nobody has, or it is being written on a file system that shows half of a file


def _would_come_again(error: Exception) -> bool:
    """Whether another try would end in the same way: the library refuses something, or DeepSpeed its configuration.

    DeepSpeed's own errors have no class in common (DeepSpeedConfigError, ElasticityError, pydantic's, AssertionError,
    ValueError), so what counts is where one was raised.
    """
    if isinstance(error, UcpError):
        return not isinstance(error, _PASSING)
    return not isinstance(error, OSError) and any(
        _reads_configuration(str(frame.f_globals.get("__name__", "")), frame.f_code.co_name)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _reads_configuration(module: str, function: str) -> bool:
    """Whether this function of DeepSpeed reads or checks a configuration."""
    return module.startswith(("deepspeed.runtime.config", "deepspeed.elasticity")) or (
        module.startswith("deepspeed.") and "sanity_check" in function
    )


def _warn_of_stale_store() -> None:
    """Warn if torch's agent gives the ranks of a restart the store of those before, where they find the addresses of
    ranks that are gone: gloo then connects to nobody, or hangs (torch 2.13; `rendezvous.py: _create_c10d_store`)."""
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if agents and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ.get("RANK", "0") == "0":
        log.warning(
            "after a restart torch's ranks may look for those that are gone, and hang; start torchrun with %s=1 in its "
            "environment, so that each round has a store of its own",
            FRESH_STORES,
        )


def drained(folder: Path) -> list[str]:
    """The nodes that the next restart leaves out."""
    try:
        found = json.loads(locations.read(folder / DRAIN))
    except (OSError, ValueError):
        return []
    return [str(name) for name in found] if isinstance(found, list) else []


def drain(folder: Path, node: str, *, back: bool = False) -> list[str]:
    """Have the next restart leave a node out, or take it in again. Returns the nodes that are left out now."""
    names = [name for name in drained(folder) if name != node] + ([] if back else [node])
    atomic.write_atomic(folder / DRAIN, json.dumps(names).encode())
    return names


def _event(folder: Path, name: str, **more: Any) -> None:
    # One rank tells what the job does, and one of each node what the node does.
    if os.environ.get("LOCAL_RANK" if name in ("drained", "restarted") else "RANK", "0") != "0":
        return
    metrics.append(
        folder,
        {
            "what": "event",
            "event": name,
            "time": time.time(),
            "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
            "world": int(os.environ.get("WORLD_SIZE", 1)),
            "node": places.node(),
            "seconds": {},
            **more,
        },
    )


def _age() -> float:
    """Seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return round(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 3)


def _end_agent() -> None:
    """Tell torchrun's agent, which is this process's parent, not to start it again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return
    if b"torchrun" in command or b"torch.distributed" in command:
        os.kill(parent, signal.SIGTERM)
