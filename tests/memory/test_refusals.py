"""What the memory tier refuses, by name, before it is of use to anybody."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import ucp
from tests.memory.nodes import wait_for
from ucp import limits
from ucp.cli.main import main
from ucp.errors import BadArgument, DamagedCheckpoint, SaveFailed, UcpError
from ucp.memory import blocks, control, recovery, start
from ucp.memory.groups import divided
from ucp.memory.options import Options, nbytes
from ucp.memory.pool import LentPool
from ucp.memory.tier import Tier
from ucp.storage import disk
from ucp.storage.kept import client, places
from ucp.storage.kept.wire import receive, send
from ucp.torchdist.memory import MemorySnapshots


def test_a_folder_that_others_may_write_to_is_not_trusted(keepers: Path) -> None:
    keepers.chmod(0o777)
    with pytest.raises(BadArgument, match="others may write to it"):
        places.notes()
    keepers.chmod(0o700)
    assert places.notes() == []


def test_a_note_that_is_a_link_or_no_note_is_left_out(keepers: Path) -> None:
    (keepers / "a-b.json").write_text("{}")
    (keepers / "a-c.json").symlink_to("/etc/passwd")
    assert places.notes() == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_a_socket_of_another_user_is_not_trusted(keepers: Path) -> None:
    path = str(keepers / "s")
    with socket.socket(socket.AF_UNIX) as listening:
        pid = os.fork()
        if pid == 0:  # whoever listens is who the peer is
            os.chmod(keepers, 0o777)
            os.setuid(65534)
            listening.bind(path)
            listening.listen()
            time.sleep(60)
            os._exit(0)
        try:
            while not os.path.exists(path):
                time.sleep(0.01)
            time.sleep(0.05)
            with pytest.raises(client.KeeperGone, match="the socket is another user's"):
                client.of_note(places.Note("run", "a", "a", pid, "localhost", 1, "1" * 32, path)).ask("ping")
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            keepers.chmod(0o700)


@pytest.mark.slow
def test_another_model_is_refused_by_name_and_stays_as_it_is(tmp_path: Path, keepers: Path) -> None:
    memory = MemorySnapshots(tmp_path / "run", redundancy=0)
    memory.snapshot(3, model=torch.nn.Linear(4, 5))
    memory.wait()
    other = torch.nn.Linear(4, 6)
    before = other.weight.detach().clone()
    with pytest.raises(UcpError, match=r"weight.*\[5, 4\].*\[6, 4\]|weight.*\[6, 4\].*\[5, 4\]"):
        memory.load_training(model=other)
    assert torch.equal(other.weight, before)
    report = memory.load_training(model=torch.nn.Linear(4, 5))
    assert report is not None
    assert report.step == 3
    memory.tier.end()


@pytest.mark.slow
def test_a_keeper_of_another_run_of_that_name(keepers: Path) -> None:
    start.started("run", "a", token="1" * 32)
    with pytest.raises(BadArgument, match=r"the keeper on node 'a' \(process \d+\) is of another run of that name"):
        start.started("run", "a", token="2" * 32)
    note = places.note_of("run", "a")
    assert note is not None
    assert (
        os.stat(note.socket).st_mode & 0o777,
        os.stat(keepers / f"{places.stem('run', 'a')}.json").st_mode & 0o777,
    ) == (
        0o600,
        0o600,
    )
    far = client.of_address("run", "a", note.host, note.port, "3" * 32)
    with pytest.raises(client.KeeperGone, match="the run or its token is another one"):
        far.ask("ping")


def test_a_run_that_no_keeper_holds_is_said(keepers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keeper", "status"]) == 0
    assert "there is no keeper on this machine" in capsys.readouterr().err
    for action in ("status", "drop"):
        assert main(["keeper", action, "other"]) == 2
        assert "no keeper on this machine holds 'other'" in capsys.readouterr().err


def test_the_limit_is_told_with_the_bytes_that_are_needed(keepers: Path) -> None:
    tier = Tier(Options(limit=1_000_000, redundancy=0))
    with pytest.raises(BadArgument, match=r"needs 1400000 bytes \(2 generations of 700000 .* allows 1000000"):
        tier.attach("run", 700_000)


def test_a_machine_without_room_refuses_the_snapshot_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "available", lambda: 1000)
    with pytest.raises(OSError, match="4096 bytes of memory are needed, and this machine has 1000 to spare") as caught:
        blocks.SharedMemory.of(4096)
    assert caught.value.errno == errno.ENOMEM

    def refuse(rank: int, size: int) -> None:
        raise caught.value

    pool = LentPool(SimpleNamespace(run="run", lease=refuse), 0)  # type: ignore[arg-type]
    with pytest.raises(SaveFailed, match="nothing was snapshotted: 4096 bytes"):
        pool.reserve(4096, pinned=False)


def test_a_keeper_that_says_nothing_is_lost_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a network that is cut: the connection is there, and no answer comes."""
    monkeypatch.setattr(limits, "KEEPER_WORD_SECONDS", 0.2)
    listener, done = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def greet_only() -> None:
        channel, _ = listener.accept()
        send(channel, {"nonce": "x"})
        receive(channel)
        send(channel, {})
        receive(channel)
        done.wait(20)

    threading.Thread(target=greet_only, daemon=True).start()
    far = client.of_address("run", "b", "127.0.0.1", listener.getsockname()[1], "t")
    with pytest.raises(client.KeeperGone, match="the keeper of 'run' on b is not reached: timed out"):
        far.ask("put", b"x", path="latest")
    done.set()
    listener.close()


