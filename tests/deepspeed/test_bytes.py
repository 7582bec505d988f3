"""Every rank reads the bytes that it needs, and about no others."""

from __future__ import annotations

from typing import Any

import pytest

from tests.deepspeed.agree import differences
from tests.engines.build import build_engine
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.engines.sources import Sources
from tests.engines.truth import Truth, gather
from ucp import limits


def load_and_count(case: Case, folder: str, tag: str) -> tuple[int, int]:
    """On a rank: the bytes that were brought to it, and those that were read for that."""
    engine: Any = build_engine(case, initialize="ucp.deepspeed:initialize", extra={"ucp": {"enabled": True}})
    engine.load_checkpoint(folder, tag)
    report = engine.ucp.last_load
    return report.nbytes, report.bytes_read


def load_once(
    case: Case, folder: str, tag: str, once: bool | str, measured: bool
) -> tuple[int, int, bool, Truth | None]:
    """The same with ``read_once``; whether bytes were exchanged, and the state after it. measured: decide by measuring,
    however little there is."""

    limits.EXCHANGE_BUFFER_BYTES = 1 << 12  # many rounds
    if measured:
        limits.EXCHANGE_WORTHWHILE_BYTES = 1
    section = {"enabled": True, "load": {"read_once": once}}
    engine: Any = build_engine(case, initialize="ucp.deepspeed:initialize", extra={"ucp": section})
    engine.load_checkpoint(folder, tag)
    report = engine.ucp.last_load
    return report.nbytes, report.bytes_read, report.read_once, gather(engine)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Case(stage=1, dp=4, groups=2, frozen=True), Case(stage=3, dp=2, groups=2, frozen=True)),
        (Case(stage=3, dp=3, groups=2), Case(stage=2, dp=4, groups=2)),
    ],
    ids=["z1-to-z3", "z3-to-z2"],
)
def test_each_rank_reads_its_own_share(ranks: RankPool, sources: Sources, source: Case, target: Case) -> None:
    run = sources.get(source)
    truth = run.truth
    assert truth is not None
    trained = sum(t.nbytes for states in truth.params.values() for t in states.values())
    whole_on_every_rank = sum(b.nbytes for b in truth.buffers.values())
    frozen = sum(t.nbytes for t in truth.frozen.values())
    if target.stage < 3:
        whole_on_every_rank += frozen
    else:
        trained += frozen
    counted = ranks.run(load_and_count, target, run.folder, run.tag, world_size=target.dp)
    assert sum(nbytes for nbytes, _ in counted) == trained + target.dp * whole_on_every_rank
    assert sum(read for _, read in counted) <= 1.05 * (trained + target.dp * whole_on_every_rank)
    share = trained / target.dp + whole_on_every_rank
    assert all(read <= 1.15 * share for _, read in counted), "a rank read more than its share"


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [Case(stage=0, dp=4, groups=2, frozen=True), Case(stage=2, dp=3, groups=2, frozen=True)],
    ids=["whole-model", "frozen-and-buffers"],
)
def test_what_ranks_want_alike_is_read_once(ranks: RankPool, sources: Sources, target: Case) -> None:
    run = sources.get(Case(stage=1, dp=4, groups=2, frozen=True))
    truth = run.truth
    assert truth is not None
    everything = (
        sum(t.nbytes for states in truth.params.values() for t in states.values())
        + sum(t.nbytes for t in truth.frozen.values())
        + sum(b.nbytes for b in truth.buffers.values())
    )

    def load(once: bool | str, measured: bool = False) -> list[tuple[int, int, bool, Truth | None]]:
        case = target.but(seed=5)
        return ranks.run(load_once, case, run.folder, run.tag, once, measured, world_size=target.dp)

    alone, shared, measured = load(False), load(True), load("adaptive", measured=True)
    for loads in (alone, shared, measured):
        found = loads[0][3]
        assert found is not None
        assert differences(truth, found) == []
    assert [once for _, _, once, _ in alone] == [False] * target.dp
    assert [once for _, _, once, _ in shared] == [True] * target.dp
    assert len({once for _, _, once, _ in measured}) == 1  # the ranks agree, whatever it is
    # Gaps between short runs and a few bytes' alignment are all that is read beyond each byte once.
    assert sum(read for _, read, _, _ in shared) <= 1.05 * everything
    assert sum(read for _, read, _, _ in alone) > sum(read for _, read, _, _ in shared)
    if target.stage == 0:
        assert sum(read for _, read, _, _ in alone) >= target.dp * everything
        assert all(read <= 1.1 * everything / target.dp for _, read, _, _ in shared)


def test_read_once_is_never_auto() -> None:
    from ucp.deepspeed.config import parse
    from ucp.errors import BadArgument

    for value in (True, False, "adaptive"):
        assert parse({"ucp": {"enabled": True, "load": {"read_once": value}}}).load.read_once == value
    assert parse({"ucp": {"enabled": True}}).load.read_once == "adaptive"
    for value in ("auto", 1, 0.0, None, "yes"):
        with pytest.raises(BadArgument, match=r'"read_once"}} is true, false or "adaptive" \(never "auto"'):
            parse({"ucp": {"enabled": True, "load": {"read_once": value}}})
