"""Saves record every tensor's logical digest: equal to that of the whole tensor, however many ranks wrote it."""

from __future__ import annotations

import mmap
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ucp
from tests.logical.test_digest import by_definition
from tests.saving import save_jobs as jobs
from tests.slow_cases import slow_but
from ucp.catalog import Catalog, LogicalTensor, TrainingState
from ucp.geometry import box, whole
from ucp.job.stopwatch import Stopwatch
from ucp.logical.record import EVERY
from ucp.logical.runs import Sample
from ucp.parallel.mesh import Layout
from ucp.saving import crew
from ucp.saving.adding import Adding
from ucp.storage.digests import digest_chunks
from ucp.storage.kept.files import Lease


@pytest.mark.parametrize(("seed", "world"), slow_but([(0, 2), (1, 3), (2, 4)], product(range(3), range(1, 5))))
def test_saves_record_the_digest_of_every_whole_tensor(tmp_path: Path, world: int, seed: int) -> None:
    values = jobs.values(seed, True)
    assert jobs.save(tmp_path, "now", [jobs.source(values, rank, world, seed) for rank in range(world)]).code == 0
    with ucp.open(tmp_path) as checkpoint:
        tensors = checkpoint.catalog.tensors
    assert tensors.keys() == values.keys()
    for key, value in values.items():
        digest = tensors[key].digest
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert digest is not None, key
        assert digest.whole == by_definition(raw), key
        assert digest.sampled == digest.whole
        assert digest.sample.every == EVERY


@pytest.mark.parametrize("digesters", slow_but([3], [0, 1, 3]))
@pytest.mark.parametrize("window", slow_but([1 << 20], [1 << 20, (1 << 20) + 24, 999]))
def test_windows_may_cut_anywhere(window: int, digesters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are written one after the other, and where they stay and are digested by one process or by several."""
    rng = np.random.default_rng(window)
    values = {
        "flat": rng.standard_normal((300, 700)).astype(np.float32),
        "turned": rng.standard_normal((20, 90)).astype(np.float32),
        "large": rng.integers(0, 255, (100, 33_333), dtype=np.uint8),
    }
    buffer = np.zeros(24, np.uint8)
    tensors = {}
    for name, value in values.items():
        strides = [1, value.shape[0]] if name == "turned" else [value.shape[1], 1]
        raw = np.ascontiguousarray(value.T if name == "turned" else value).reshape(-1).view(np.uint8)
        blocks = box([0, 0], value.shape, 0, strides)
        dtype = str(value.dtype)
        tensors[name, "param"] = LogicalTensor(
            name, "param", value.shape, dtype, blocks, np.array([len(buffer)], np.int64)
        )
        buffer = np.concatenate([buffer, raw])
    tensors["none", "param"] = LogicalTensor("none", "param", (0,), "float32", whole((0,)), np.zeros(0, np.int64))
    catalog = Catalog("universal", "", Layout(), (), {}, tensors, TrainingState())
    sample = Sample(5, 4)
    adding = Adding(catalog, sample)
    view = memoryview(buffer)
    windows = [(at, view[at : at + window]) for at in range(0, len(buffer), window)]
    table = b"".join(digest_chunks(part) for _, part in windows)
    if digesters == 1:
        assert adding.all_of(iter(windows)) == table
    elif digesters:
        lent = mmap.mmap(-1, len(view))
        lent[:] = view
        monkeypatch.setattr(crew, "of_run", lambda run: SimpleNamespace(leased=lambda lease: lent))
        processes = crew.Crew(digesters)
        lease = Lease("run", 0, 0, 0, len(view))
        assert adding.by(processes, lease, iter(windows)) == table
        with pytest.raises(ZeroDivisionError):  # what comes next is of another snapshot
            adding.by(processes, lease, ((at, part[: 1 // (len(view) - at - len(part))]) for at, part in windows))
        assert Adding(catalog, sample).by(processes, lease, iter(windows)) == table
        processes.end()
    else:
        assert list(adding.along(iter(windows), Stopwatch())) == windows
    found = adding.catalog().tensors
    for name, value in values.items():
        digest = found[name, "param"].digest
        assert digest is not None
        assert digest.whole == by_definition(value.tobytes())
        picked = np.zeros(value.nbytes, np.uint8)
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        for k in sample.picks(value.nbytes).tolist():
            picked[k << 16 : (k + 1) << 16] = raw[k << 16 : (k + 1) << 16]
        assert digest.sampled == by_definition(picked.tobytes())
