"""The same questions asked of checkpoints behind URLs, on a real S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest

import ucp
from tests.formats import raw
from tests.inspection.conftest import OLDER
from tests.s3 import put
from ucp.inspection.difference import diff
from ucp.inspection.listing import listing
from ucp.inspection.planning import plan
from ucp.inspection.report import write_report
from ucp.inspection.summary import summarise
from ucp.inspection.verify import verify
from ucp.parallel.mesh import Layout

pytestmark = pytest.mark.slow


def test_a_native_checkpoint(bucket: str, tmp_path: Path) -> None:
    url, folder = f"{bucket}/inspected", OLDER / "0.14.4-z3-fp32"
    put(folder, url)
    there, here = listing(url), listing(folder)
    assert there.latest == here.latest
    assert [(e.tag, e.step, e.bytes, e.files, e.whole, e.latest) for e in there.checkpoints] == [
        (e.tag, e.step, e.bytes, e.files, e.whole, e.latest) for e in here.checkpoints
    ]
    verdict = verify(url, finite=True)
    assert verdict.whole
    assert verdict.checked == verify(folder, finite=True).checked
    with ucp.open(url) as a, ucp.open(folder) as b:
        assert diff(a, b).same
        assert summarise(a).parameters == summarise(b).parameters
        assert plan(a, Layout(dp=3, zero=3)).ranks == plan(b, Layout(dp=3, zero=3)).ranks
    assert write_report(url, tmp_path / "r.html").whole


def test_planted_faults(bucket: str, consolidated: Path) -> None:
    from s3fs import S3FileSystem

    fs = S3FileSystem(use_listings_cache=False)
    name = "model-00001-of-00001.safetensors"
    raw.flip(consolidated / name, 900, 1)
    put(consolidated, f"{bucket}/planted")
    (found,) = [f for f in verify(f"{bucket}/planted").findings if f.fault]
    assert (found.kind, found.subject) == ("digest", f"{bucket}/planted/{name}")
    fs.rm_file(f"{bucket}/planted/{name}")
    (found,) = [f for f in verify(f"{bucket}/planted").findings if f.fault]
    assert (found.kind, found.subject) == ("file", f"{bucket}/planted/{name}")
    (entry,) = listing(f"{bucket}/planted").checkpoints
    assert not entry.whole
