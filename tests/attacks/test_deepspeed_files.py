"""DeepSpeed's model and optimizer files under random damage: refused by an error of ours, or what is read is the truth.

Two kinds of mutations: of the file's bytes, which its CRC-32s find, and of what its pickle says, written anew by torch
with right CRC-32s, which nothing but the reader's own care stops. ``UCP_SEED`` sets another seed than the usual one.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.attacks import fuzz
from tests.attacks.arena import Verdict, fight
from tests.formats.deepspeed.read.test_damaged import OLDER, TAG
from tests.slow_cases import slow_but

MUTATIONS = 200
QUICK = 20
PARTS = [range(QUICK), pytest.param(range(QUICK, MUTATIONS), marks=pytest.mark.slow)]
SEED = int(os.environ.get("UCP_SEED", "") or fuzz.SEED)


def everything(folder: Path) -> dict[str, Any]:
    """All that is read of a checkpoint."""
    with ucp.open(folder, tag=TAG) as opened:
        opened.verify()
        out: dict[str, Any] = {"state": repr(opened.training_state)}
        for name, info in opened.parameters.items():
            out[name] = (info.shape, dict(info.scalars), info.kind, info.aliases)
            out.update({f"{name}:{s}": bits(opened.read(name, s)) for s in info.states})
    return out


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def mutated(randomly: random.Random, data: bytearray) -> str:
    """Change some bytes; returns how."""
    at, size = randomly.randrange(len(data)), len(data)
    kind = randomly.choice(["bit", "bit", "byte", "zeros", "cut", "moved", "grown"])
    length = randomly.randrange(1, 600)
    if kind == "bit":
        data[at] ^= 1 << randomly.randrange(8)
    elif kind == "byte":
        data[at] = randomly.randrange(256)
    elif kind == "zeros":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == "cut":
        del data[at:]
    elif kind == "moved":
        there = randomly.randrange(size)
        data[at : at + length] = data[there : there + len(data[at : at + length])]
    else:
        data[at:at] = randomly.randbytes(length)
    return f"{kind} at {at} of {size}"


def in_bytes(folder: Path, seed: int) -> tuple[str, Callable[[], str]]:
    randomly = random.Random(seed)
    path = randomly.choice(sorted((folder / TAG).glob("*.pt")))

    def attack() -> str:
        kept = path.read_bytes()
        data = bytearray(kept)
        mutated(random.Random(seed + 1), data)
        path.write_bytes(data)
        try:
            return "the truth" if everything(folder) == TRUTH[folder] else "something else"
        finally:
            path.write_bytes(kept)

    return f"seed {seed}: {path.name}", attack


TRUTH: dict[Path, dict[str, Any]] = {}


@pytest.mark.parametrize("numbers", PARTS, ids=str)
@pytest.mark.parametrize("which", ["z1", "z3"])
def test_mutated_bytes(tmp_path: Path, which: str, numbers: range) -> None:
    print(f"UCP_SEED={SEED}")
    folder = tmp_path / "run"
    shutil.copytree(OLDER[which], folder)
    TRUTH[folder] = everything(folder)
    attacks = [in_bytes(folder, SEED + 2 * k) for k in numbers]
    verdicts = list(fight([attack for _, attack in attacks]))
    for (name, _), verdict in zip(attacks, verdicts, strict=True):
        assert verdict.within_limits, f"UCP_SEED={SEED}: {name}: {verdict}"
        assert verdict.kind == "refused" or verdict.text == "the truth", f"UCP_SEED={SEED}: {name}: {verdict}"
    assert sum(verdict.kind == "refused" for verdict in verdicts) > len(numbers) // 2


# --- what the pickle says ---------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    *(None, True, -1, 0, 3, 10**9, 2**70, 1.5, float("nan"), "", "a word", b"bytes", (), [], {}, [None], {"a": 1}),
    *([[1, 2], [3]], {0: {1: []}}, torch.zeros(2), torch.zeros(()), torch.zeros(0), torch.zeros(2, 2), object),
]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to everything in it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*at, key)
            yield from places(item, (*at, key))
    elif isinstance(value, list):
        for key, item in enumerate(value):
            yield (*at, key)
            yield from places(item, (*at, key))


def changed(content: Any, randomly: random.Random) -> str:
    """Replace or remove something in it, shallow or deep alike; returns what."""
    every = list(places(content))
    depth = randomly.choice(sorted({len(keys) for keys in every}))
    keys = randomly.choice([keys for keys in every if len(keys) == depth])
    for key in keys[:-1]:
        content = content[key]
    if randomly.random() < 0.2:
        del content[keys[-1]]
        return f"{keys} is gone"
    content[keys[-1]] = value = randomly.choice(VALUES)
    return f"{keys} is {str(value)[:40]}"


@pytest.mark.parametrize("numbers", PARTS, ids=str)
@pytest.mark.parametrize("which", slow_but(["z3"], ["z1", "z3", "z0"]))
def test_mutated_content(tmp_path: Path, which: str, numbers: range) -> None:
    pytest.importorskip("deepspeed")
    print(f"UCP_SEED={SEED}")
    folder = tmp_path / "run"
    shutil.copytree(OLDER[which], folder)
    contents = {path: torch.load(path, weights_only=False) for path in sorted((folder / TAG).glob("*.pt"))}

    def attack(seed: int) -> Callable[[], str]:
        def run() -> str:
            randomly = random.Random(seed)
            path = randomly.choice(list(contents))
            content = copy.deepcopy(contents[path])
            what = changed(content, randomly)
            kept = path.read_bytes()
            torch.save(content, path)
            try:
                everything(folder)
            except ucp.UcpError:
                raise
            except Exception as error:
                raise RuntimeError(f"{path.name}: {what}") from error
            finally:
                path.write_bytes(kept)
            return what

        return run

    verdicts: list[Verdict] = list(fight([attack(SEED + k) for k in numbers]))
    for k, verdict in zip(numbers, verdicts, strict=True):
        assert verdict.within_limits, f"UCP_SEED={SEED}, mutation {k}: {verdict}"
    assert any(verdict.kind == "refused" for verdict in verdicts)
