"""Put a checkpoint of any layout into a live training process, all of it or nothing.

All ranks agree on each step before the next. First compare and plan. Then check: every byte that will be used is
compared with its digest, and nothing is kept (or all is held in host memory: `ucp.loading.strategy`). Nothing that
anyone has seen is changed so far, and if a rank finds something wrong, all ranks refuse.

Then bring: read again, straight to where the values live. Now only an I/O error, a file that was changed meanwhile or a
death can stop the load; then every rank raises the same PartlyLoaded. One rank may read what several want
(`ucp.loading.exchange`). Last, prove: what is live now has the checkpoint's logical digests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from ucp import limits
from ucp.catalog import Catalog
from ucp.errors import BadArgument, PartlyLoaded, ProofFailed, described
from ucp.interpreter import no_collections, quick_turns
from ucp.job import ranks
from ucp.job.live_digest import prepared
from ucp.job.stopwatch import Stopwatch
from ucp.job.torch_threads import all_processors
from ucp.loading import exchange, proof, strategy, tied, together
from ucp.loading.bring import Brought, bring
from ucp.loading.match import plan
from ucp.loading.nouns import Entry, LoadPlan, Wish
from ucp.loading.patterns import unmatched
from ucp.loading.proof import Proof
from ucp.loading.read import RankReads, hold, reading_threads, sample
from ucp.loading.report import LoadReport
from ucp.loading.target import Loaded, Target
from ucp.storage.files import Files
from ucp.transfer import checking
from ucp.transfer.copies import CopyTable
from ucp.transfer.reader import Reader

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@no_collections()  # objects are made, and no garbage
@quick_turns()
def load(
    catalog: Catalog,
    target: Target | Callable[[], Target],
    wish: Wish,
    *,
    path: str = "",
    verify: bool = True,
    threads: int | None = None,
    read_once: bool | str = False,
    watch: Stopwatch | None = None,
    alone: bool = False,
    prove: bool | str = True,
    changes: tuple[str, ...] = (),
    memory: int = limits.LOAD_MEMORY_BYTES,
) -> LoadReport:
    """Restore the target from the catalog. Collective: all ranks call it with the same catalog and wish.

    target: what is to be filled, or a function that makes it without communicating. If that fails on one rank, all
    refuse. path: the checkpoint's, for the report. verify: check the chunks that are read against the checkpoint's
    digests, if it has them, and records of torch files that the ranks read whole, together, against their CRC-32s.
    read_once: have one rank read each byte that several want, and exchange it; 'adaptive' does so where it is measured
    to be faster. watch: the stopwatch of a load that began earlier, with opening. alone: do not communicate. Something
    else makes the ranks agree (torch.distributed.checkpoint), and tensors that others hold parts of are not proved.
    prove: afterwards compare what is live with the checkpoint's logical digests (`ucp.loading.proof.CHOICES`). changes:
    for the report. memory: how many bytes of host memory this rank may take beyond what is live.

    Raises, with nothing changed: Mismatch if anything would stay unrestored or unused against the wish,
    DamagedCheckpoint if files are damaged, BadArgument for an unknown ``read_once`` or ``prove``, Unsupported if the
    process group cannot exchange what is to be read once. Raises PartlyLoaded, on all ranks the same, if it fails when
    part of it is in place, and ProofFailed with everything in place.
    """
    exchange.check_choice(read_once)
    proof.check_choice(prove)
    workers = within(memory, threads or reading_threads())
    watch = watch or Stopwatch()
    agreed: Callable[[Callable[[], T]], T] = _by_itself if alone else ranks.all_or_none
    state = None if wish.weights_only else catalog.training_state
    live, what = agreed(lambda: watch.timed("plan", lambda: _checked_plan(catalog, target, wish, changes)))
    how = _How(live, catalog, path, verify, workers, memory, alone, prove, agreed, watch)
    proving = prepared() if proof.is_wanted(catalog, prove) else None
    with Files() as files:
        tied.check(Reader(catalog, files, verify), what.tied, live.words, watch, alone)
        sharing = None
        if read_once and not alone and ranks.world_size() > 1:
            sharing = watch.timed("exchange", lambda: _sharing(how, what, files, read_once))
        new, rest = agreed(lambda: watch.timed("plan", lambda: RankReads.in_two(live, what, sharing, watch)))
        ready = _checked(how, new, rest, files)
        if ready.held is not None:
            _exchange(how, sharing, ready.held)
        with _changing(how):
            brought = _brought(how, rest, ready, files)
            if ready.held is None:
                _exchange(how, sharing, brought.there)
            loaded = Loaded(brought, what.scalars, what.options, what.sources, state, what.named)
            _together(how, "apply", lambda: _put(how, loaded, ready, files))
            _together(how, "apply", lambda: _applied(how, loaded))
        bytes_read = files.bytes_read
    proved = _seen(how, ready, lambda: watch.timed("prove", lambda: _proved(how, what, brought.as_read, proving)))
    nbytes = new.nbytes + rest.nbytes, bytes_read - ready.bytes_checked
    return replace(_report(how, what, ready, nbytes, sharing is not None, proved), changes=changes)


@dataclass(frozen=True, eq=False)
class _How:
    """One load's target and its ways: arguments of `load`, and how ranks agree."""

    live: Target
    catalog: Catalog
    path: str
    verify: bool
    threads: int
    memory: int
    alone: bool
    prove: bool | str
    agreed: Callable[[Callable[[], Any]], Any]
    watch: Stopwatch


