"""Fixtures for the whole session: real ranks, and the checkpoints that real engines wrote, from the first use on."""

from __future__ import annotations

import gc
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from scripts import gpu_builds
from ucp.errors import UcpError

if TYPE_CHECKING:
    from tests.engines.moe import MoeSources
    from tests.engines.parallel_runs import ParallelSources
    from tests.engines.pool import RankPool
    from tests.engines.sources import Sources


gpu_builds.plain_architectures()

# Until all is collected (below): what is imported stays.
gc.disable()

# The same examples in every run, wherever it is; --hypothesis-profile=explore looks for new ones.
settings.register_profile("repeat", derandomize=True, database=None)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile("repeat")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers take the files in this order, a file each: those with many seconds of slow tests begin, the quick ones
    fill what is left at the end."""
    if not hasattr(config, "workerinput"):
        return
    seconds: Counter[Path] = Counter()
    for item in items:
        module = item.getparent(pytest.Module)
        whole = [] if module is None else [mark for mark in module.own_markers if "seconds" in mark.kwargs]
        slow = item.get_closest_marker("slow")
        if whole:
            seconds[item.path] = whole[0].kwargs["seconds"]
        elif slow is not None:
            seconds[item.path] += slow.kwargs.get("seconds", 1)
    items.sort(key=lambda item: -seconds[item.path])  # stable: a file's tests stay together and in their order


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Where another release than the pinned one wrote something that this project rightly refuses, the test skips, as
    tests of ranks do (`tests.engines.releases`)."""
    try:
        return (yield)
    except UcpError as error:
        from tests.engines import releases

        if reason := releases.fault([str(error)]):
            pytest.skip(reason)
        raise


def pytest_collection_finish() -> None:
    """What was imported and collected stays until the end; collections of garbage need not look at it each time, nor
    need forks copy the pages that it lies in."""
    gc.freeze()
    gc.enable()
    # pytest goes to each logger that does not propagate six times a test, and torch has sixty.
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.split(".")[0] == "torch":
            logger.propagate = True


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Real DeepSpeed ranks; tests that use them are marked slow."""
    from tests.engines.pool import RankPool

    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is made once in a session, the same for all workers that run its tests side by side."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kept"
    folder.mkdir(exist_ok=True)
    return folder


def _inside(folder: Path, name: str) -> Path:
    (folder / name).mkdir(exist_ok=True)
    return folder / name


@pytest.fixture(scope="session")
def sources(ranks: RankPool, kept: Path) -> Sources:
    """Checkpoints by case, each made once in a session; read-only."""
    from tests.engines.sources import Sources

    return Sources(ranks, _inside(kept, "sources"))


@pytest.fixture(scope="session")
def auto_sources(ranks: RankPool, kept: Path) -> MoeSources:
    """The same of models under AutoEP."""
    from tests.engines import autoep
    from tests.engines.moe import MoeSources

    return MoeSources(ranks, _inside(kept, "autoep"), autoep.train, lambda case, ours: autoep.PRELOAD)


@pytest.fixture(scope="session")
def moe_sources(ranks: RankPool, kept: Path) -> MoeSources:
    """The same of models with experts."""
    from tests.engines.moe import MoeSources

    return MoeSources(ranks, _inside(kept, "moe"))


@pytest.fixture(scope="session")
def pipes(ranks: RankPool, kept: Path) -> ParallelSources:
    """Checkpoints of pipelines by case, each made once in a session; read-only."""
    from tests.engines.parallel_runs import ParallelSources

    return ParallelSources(ranks, _inside(kept, "pipes"))


@pytest.fixture(scope="session")
def sliced(ranks: RankPool, kept: Path) -> ParallelSources:
    """Checkpoints of tensor-parallel engines by case, each made once in a session; read-only."""
    from tests.engines.parallel_runs import ParallelSources

    return ParallelSources(ranks, _inside(kept, "sliced"))


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

    for name in ("Pipe", "start_process"):
        monkeypatch.setattr(writer, name, getattr(writer, name))
    save_jobs.fork_writers()
    renew = save.background_saver().dismiss
    renew()
    yield renew
    renew()
