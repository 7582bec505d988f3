"""Real keepers: what is lost or damaged comes back to the byte, or is refused by name."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.memory.nodes import Nodes, wait_for

pytestmark = pytest.mark.slow

FOUR = ("a", "b", "c", "d")


def check(nodes: Nodes, files: Mapping[str, bytes], node: str) -> None:
    for path, body in files.items():
        assert nodes.read(path, len(body), node) == body


def test_each_of_four_nodes_lost_in_turn_is_rebuilt(keepers: Path) -> None:
    nodes = Nodes(FOUR)
    for step, lost in enumerate(FOUR):
        files = nodes.save(step)
        nodes.kill(lost)
        nodes.start(FOUR)
        told = nodes.recover()
        assert (told["tag"], told["rebuilt"]) == (f"global_step{step}", [lost])
        check(nodes, files, FOUR[step - 1])


def test_two_lost_of_four(keepers: Path) -> None:
    """With one parity they are refused by name; with two they are rebuilt, on the nodes that are left."""
    nodes = Nodes(FOUR, 1)
    nodes.save(812)
    nodes.kill("b")
    nodes.kill("d")
    nodes.start(("a", "c"))
    refused = nodes.recover()
    assert refused["tag"] is None
    assert refused["refused"] == [
        {"tag": "global_step812", "why": "it needs 2 lost nodes (b, d); redundancy is 1"},
    ]
    for name in ("a", "c"):
        nodes.kill(name)
    nodes = Nodes(FOUR, 2)
    files = nodes.save(813)
    nodes.kill("a")
    nodes.kill("d")
    nodes.clients = {}
    nodes.start(("b", "c"))
    assert nodes.recover("c")["rebuilt"] == ["a", "d"]
    check(nodes, files, "b")


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c")])
def test_a_flipped_byte_is_found_and_repaired(keepers: Path, names: tuple[str, ...]) -> None:
    """In a block and in a parity block; two nodes mirror each other."""
    nodes = Nodes(names)
    files = nodes.save(1)
    path = sorted(files)[1]
    nodes.clients["b"].ask("repair", bytes([files[path][2_500_000] ^ 4]), path=path, at=2_500_000)
    told = nodes.recover()
    assert (told["tag"], told["rebuilt"], told["repaired"]) == ("global_step1", [], 1)
    check(nodes, files, "a")


def test_a_flipped_byte_in_parity_is_found_and_made_anew(keepers: Path) -> None:
    nodes = Nodes(("a", "b", "c"))
    files = nodes.save(1)
    nodes.flip("b", -(-3_002_000 // 128) * 64, 1_400_000)
    assert nodes.recover()["tag"] == "global_step1"
    wait_for(
        lambda: nodes.clients["b"].ask("scrub", save=next(iter(files)).split("/")[1], files={}).header["parity"] == []
    )
    nodes.kill("a")
    nodes.start(("a", "b", "c"))
    assert nodes.recover()["rebuilt"] == ["a"]
    check(nodes, files, "c")


def test_parity_takes_no_more_of_the_network_than_it_may(keepers: Path) -> None:
    """Of three nodes with 3 MB each, every one takes two halves for its parity."""
    began = time.monotonic()
    Nodes(("a", "b", "c"), network=3_000_000).save(1)
    assert time.monotonic() - began >= 0.95


def test_both_nodes_of_a_pair_are_lost(keepers: Path) -> None:
    nodes = Nodes(("a", "b"))
    nodes.save(1)
    nodes.kill("a")
    nodes.kill("b")
    nodes.start(("a", "b"))
    assert nodes.recover() == {"tag": None, "when": 0, "refused": []}


def test_a_save_that_broke_off_leaves_the_one_before(keepers: Path) -> None:
    nodes = Nodes(("a", "b"))
    files = nodes.save(1)
    nodes.clients["b"].ask("store", b"half", path=f"global_step2/{'0' * 16}/rank-00001.safetensors")
    nodes.start(("a", "b"))
    assert nodes.recover()["tag"] == "global_step1"
    check(nodes, files, "b")
    with pytest.raises(OSError, match="given up"):
        nodes.clients["b"].ask("store", b"late", path=f"global_step2/{'0' * 16}/rank-00000.safetensors")


def test_a_node_that_comes_back_with_an_old_generation(keepers: Path) -> None:
    """It was away while the others went on: what it has is not mixed with theirs."""
    nodes = Nodes(FOUR)
    nodes.save(1)
    away = nodes.clients.pop("d")
    nodes.start(("a", "b", "c"))
    files = nodes.save(2)
    wait_for(lambda: _gone(away))  # nobody needs it, so that it has ended
    nodes.start(FOUR)
    assert nodes.recover("d")["tag"] == "global_step2"
    check(nodes, files, "d")


def test_a_network_that_is_cut_between_keepers(keepers: Path) -> None:
    """The side with enough nodes goes on; the other refuses by name and makes no generation of its own. Once the
    network is whole again, there is one generation on all."""
    nodes = Nodes(("a", "b", "c"))
    first = nodes.save(1)
    wires = nodes.split(("a", "b"), ("c",))
    for wire in wires:
        wire.cut()
    told = nodes.recover("c")
    assert (told["tag"], told["refused"]) == (
        None,
        [{"tag": "global_step1", "why": "it needs 2 lost nodes (a, b); redundancy is 1"}],
    )
    told = nodes.recover("a")
    assert (told["tag"], told["rebuilt"]) == ("global_step1", ["c"])
    check(nodes, first, "b")
    assert nodes.clients["a"].ask("reach").header["lost"] == ["c"]

    alone = nodes.clients.pop("c")
    nodes.start(("a", "b"))
    files = nodes.save(2)
    for wire in wires:
        wire.mend()
    nodes.clients["c"] = alone
    nodes.start(("a", "b", "c"))
    assert nodes.recover("c")["tag"] == "global_step2"
    for node in ("a", "b", "c"):
        check(nodes, files, node)


def test_a_network_that_is_cut_while_a_generation_is_made(keepers: Path) -> None:
    """Its parity is not in, so that it is not protected and says so; it becomes so when the job begins anew."""
    nodes = Nodes(("a", "b"))
    nodes.save(1)
    wires = nodes.split(("a",), ("b",))
    for wire in wires:
        wire.cut()
    files = nodes.save(2, protected=False)
    found = {one["tag"]: one["protected"] for one in nodes.status("a")}
    assert found["global_step2"] is False
    for wire in wires:
        wire.mend()
    nodes.start(("a", "b"))
    assert nodes.recover("b")["tag"] == "global_step2"
    check(nodes, files, "b")
    wait_for(lambda: nodes.status("b")[0]["protected"], told=nodes.all_status)


def test_the_memory_limit_is_kept(keepers: Path) -> None:
    nodes = Nodes(("a",), 0, limit=1_000_000)
    with pytest.raises(OSError, match="node 'a' needs 3000000 bytes, and 'limit' allows 1000000"):
        nodes.save(1)


def _gone(client: object) -> bool:
    try:
        client.ask("ping")  # type: ignore[attr-defined]
    except OSError:
        return True
    return False
