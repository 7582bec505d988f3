"""What is asked of object storage: ranges, several at once, uploads in parts, and again where a request failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import ucp
from tests.faults import CUT, DROPPED, UNAVAILABLE, Proxy, Request, between, most_at_once
from tests.formats import raw
from tests.formats.deepspeed.write.test_native import ADAMW
from tests.s3 import put
from ucp import limits
from ucp.catalog import ParamGroup, TrainingState
from ucp.errors import DamagedCheckpoint, DestinationError
from ucp.storage import locations

pytestmark = pytest.mark.slow

SHAPES = {"w": (2000, 1000), "v": (1000, 1000), "b": (3,)}
PART = 5 << 20  # the least that S3 takes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of 12 MB with digests."""
    root = tmp_path_factory.mktemp("source")
    state = TrainingState((ParamGroup(tuple(SHAPES), {"lr": 0.1}),), global_steps=7, config=ADAMW)
    made = raw.make(root / "raw", shapes=SHAPES, states=("param", "exp_avg", "exp_avg_sq"), dp=2, training_state=state)
    return raw.write_consolidated(root / "universal", made.catalog)


@pytest.fixture
def proxy(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setattr(limits, "UPLOAD_PART_BYTES", PART)
    monkeypatch.setattr(limits, "REQUEST_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(limits, "REQUEST_ATTEMPTS_COUNT", 2)
    with between() as found:
        yield found


def test_reads_are_ranges_several_at_once(bucket: str, source: Path, proxy: Proxy, tmp_path: Path) -> None:
    put(source, f"{bucket}/ranged")
    proxy.delay = 0.03
    proxy.requests.clear()
    report = ucp.convert(f"{bucket}/ranged", tmp_path / "out", workers=3, max_memory=40 << 20)
    assert raw.tree(tmp_path / "out").keys() == raw.tree(source).keys()
    gets = proxy.of("GET", ".safetensors")
    assert gets
    assert all(request.range for request in gets)
    asked = 0
    for request in gets:
        first, last = map(int, (request.range or "").removeprefix("bytes=").split("-"))
        assert last - first < 9 << 20
        asked += last - first + 1
    assert report.bytes_read <= asked < 1.2 * sum(path.stat().st_size for path in source.iterdir())
    assert most_at_once(gets) >= 2


@pytest.mark.parametrize("to", ["universal", "deepspeed-universal", "dcp"])
def test_files_go_up_in_parts_several_at_once(bucket: str, source: Path, proxy: Proxy, tmp_path: Path, to: str) -> None:
    ucp.convert(source, tmp_path / "local", to)
    proxy.delay = 0.03
    ucp.convert(source, f"{bucket}/parts-{to}", to, workers=3)
    begun = Counter(r.path for r in proxy.of("POST") if "uploads" in r.query)
    parts = Counter(r.path for r in proxy.of("PUT") if "partNumber" in r.query)
    for name, content in raw.tree(tmp_path / "local").items():
        key = f"/runs/parts-{to}/{name}"
        if len(content) >= 2 * PART:
            assert begun[key] == 1
            assert 2 <= parts[key] <= -(-len(content) // PART)
    assert begun
    assert len(begun) < 2 or most_at_once(proxy.of("PUT")) >= 2
    assert_same(bucket, f"parts-{to}", tmp_path / "local")


def test_requests_that_fail_are_made_again(bucket: str, source: Path, proxy: Proxy, tmp_path: Path) -> None:
    """One in four requests fails, in every way there is; what arrives is right to the bit."""
    put(source, f"{bucket}/flaky")
    failed: set[tuple[str, str, str | None]] = set()
    ways = Counter[str]()

    def spoil(request: Request) -> str | None:
        one = request.method, request.target, request.range
        if one in failed or (len(proxy.requests) % 4 and "partNumber=2" not in request.target):
            return None
        failed.add(one)
        choice = min((UNAVAILABLE, DROPPED, CUT)[: 3 if request.method == "GET" else 2], key=lambda way: ways[way])
        ways[choice] += 1
        return choice

    proxy.spoil = spoil
    ucp.convert(f"{bucket}/flaky", f"{bucket}/flaky-out", workers=2)
    proxy.spoil = lambda request: None
    assert min(ways[way] for way in (UNAVAILABLE, DROPPED, CUT)) >= 1
    ucp.convert(source, tmp_path / "local")
    with ucp.open(f"{bucket}/flaky-out") as remote, ucp.open(tmp_path / "local") as local:
        assert remote.verify() > 0
        assert all(remote.read(*key).equal(local.read(*key)) for key in local.catalog.tensors)


@pytest.mark.parametrize("way", [UNAVAILABLE, DROPPED])
def test_an_upload_that_keeps_failing_is_told_and_leaves_nothing(
    bucket: str, source: Path, proxy: Proxy, way: str
) -> None:
    proxy.spoil = lambda request: way if "partNumber=2" in request.target else None
    with pytest.raises(DestinationError, match=rf"{bucket}/lost-{way}/.*safetensors: cannot be written: .+"):
        ucp.convert(source, f"{bucket}/lost-{way}")
    proxy.spoil = lambda request: None
    assert len([r for r in proxy.of("PUT") if "partNumber=2" in r.target]) > 2  # it was tried
    assert not locations.exists(f"{bucket}/lost-{way}")
    begun = [r for r in proxy.of("POST") if "uploads" in r.query]
    given_up = [r for r in proxy.of("DELETE") if "uploadId" in r.query]
    completed = [r for r in proxy.of("POST") if "uploadId" in r.query]
    assert len(given_up) + len(completed) >= len(begun)  # no parts stay behind that somebody pays for


@pytest.mark.parametrize("way", [UNAVAILABLE, DROPPED, CUT])
def test_a_read_that_keeps_failing_is_told(bucket: str, source: Path, proxy: Proxy, tmp_path: Path, way: str) -> None:
    put(source, f"{bucket}/unread-{way}")
    proxy.spoil = lambda request: way if request.method == "GET" and "exp_avg_sq" in request.target else None
    with pytest.raises(DamagedCheckpoint, match=rf"{bucket}/unread-{way}/optimizer.exp_avg_sq.*: cannot be read: .+"):
        ucp.convert(f"{bucket}/unread-{way}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def assert_same(bucket: str, name: str, local: Path) -> None:
    for path, content in raw.tree(local).items():
        if path != "ucp.json":  # it has the time of writing
            assert locations.read(f"{bucket}/{name}/{path}") == content, path
