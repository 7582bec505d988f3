"""Put a checkpoint of any layout into a live training process, all of it or nothing.

There are three steps, and all ranks agree on each before the next. First compare and plan; nothing is changed. Then
read this rank's byte ranges into host memory; nothing is changed that anyone has seen. Then apply. If a rank finds
something wrong in the first two, all ranks refuse. Bytes that several ranks want may be read by only one of them
(`ucp.loading.exchange`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from ucp.catalog import Catalog
from ucp.job import ranks
from ucp.job.stopwatch import Stopwatch, stages_text
from ucp.loading import exchange, proof, tied
from ucp.loading.match import Entry, LoadPlan, Wish, plan
from ucp.loading.proof import Proof
from ucp.loading.read import Reading, reading_threads
from ucp.loading.target import Loaded, Target
from ucp.storage.files import Files
from ucp.transfer.reader import Reader
from ucp.units import bytes_text, counted

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class LoadReport:
    """What a load did, for people and logs.

    Attributes
    ----------
    tensors
        How many tensors of the checkpoint were brought to this rank.
    nbytes
        How many bytes these have on this rank.
    bytes_read
        How many bytes were read from the files for them, with gaps between short runs and whole digest chunks.
    source, target
        The checkpoint's format and layout, and the layout of this run.
    seconds
        Stage -> seconds on this rank: open (on the first rank), plan, read, exchange (of what is read once, and
        measuring whether that is worth it), apply, prove, and wait (for the other ranks).
    plan
        What the load did in detail.
    read_once
        Whether ranks that want the same bytes read them once, and exchanged them.
    overlapping
        Seconds within those stages. 'digest': checking what was read, summed over all reading threads.
    path
        The checkpoint's.
    verified_bytes
        How many of the bytes that this rank read were compared with the checkpoint's digests, or with CRC-32s of
        records that it read whole.
    unverified_bytes
        How many were not compared, since there is neither of these, or the record was read only in part.
    proof
        The proof that what is live now is what the checkpoint has. None without one, as if there are no digests.
    changes
        What was changed on purpose since the checkpoint was saved, as it was declared, a line each.
    """

    tensors: int
    nbytes: int
    bytes_read: int
    source: str
    target: str
    seconds: Mapping[str, float]
    plan: LoadPlan
    read_once: bool = False
    overlapping: Mapping[str, float] = field(default_factory=dict)
    path: str = ""
    verified_bytes: int = 0
    unverified_bytes: int = 0
    proof: Proof | None = None
    changes: tuple[str, ...] = ()

    @property
    def left(self) -> tuple[str, ...]:
        """What stayed as it was, since the caller allowed it or the checkpoint has no hyperparameters for it."""
        return self.plan.left

    @property
    def unused(self) -> tuple[str, ...]:
        """What the checkpoint has and the load did not use, since the caller allowed it."""
        return self.plan.unused

    def __str__(self) -> str:
        text = (
            f"restored {counted(self.tensors, 'tensor')} ({bytes_text(self.nbytes)} on this rank) from {self.source} "
            f"to {self.target} in {stages_text(self.seconds)}"
        )
        if self.unverified_bytes:
            text += f"; verified {bytes_text(self.verified_bytes)}, not {bytes_text(self.unverified_bytes)}"
        if self.left:
            text += f"; left as they were: {len(self.left)} ({', '.join(self.left[:4])}, …)"
        if self.unused:
            text += f"; not used: {len(self.unused)} ({', '.join(self.unused[:4])}, …)"
        if self.changes:
            text += f"; changed as declared: {'; '.join(self.changes)}"
        if self.proof is not None:
            text += f"; {self.proof}"
        return f"{text} ({self.path})" if self.path else text


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
) -> LoadReport:
    """Restore the target from the catalog. Collective: all ranks call it with the same catalog and wish.

    target: what is to be filled, or a function that makes it without communicating. If that fails on one rank, all
    refuse. path: the checkpoint's, for the report. verify: check the chunks that are read against the checkpoint's
    digests, if it has them, and records of torch files that this rank reads whole against their CRC-32s. read_once:
    have one rank read each byte that several want, and exchange it; 'adaptive' does so where it is measured to be
    faster. watch: the stopwatch of a load that began earlier, with opening. alone: do not communicate. Something else
    makes the ranks agree (torch.distributed.checkpoint), and tensors that others hold parts of are not proved. prove:
    afterwards compare what is live with the checkpoint's logical digests (`ucp.loading.proof.CHOICES`). changes: for
    the report.

    Raises, with nothing changed: Mismatch if anything would stay unrestored or unused against the wish,
    DamagedCheckpoint if files are damaged, BadArgument for an unknown ``read_once`` or ``prove``, Unsupported if the
    process group cannot exchange what is to be read once. Raises ProofFailed with everything in place.
    """
    exchange.check_choice(read_once)
    proof.check_choice(prove)
    watch = watch or Stopwatch()
    agreed: Callable[[Callable[[], T]], T] = _by_itself if alone else ranks.all_or_none
    state = None if wish.weights_only else catalog.training_state
    live, what = agreed(lambda: watch.timed("plan", lambda: _checked_plan(catalog, target, wish)))
    sharing = None
    with Files() as files:
        reading = Reading(Reader(catalog, files, verify), files, live, what, threads or reading_threads())
        tied.check(reading.reader, what.tied, live.words, watch, alone)
        if read_once and not alone and ranks.world_size() > 1:
            sharing = watch.timed("exchange", lambda: _sharing(reading, read_once))
        nbytes = exchange.nbytes(what, frozenset(what.wants))
        tensors = agreed(lambda: watch.timed("read", lambda: reading.run(sharing, nbytes)))
        bytes_read = files.bytes_read
    if sharing is not None:
        watch.timed("exchange", lambda: exchange.exchange(sharing, tensors))
    brought = {(key, state): tensor for (key, state, _), tensor in tensors.items()}
    loaded = Loaded(brought, what.scalars, what.options, what.sources, state, what.named)
    watch.timed("apply", lambda: live.apply(loaded))
    proving = _Proving(prove, threads or reading_threads(), alone)
    proved = watch.timed("prove", lambda: _proved(catalog, live, what, tensors, proving))
    done = _report(catalog, reading, path, (nbytes, bytes_read), sharing is not None, watch, proved)
    return replace(done, changes=changes)


def _report(
    catalog: Catalog,
    reading: Reading,
    path: str,
    nbytes: tuple[int, int],
    read_once: bool,
    watch: Stopwatch,
    proved: Proof | None,
) -> LoadReport:
    """nbytes: how many bytes were restored, and how many this rank read."""
    return LoadReport(
        len({(w.tensor.name, w.tensor.state) for wants in reading.what.wants.values() for w in wants}),
        *nbytes,
        f"{catalog.format} {catalog.layout}",
        str(reading.target.layout),
        watch.with_wait(),
        reading.what,
        read_once,
        {"digest": reading.reader.digest_seconds},
        path,
        reading.reader.verified_bytes,
        reading.reader.unverified_bytes,
        proved,
    )


@dataclass(frozen=True)
class _Proving:
    """How a load is proved: arguments of `load`."""

    choice: bool | str
    threads: int
    alone: bool


def _proved(
    catalog: Catalog, target: Target, what: LoadPlan, brought: Mapping[Entry, torch.Tensor], how: _Proving
) -> Proof | None:
    with Files() as files, ranks.alone() if how.alone else nullcontext():
        reader = Reader(catalog, files)
        return proof.prove(
            catalog, target, what, reader, how.choice, brought=brought, threads=how.threads, alone=how.alone
        )


def _by_itself(work: Callable[[], T]) -> T:
    return work()


def _checked_plan(catalog: Catalog, target: Target | Callable[[], Target], wish: Wish) -> tuple[Target, LoadPlan]:
    made = target() if callable(target) else target
    what = plan(catalog, made, wish)
    if not wish.weights_only:
        made.check(catalog.training_state, what.sources)
    return made, what


def _sharing(reading: Reading, read_once: bool | str) -> exchange.Sharing | None:
    """What is read once; None if every rank reads for itself. Collective."""
    if not exchange.is_possible(read_once):
        return None
    sharing = exchange.find(reading.target, reading.what)
    if not sharing.all_groups:
        return None
    if read_once == exchange.ADAPTIVE:
        parts = exchange.shared_parts(reading.what, sharing)
        if not exchange.is_worthwhile(reading.what, sharing, parts, reading.sample):
            return None
    return sharing