@pytest.mark.parametrize("text", ["", "16 gigs", "-1", "1GB/s", 0, True, None])
def test_sizes_that_are_none(text: object) -> None:
    with pytest.raises(BadArgument, match='"limit" needs a size'):
        nbytes(text, "limit")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"redundancy": -1},
        {"redundancy": 33},
        {"keep": 1},
        {"keep": 10**9},
        {"keep": True},
        {"group": 0},
        {"group": "rack"},
        {"limit": 0},
        {"limit": "nope"},
        {"network": -5},
        {"network": "fast"},
        {"policy": "nope"},
        {"run": ""},
        {"run": "a\0b"},
        {"run": "a\n\x1b[31mb"},
        {"run": "x" * 5000},
        {"nonsense": 1},
        {"every": 5},
        {"persist_every": 5},
    ],
)
def test_options_that_cannot_be(wrong: dict[str, Any], tmp_path: Path, keepers: Path) -> None:
    """Before a keeper is started; by the name of the option, and without control characters."""
    with pytest.raises(BadArgument, match="run's name" if "run" in wrong else next(iter(wrong))) as caught:
        MemorySnapshots(tmp_path, **wrong)
    assert str(caught.value).isprintable()
    assert list(keepers.iterdir()) == []


def test_options_that_can_be(tmp_path: Path) -> None:
    said = {"limit": "16GiB", "network": "1GB/s", "group": "node", "run": "Läufe/llama 2"}
    assert MemorySnapshots(tmp_path, **said).tier.options == Options("Läufe/llama 2", limit=2**34, network=10**9)
    with pytest.raises(BadArgument, match="without control characters"):
        Tier(Options()).attach(tmp_path / "a\nb", 1)


def test_a_run_is_known_by_what_people_type(tmp_path: Path, keepers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    places.leave(places.Note(str(tmp_path / "kept"), "a", "a", 1, "localhost", 1, "t", "s"))
    for typed in ("kept", "runs/llama", "there"):
        assert control.run_name(typed) == str(tmp_path / typed)
    for name in ("llama", "memory://runs/llama"):
        assert control.run_name(name) == name.removeprefix("memory://")


def test_a_run_that_has_no_name(keepers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("", "a\0b", "a\x1b[2Jb"):
        assert main(["keeper", "start", name]) == 2
        assert "a run's name is text of 1 to 4096 characters" in capsys.readouterr().err
    assert list(keepers.iterdir()) == []


@pytest.mark.slow
def test_strangers_at_a_keeper_cost_it_nothing(keepers: Path) -> None:
    """Those who don't know the token: no memory for what they announce, and no end to listening."""
    note, _ = start.started("run", "a")
    process, held = psutil.Process(note.pid), []

    def stranger(*raw: bytes) -> socket.socket:
        channel = socket.create_connection((note.host, note.port))
        for one in raw:
            channel.sendall(one)
        held.append(channel)
        return channel

    before = _most_kib(note.pid)
    huge = b'{"run":"x"}'
    for raw in (
        struct.pack("!IQ", len(huge), 1 << 30) + huge,
        struct.pack("!IQ", 1 << 27, 0),
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        channel = stranger(raw)
        channel.settimeout(20)
        with suppress(ConnectionResetError):
            while channel.recv(1 << 10):
                pass
    odd = json.dumps({"run": "run", "proof": "\u00e9"}).encode()
    channel = stranger(struct.pack("!IQ", len(odd), 0) + odd)
    receive(channel)
    answer = receive(channel)
    assert answer is not None
    assert "another one here than 'run'" in answer.header["fault"]
    assert _most_kib(note.pid) - before < 64 << 10
    process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() + 8, process.num_fds() + 8))
    for _ in range(30):
        stranger()
    time.sleep(0.3)
    for channel in held:
        channel.close()
    wait_for(lambda: "a connection was not taken" in str(control.statuses("run")[0]["said"]))
    far = client.of_address("run", "a", note.host, note.port, note.token)
    assert far.ask("ping").header["pid"] == note.pid


def _most_kib(pid: int) -> int:
    """The most memory that a process has ever had."""
    told = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in told if line.startswith("VmHWM")))


