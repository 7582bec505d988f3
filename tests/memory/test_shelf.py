"""What one keeper holds: flips that are all found, leases that overwrite nothing that is needed."""

from __future__ import annotations

import random
import time

import pytest

from ucp.memory.answers import Answers
from ucp.memory.peers import Peers
from ucp.memory.recovering import scrub
from ucp.memory.shelf import Shelf
from ucp.storage.digests import ChunkDigests, digest_chunks
from ucp.storage.kept.files import KeptPath
from ucp.storage.kept.places import Note
from ucp.storage.kept.wire import Frame

SAVES = ("0" * 16, "1" * 16, "2" * 16)


@pytest.mark.parametrize("flips", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_flips_are_all_found(flips: int) -> None:
    shelf, luck = Shelf("a"), random.Random(3)
    body = luck.randbytes(3000)
    path = f"step1/{SAVES[0]}/rank-00000"
    kept = shelf.store(path, body)
    files = {path: ChunkDigests(len(body), digest_chunks(body)).text}
    view = shelf.memory(kept.memory).view
    assert scrub(shelf, SAVES[0], files)["bad"] == {}
    for _ in range(flips):
        at, bit = luck.randrange(len(body)), 1 << luck.randrange(8)
        view[at] ^= bit
        assert scrub(shelf, SAVES[0], files)["bad"] == {path: [0]}
        view[at] ^= bit


def filled(shelf: Shelf, step: int, rank: int = 0, size: int = 100) -> int:
    number, lease = shelf.lease(rank, size)
    shelf.place(f"step{step}/{SAVES[step % 3]}/rank-{rank}", rank, number, lease, size)
    return number


def commit(shelf: Shelf, step: int) -> None:
    shelf.put(f"step{step}/ucp.json", f'"{SAVES[step % 3]}/rank-0"'.encode(), step)


def test_two_generations_take_turns_and_a_broken_one_leaves_the_other() -> None:
    shelf = Shelf("a")
    first = filled(shelf, 1)
    commit(shelf, 1)
    second = filled(shelf, 2)
    assert second != first
    # The trainer died here, before the commit: its next lease is of the same memory.
    assert filled(shelf, 3) == second
    assert [one.tag for one in shelf.committed()] == ["step1"]
    with pytest.raises(OSError, match="given up"):
        commit(shelf, 2)
    commit(shelf, 3)
    assert filled(shelf, 4) == first
    assert [one.tag for one in shelf.committed()] == ["step3"]
    assert shelf.nbytes == 200


def test_a_lease_that_was_given_on_is_none() -> None:
    shelf = Shelf("a")
    number, lease = shelf.lease(0, 10)
    shelf.lease(0, 10)
    with pytest.raises(OSError, match="given to another snapshot"):
        shelf.place(f"step1/{SAVES[0]}/rank-0", 0, number, lease, 10)


def test_paths_are_joined_and_taken_apart() -> None:
    place = KeptPath("/runs/a", "step1") / "x" / "ucp.json"
    assert str(place) == "memory:///runs/a/step1/x/ucp.json"
    assert (place.name, place.suffix, str(place.parent)) == ("ucp.json", ".json", "memory:///runs/a/step1/x")
    assert KeptPath("/runs/a", "step1") in place.parents


def test_a_clock_that_is_set_back_makes_no_old_generation_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    note = Note("run", "a", "a", 1, "localhost", 1, "t", "s")
    keeper = Answers(Shelf("a"), Peers("run", "a", "t"), note, lambda: None)
    for step, clock in ((1, 2000), (2, 1000), (3, 500), (4, 3000)):
        monkeypatch.setattr(time, "time_ns", lambda clock=clock: clock)
        held = filled(keeper.shelf, step)
        body = f'"{SAVES[step % 3]}/rank-0"'.encode()
        assert "fault" not in keeper.to(Frame({"op": "put", "path": f"step{step}/ucp.json"}, body), False).header
        assert [one.tag for one in keeper.shelf.committed()][:2] == [f"step{k}" for k in (step, step - 1) if k]
        assert keeper.shelf.memory(held)
    assert keeper.shelf.committed()[0].when == 3000