@dataclass(frozen=True, eq=False)
class _Ready:
    """What is known once nothing but I/O can go wrong. strategy: one of `strategy.STRATEGIES`. reader: for bringing.
    marks: the files as they were. compared: what of them was compared with digests. shared: what the ranks verify
    together. new: what is in its place already, where nobody has seen it. bytes_checked: how many bytes were read that
    will be read again. held: what was read of the rest already."""

    strategy: str
    reader: Reader
    marks: checking.FileMarks
    compared: checking.Ranges
    shared: together.Together
    new: Brought
    bytes_checked: int = 0
    held: Mapping[Entry, torch.Tensor] | None = None


def _checked(how: _How, new: RankReads, rest: RankReads, files: Files) -> _Ready:
    """The first phase: nothing is changed that anyone has seen. Collective, unless alone.

    new: what goes to where nobody has seen anything, so that it is brought at once.
    """
    before = files.bytes_read
    shared, every = _verified_together(how, lambda: how.watch.timed("plan", lambda: _used(new, rest)))
    looking, reader = (Reader(how.catalog, files, how.verify, parts=shared.parts) for _ in range(2))

    def look() -> tuple[checking.Ranges, strategy.ReadFacts, checking.FileMarks]:
        wanted = checking.used(rest.copies) if new.copies else every
        if not shared.records:
            looking.records.expect(every)
            reader.records.expect(every)
        compared = checking.comparable(looking, wanted, every, shared.records)
        found = strategy.facts(looking, wanted, compared, rest.held, how.memory, limits.ranks_here())
        marks = checking.FileMarks.of(looking, files, every)
        if how.verify and not how.alone and how.prove is not False:
            found = replace(found, proved=proof.sees_all(how.live, rest.wants))
        return compared, strategy.with_costs(found, looking, compared, how.threads), marks

    compared, facts, marks = how.agreed(lambda: how.watch.timed("plan", look))
    chosen = strategy.agreed(facts, how.alone)
    held: Mapping[Entry, torch.Tensor] | None = None
    checked = 0

    def check() -> None:
        if chosen in (strategy.VERIFY_THEN_READ, strategy.VERIFY_READ_PROVE):
            checking.compare(looking, compared, how.threads)

    def read() -> Brought:
        nonlocal held
        if chosen == strategy.HOLD:
            held = hold(rest, reader, files, how.threads)
        brought = bring(new, reader, files, how.threads, how.memory, how.watch)
        marks.check(files)
        return brought

    def work() -> Brought:
        nonlocal checked
        if chosen != strategy.HOLD:
            how.watch.timed("check", check)
        checked = files.bytes_read - before
        return how.watch.timed("read", read)

    brought = how.agreed(work)
    if shared.is_needed and chosen != strategy.VERIFY_WHILE_BRINGING:
        how.watch.timed("check", lambda: shared.compare(how.agreed, looking, reader))
    if chosen == strategy.VERIFY_READ_PROVE:
        reader = reader.again()
    return _Ready(chosen, reader, marks, compared, shared, brought, checked, held)


def _used(new: RankReads, rest: RankReads) -> checking.Ranges:
    """The byte ranges of files that both read."""
    return checking.used(CopyTable.joined([new.copies, rest.copies]))


def _verified_together(how: _How, used: Callable[[], checking.Ranges]) -> tuple[together.Together, checking.Ranges]:
    """As `together.find`, if there are ranks to verify anything with."""
    if how.alone or not how.verify or ranks.world_size() == 1:
        return together.Together(), how.agreed(used)
    return together.find(how.catalog, how.agreed, used)


def _brought(how: _How, rest: RankReads, ready: _Ready, files: Files) -> Brought:
    """Begin to change what is live. The second phase's reading, unless everything is held. Collective, unless alone."""

    def work() -> Brought:
        how.live.begin()
        there = ready.new.there
        if ready.held is not None:
            return Brought({**there, **ready.held})
        brought = bring(rest, ready.reader, files, how.threads, how.memory, how.watch)
        return replace(brought, there={**there, **brought.there})

    brought = _together(how, "apply" if ready.held is not None else "read", work)
    if ready.shared.is_needed and ready.strategy == strategy.VERIFY_WHILE_BRINGING:
        ready.shared.compare(partial(_together, how, "check"), ready.reader)
    return brought


def _exchange(how: _How, sharing: exchange.Sharing | None, tensors: Mapping[Entry, torch.Tensor]) -> None:
    if sharing is not None:
        how.watch.timed("exchange", lambda: exchange.exchange(sharing, tensors))


