"""Errors travel: to other processes as notes, through pickle, and to the other ranks of a job on real gloo ranks."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

import ucp
from tests import error_jobs as jobs
from tests.engines.pool import RankPool
from ucp import errors
from ucp.errors import DamagedCheckpoint, Position, SaveFailed, SpecError, UcpError, noted, rebuilt

OURS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, UcpError)]


@pytest.mark.parametrize("kind", OURS)
def test_a_note_is_json_and_makes_the_same_error_again(kind: type[UcpError]) -> None:
    error = kind("what is wrong")
    for again in (rebuilt(json.loads(json.dumps(noted(error)))), pickle.loads(pickle.dumps(error))):
        assert type(again) is kind
        assert str(again) == str(error) == "what is wrong"


def test_details_travel() -> None:
    error = SpecError("'w' is no axis", Position("my.yaml", 3, 7), "    w\n    ^")
    assert str(error) == "my.yaml:3:7: 'w' is no axis"
    again = rebuilt(json.loads(json.dumps(noted(error))), "rank 2: ")
    assert isinstance(again, SpecError)
    assert str(again) == f"rank 2: {error}"
    assert (again.position, again.picture) == (error.position, error.picture)
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.message, copied.position) == (str(error), error.message, error.position)


def test_an_error_knows_the_file_that_it_begins_with() -> None:
    error = DamagedCheckpoint("is truncated", file="a.pt")
    assert (str(error), error.file, error.message) == ("a.pt: is truncated", "a.pt", "is truncated")
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.file, copied.message) == (str(error), error.file, error.message)


def test_what_is_none_of_ours_names_its_class() -> None:
    note = noted(KeyError("x"))
    assert str(rebuilt(note)) == "KeyError: 'x'"
    assert type(rebuilt(note)) is SaveFailed
    assert type(rebuilt(note, otherwise=RuntimeError)) is RuntimeError
    # A note names classes of ours only, and nothing else that the module holds.
    assert type(rebuilt({**note, "kind": "Position"})) is SaveFailed


@pytest.mark.slow
def test_every_rank_raises_what_one_of_them_found(ranks: RankPool) -> None:
    first, second = ranks.run(jobs.refused_on_one_rank, world_size=2)
    expected = ("SpecError", "my.yaml:1:2: no such axis", ["my.yaml", 1, 2], "picture")
    assert second == expected
    assert first == (expected[0], f"rank 1: {expected[1]}", *expected[2:])


@pytest.mark.slow
def test_a_wrong_spec_is_the_same_refusal_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    """It is found by the first rank, which opens the checkpoint for all."""
    ucp.save({"w": torch.zeros(2)}, tmp_path / "ckpt")
    spec = tmp_path / "bad.yaml"
    spec.write_text("ucp: 1\nmodel: m\nparameters:\n  w: (((\n")
    first, second = ranks.run(jobs.loads_with_spec, str(tmp_path / "ckpt"), str(spec), world_size=2)
    assert first[0] == second[0] == "SpecError"
    assert first[1].startswith(f"{spec}:4:")
    assert second == (first[0], f"rank 0: {first[1]}", *first[2:])
