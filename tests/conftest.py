"""Fixtures for the whole session: real ranks, and the checkpoints that real engines wrote, from the first use on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from scripts import gpu_builds

if TYPE_CHECKING:
    from tests.engines.moe import MoeSources
    from tests.engines.parallel_runs import ParallelSources
    from tests.engines.pool import RankPool
    from tests.engines.sources import Sources


gpu_builds.plain_architectures()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Real DeepSpeed ranks; tests that use them are marked slow."""
    from tests.engines.pool import RankPool

    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def sources(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sources]:
    """Checkpoints by case, each made once in a session; read-only."""
    from tests.engines.sources import Sources

    made = Sources(ranks, tmp_path_factory.mktemp("sources"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def moe_sources(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> MoeSources:
    """The same of models with experts."""
    from tests.engines.moe import MoeSources

    return MoeSources(ranks, tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="session")
def pipes(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> ParallelSources:
    """Checkpoints of pipelines by case, each made once in a session; read-only."""
    from tests.engines.parallel_runs import ParallelSources

    return ParallelSources(ranks, tmp_path_factory.mktemp("pipes"))


@pytest.fixture(scope="session")
def sliced(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> ParallelSources:
    """Checkpoints of tensor-parallel engines by case, each made once in a session; read-only."""
    from tests.engines.parallel_runs import ParallelSources

    return ParallelSources(ranks, tmp_path_factory.mktemp("sliced"))


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The URL of a bucket of a real S3 server on this machine."""
    from tests.s3 import serve

    with serve() as url:
        yield url


@pytest.fixture
def forked_writers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Saves in the background are written by forks of the test's process, in which what a test has changed counts; call
    it to let the next save have a new one."""
    from tests.saving import save_jobs
    from ucp.saving import writer
    from ucp.torchdist import save

    for name in ("Pipe", "_start"):
        monkeypatch.setattr(writer, name, getattr(writer, name))
    save_jobs.fork_writers()
    renew = save._saver()._dismiss
    renew()
    yield renew
    renew()
