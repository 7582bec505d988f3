"""Saving behind a URL, where nothing is renamed: on a real S3 server."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest
import torch

import ucp
from tests.saving import save_jobs as jobs
from ucp import limits
from ucp.errors import DestinationError, NotACheckpoint, SaveFailed
from ucp.saving import commit
from ucp.saving.commit import Session
from ucp.saving.retention import Keep
from ucp.saving.save import write_share
from ucp.storage import locations

pytestmark = pytest.mark.slow


def begun(url: str, tag: str, seed: int, world: int = 3, keep: Keep | None = None) -> tuple[Session, str]:
    """A save whose ranks have all written; the digest of its tensors."""
    values = jobs.values(seed, small=True)
    session = commit.begin(url, tag, world, keep=keep)
    for rank in range(world):
        write_share(session, rank, jobs.source(values, rank, world, seed))
    return session, jobs.digest(values)


def found(url: str, tag: str | None = None) -> str:
    with ucp.open(url, tag=tag) as checkpoint:
        checkpoint.verify()
        return jobs.digest({key: checkpoint.read(*key) for key in checkpoint.catalog.tensors})


def test_a_save_appears_with_its_manifest(bucket: str) -> None:
    url = f"{bucket}/appears"
    session, digest = begun(url, "step1", 1)
    with pytest.raises(NotACheckpoint):
        ucp.open(url)
    assert not session.is_published()
    assert commit.commit(session) > 0
    assert session.is_published()
    assert found(url) == digest
    assert locations.read(f"{url}/latest") == b"step1"
    with ucp.open(url) as checkpoint:
        assert checkpoint.training_state.global_steps == 1
        assert torch.equal(checkpoint.training_state.client_state["table"], torch.arange(5) + 1)


def test_saving_a_tag_again_is_safe_at_every_step(bucket: str) -> None:
    """The same tag, as Accelerate uses: the old one stays until the new manifest is there."""
    url = f"{bucket}/again"
    session, old = begun(url, "one", 1)
    commit.commit(session)
    second, new = begun(url, "one", 2)
    assert found(url) == old
    commit.commit(second)
    assert found(url) == new
    assert locations.names(f"{url}/one") == sorted([second.save, "ucp.json"])
    third, _ = begun(url, "one", 3)
    commit.abandon(third)
    assert found(url) == new
    failed, _ = begun(url, "one", 4, world=2)
    commit.leave_failure(failed, 1, DestinationError("the network is away"))
    locations.remove(failed.receipt(1))
    with pytest.raises(DestinationError, match="rank 1 failed: the network is away"):
        commit.commit(failed)
    assert found(url) == new


def test_ranks_that_leave_no_receipt(bucket: str) -> None:
    url = f"{bucket}/missing"
    session = commit.begin(url, "step1", 2)
    write_share(session, 0, jobs.source(jobs.values(1, small=True), 0, 2, 1))
    with pytest.raises(SaveFailed, match=r"1 of 2 ranks \(1\) left no receipt within 0.3 seconds"):
        commit.commit(session, timeout=0.3)
    assert not locations.exists(f"{url}/step1")


def test_leftovers_and_other_things(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{bucket}/leftovers"
    dead, _ = begun(url, "step1", 1)
    locations.write(f"{url}/notes/read.me", b"mine")
    with pytest.raises(DestinationError, match="notes: exists already and holds no checkpoint"):
        commit.begin(url, "notes", 1)
    commit.begin(url, "step2", 1)
    assert locations.exists(dead.temporary)
    monkeypatch.setattr(limits, "STALE_FOLDER_SECONDS", -3600)
    commit.begin(url, "step3", 1)
    assert not locations.exists(dead.temporary)
    assert locations.read(f"{url}/notes/read.me") == b"mine"


def test_only_the_newest_stay(bucket: str) -> None:
    url = f"{bucket}/newest"
    digests = {}
    for step in (1, 2, 3, 4):
        session, digests[step] = begun(url, f"step{step}", step, world=1, keep=Keep(1, 2))
        commit.commit(session)
        time.sleep(1.1)  # an object's time has whole seconds
    assert [n for n in locations.names(url) if n != "latest"] == ["step2", "step4"]
    assert found(url) == digests[4]
    assert found(url, "step2") == digests[2]


def test_a_session_can_be_sent_to_other_ranks(bucket: str, tmp_path: Path) -> None:
    import pickle

    session = commit.begin(f"{bucket}/sent", "step1", 1)
    copy = pickle.loads(pickle.dumps(session))
    assert dataclasses.asdict(copy) == dataclasses.asdict(session)
    assert str(copy.path("x")).startswith("s3://")
    assert os.listdir(tmp_path) == []
