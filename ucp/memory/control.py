"""Looking at the keepers on this machine, and ending them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ucp.errors import BadArgument
from ucp.memory import start
from ucp.memory.options import check_run
from ucp.memory.tier import own_address
from ucp.storage.kept import SCHEME, places
from ucp.storage.kept.client import of_note
from ucp.storage.kept.places import Note


def run_name(text: str) -> str:
    """A run's name from what people type: a name, with or without ``memory://``, or a folder's path.

    The folder need not be there, since a run may never have written to disk. Text that no keeper knows is a path if
    something is there or it has a slash; with ``memory://`` it is a name.
    """
    name = text.removeprefix(SCHEME)
    known = {note.run for note in places.notes()}
    if name in known or "\0" in name or not name:
        return name
    path = os.path.abspath(name)
    is_path = os.path.exists(name) or ("/" in name and not text.startswith(SCHEME))
    return path if path in known or is_path else name


def start_keeper(run: str) -> Note:
    """This node's keeper of the run, started if there is none. Raises BadArgument."""
    name = run_name(run)
    check_run(name)
    return start.started(name, None, own_address())[0]


def statuses(run: str | None = None) -> list[Mapping[str, Any]]:
    """What the keepers on this machine report. For one that does not answer, it is only what its note says."""
    found: list[Mapping[str, Any]] = []
    for note in places.notes(None if run is None else run_name(run)):
        client = of_note(note)
        try:
            found.append({**client.ask("status").header, "answers": True})
        except OSError as error:
            said = [str(error.strerror or error)]
            gone = {"bytes": 0, "trainers": [], "lost": [], "generations": [], "said": said, "answers": False}
            found.append({"run": note.run, "node": note.node, "pid": note.pid, **gone})
        finally:
            client.close()
    return found


def absent(run: str) -> BadArgument:
    """The error that says that no keeper here has a run."""
    return BadArgument(f"no keeper on this machine holds '{run_name(run)}'")


def drop(run: str) -> list[str]:
    """End this machine's keepers of a run, with what they hold. Returns their nodes. Raises BadArgument if there are
    none."""
    notes = places.notes(run_name(run))
    if not notes:
        raise absent(run)
    for note in notes:
        client = of_note(note)
        try:
            client.ask("end")
        except OSError:
            places.forget(note)
        finally:
            client.close()
    deadline = time.monotonic() + 10
    while places.notes(run_name(run)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [note.node for note in notes]


def prometheus(run: str | None = None) -> Iterator[str]:
    """The status of the keepers, as lines of Prometheus' text format."""
    found = statuses(run)
    kinds = {
        "ucp_keeper_up": ("gauge", "whether the keeper answers"),
        "ucp_keeper_bytes": ("gauge", "memory that the keeper holds, in bytes"),
        "ucp_keeper_generations": ("gauge", "generations that are whole"),
        "ucp_keeper_protected": ("gauge", "whether the newest generation is protected"),
        "ucp_keeper_step": ("gauge", "the step of the newest generation"),
        "ucp_keeper_commit_seconds": ("gauge", "when the newest generation was committed, since the epoch"),
    }
    for name, (kind, text) in kinds.items():
        yield f"# HELP {name} {text}"
        yield f"# TYPE {name} {kind}"
        for one in found:
            value = _value(name, one)
            if value is not None:
                yield f'{name}{{run="{_escaped(one["run"])}",node="{_escaped(one["node"])}"}} {value}'


def _value(name: str, one: Mapping[str, Any]) -> Any:
    newest = one["generations"][0] if one["generations"] else None
    if name == "ucp_keeper_up":
        return int(one["answers"])
    if name == "ucp_keeper_bytes":
        return one["bytes"]
    if name == "ucp_keeper_generations":
        return len(one["generations"])
    if newest is None:
        return None
    digits = "".join(c for c in newest["tag"] if c.isdigit())
    said = {
        "ucp_keeper_protected": int(newest["protected"]),
        "ucp_keeper_step": digits or None,
        "ucp_keeper_commit_seconds": newest["when"] / 1e9,
    }
    return said[name]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