def test_groups_never_hold_two_of_one_failure_domain() -> None:
    nodes = [("a1", "a"), ("a2", "a"), ("b1", "b"), ("c1", "c"), ("c2", "c")]
    groups, alone = divided(nodes, Options())
    assert groups == [["a1", "b1", "c1"], ["a2", "c2"]]
    assert alone == ""
    assert divided([(f"n{k}", f"n{k}") for k in range(8)], Options(group=3))[0] == [
        ["n0", "n1"],
        ["n2", "n3", "n4"],
        ["n5", "n6", "n7"],
    ]
    groups, alone = divided([("a1", "a"), ("a2", "a")], Options())
    assert "2 of 2 nodes (a1, a2)" in alone


def test_what_a_fall_to_disk_costs_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tier = Tier(Options(run="r"))
    tier.run = "r"
    why = "generation 812: it needs 2 lost nodes (b, d); redundancy is 1"
    recovery.warn_of(tier, (why,), "global_step800", "on disk")
    assert caplog.messages == [f"memory of 'r': {why}; continuing from step 800 on disk, which costs 12 steps"]


def test_a_save_that_took_long_is_not_newer_than_a_later_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 goes to disk in the background, and its last file is written when step 4 is in memory already."""
    tier = Tier(Options(run="r"))
    tier.run = "r"
    write, seen = disk.write_new, []

    def slow(path: Path, data: bytes) -> None:
        seen.append(time.time_ns())
        time.sleep(0.02)
        write(path, data)

    before = time.time_ns()
    monkeypatch.setattr(disk, "write_new", slow)
    model = torch.nn.Linear(2, 2)
    ucp.save_training(tmp_path / "global_step3", model=model, optimizer=torch.optim.AdamW(model.parameters()), step=3)
    (tmp_path / "latest").write_text("global_step3")
    for when, expected in ((seen[-1], ("memory://r", "global_step4")), (before, (str(tmp_path), None))):
        monkeypatch.setattr(tier, "recover", lambda at=when: {"tag": "global_step4", "when": at, "refused": []})
        assert recovery.source(tier, tmp_path) == expected


def test_a_trainer_goes_on_where_its_own_state_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A Hugging Face Trainer counts its steps by a file in its checkpoint, and not by what the engine has loaded."""
    tier = Tier(Options(run="r"))
    tier.run = "r"
    kept = {"tag": "global_step7", "when": 2**62, "refused": []}
    monkeypatch.setattr(tier, "recover", lambda: kept)
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    assert recovery.source(tier, folder) == ("memory://r", "global_step7")
    (folder / "trainer_state.json").write_text('{"global_step": 5}')
    assert recovery.source(tier, folder) == (str(folder), None)
    assert "the Trainer's own state in" in caplog.text
    assert "is of step 5; continuing from step 5 on disk, which costs 2 steps" in caplog.text
    (folder / "trainer_state.json").write_text('{"global_step": 7}')
    assert recovery.source(tier, folder) == ("memory://r", "global_step7")
    (folder / "trainer_state.json").write_text("[")
    with pytest.raises(DamagedCheckpoint, match="is not what a Trainer writes"):
        recovery.source(tier, folder)