def _put(how: _How, loaded: Loaded, ready: _Ready, files: Files) -> None:
    with how.watch.part("put"), all_processors():
        how.live.put(loaded)
    if ready.held is None:
        ready.marks.check(files)


def _applied(how: _How, loaded: Loaded) -> None:
    with how.watch.part("round"), all_processors():
        how.live.apply(loaded)


def _seen(how: _How, ready: _Ready, prove: Callable[[], Proof | None]) -> Proof | None:
    """The proof. If it fails or has not seen everything, what was read without being compared is compared after all, so
    that a file that was changed meanwhile is named. Collective, unless alone."""
    failed, proved = None, None
    try:
        proved = prove()
    except ProofFailed as error:
        failed = error
    whole = proved is not None and proved.complete and proved.sample is None
    if ready.strategy == strategy.VERIFY_READ_PROVE and not whole:
        with _changing(how), Files() as files:
            looking = Reader(how.catalog, files, parts=ready.shared.parts)
            _together(how, "check", lambda: checking.compare(looking, ready.compared, how.threads))
    if failed is not None:
        raise failed
    return proved


def _together(how: _How, stage: str, work: Callable[[], T]) -> T:
    """Do a part of the second phase. If it fails on a rank, all raise the same PartlyLoaded. Collective, unless
    alone."""
    result: T | None = None
    error: Exception | None = None
    try:
        result = how.watch.timed(stage, work)
    except Exception as found:  # noqa: BLE001 (raised again once all ranks know)
        error = found
    said = [None if error is None else described(error)]
    if not how.alone:
        said = ranks.gather(said[0])
    failed = next((rank for rank, text in enumerate(said) if text is not None), None)
    if failed is not None:
        why = f"rank {failed}: {said[failed]}" if len(said) > 1 else str(said[failed])
        raise PartlyLoaded(how.live.words.partly(how.path, why)) from error
    return result  # type: ignore[return-value]


@contextmanager
def _changing(how: _How) -> Iterator[None]:
    """Whatever error ends this block is PartlyLoaded, even if the ranks can no longer agree."""
    try:
        yield
    except PartlyLoaded:
        raise
    except Exception as error:
        raise PartlyLoaded(how.live.words.partly(how.path, described(error))) from error


def within(memory: int, threads: int) -> int:
    """How many threads may read within so many bytes. Raises BadArgument for too few bytes."""
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise BadArgument(f"a load's memory is a number of bytes; found {memory!r}")
    if memory < limits.LOAD_MEMORY_LEAST_BYTES:
        raise BadArgument(
            f"a load's memory of {memory} bytes is too little; at least {limits.LOAD_MEMORY_LEAST_BYTES} are needed"
        )
    return max(min(threads, memory // limits.LOAD_THREAD_BYTES), 1)


def _report(
    how: _How, what: LoadPlan, ready: _Ready, nbytes: tuple[int, int], read_once: bool, proved: Proof | None
) -> LoadReport:
    """nbytes: how many bytes were restored, and how many this rank read."""
    return LoadReport(
        len({(w.tensor.name, w.tensor.state) for wants in what.wants.values() for w in wants}),
        *nbytes,
        f"{how.catalog.format} {how.catalog.layout}",
        str(how.live.layout),
        how.watch.with_wait(),
        what,
        read_once,
        {"digest": ready.reader.digest_seconds, **how.watch.parts},
        how.path,
        ready.reader.verified_bytes,
        ready.reader.unverified_bytes,
        proved,
        strategy=ready.strategy,
    )


def _proved(
    how: _How, what: LoadPlan, brought: Mapping[Entry, torch.Tensor], making_ready: Thread | None
) -> Proof | None:
    if making_ready is not None:
        making_ready.join()
    with Files() as files, ranks.alone() if how.alone else nullcontext():
        reader = Reader(how.catalog, files)
        return proof.prove(
            how.catalog, how.live, what, reader, how.prove, brought=brought, threads=how.threads, alone=how.alone
        )


def _by_itself(work: Callable[[], T]) -> T:
    return work()


def _checked_plan(
    catalog: Catalog, target: Target | Callable[[], Target], wish: Wish, changes: tuple[str, ...]
) -> tuple[Target, LoadPlan]:
    made = target() if callable(target) else target
    what = plan(catalog, made, wish)
    if not wish.weights_only:
        made.check(catalog.training_state, what.sources)
    return made, replace(what, notes=(*what.notes, *unmatched(catalog, made, wish, is_changed=bool(changes))))


def _sharing(how: _How, what: LoadPlan, files: Files, read_once: bool | str) -> exchange.Sharing | None:
    """What is read once; None if every rank reads for itself. Collective."""
    if not exchange.is_possible(read_once):
        return None
    sharing = exchange.find(how.live, what)
    if not sharing.all_groups:
        return None
    if read_once == exchange.ADAPTIVE:
        reader = Reader(how.catalog, files, how.verify)
        parts = exchange.shared_parts(what, sharing)
        if not exchange.is_worthwhile(what, sharing, parts, partial(sample, reader, threads=how.threads)):
            return None
    return sharing
