"""Put a checkpoint of any layout into a live training process, all of it or nothing.

Three steps, each agreed on by all ranks before the next: compare and plan (nothing is touched), read this rank's byte
ranges into host memory (nothing is touched that anyone has seen), apply. A rank that finds something wrong in the first
two makes all ranks refuse. Bytes that several ranks want may be read by one of them only (`ucp.loading.exchange`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
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
from ucp.transfer.gather import Reader

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class LoadReport:
    """What a load did, for people and logs.

    path: the checkpoint's. nbytes: of the tensors brought to this rank; bytes_read: what was read of the files for
    them, gaps between short runs and whole digest chunks included. seconds: by stage, on this rank: open (the first
    rank), plan, read, exchange (of what is read once, and measuring whether that is worth it), apply, prove, and wait,
    for the other ranks. overlapping: seconds within those: 'digest', checking what was read, of all reading threads
    together. read_once: whether ranks that want the same bytes read them once among them. verified_bytes: of what this
    rank read, how much was compared with the checkpoint's digests, or with CRC-32s of records that it read whole;
    unverified_bytes: how much was compared with nothing, since there is neither or the record was read in part. proof:
    that what is live now is what the checkpoint has; None where it has no digests.
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

    @property
    def left(self) -> tuple[str, ...]:
        """What stayed as it was, by the caller's leave or because the checkpoint records no hyperparameters for it."""
        return self.plan.left

    @property
    def unused(self) -> tuple[str, ...]:
        """What the checkpoint has besides, by the caller's leave."""
        return self.plan.unused

    def __str__(self) -> str:
        text = (
            f"restored {self.tensors} tensors ({_size(self.nbytes)} on this rank) from {self.source} to {self.target} "
            f"in {stages_text(self.seconds)}"
        )
        if self.unverified_bytes:
            text += f"; verified {_size(self.verified_bytes)}, not {_size(self.unverified_bytes)}"
        if self.left:
            text += f"; left as they were: {len(self.left)} ({', '.join(self.left[:4])}, …)"
        if self.unused:
            text += f"; not used: {len(self.unused)} ({', '.join(self.unused[:4])}, …)"
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
) -> LoadReport:
    """Restore the target from the catalog. Collective: all ranks call it with the same catalog and wish.

    target: what is to be filled, or what makes that without talking to other ranks; where making it fails on one rank,
    all refuse. path: of the checkpoint, for the report. verify: check the chunks read against the checkpoint's digests,
    where it has them, and records of torch files that this rank reads whole against their CRC-32s. read_once: have each
    byte that several ranks want read by one of them and exchanged; 'adaptive': where that is measured to be faster.
    watch: of a load that began earlier, with opening. alone: talk to no other rank; someone else makes the ranks agree
    (torch.distributed.checkpoint), and of tensors that others hold parts of nothing is proved. prove: compare what is
    live afterwards with the checkpoint's logical digests (`ucp.loading.proof.CHOICES`).

    Raises Mismatch (nothing was changed) when anything would stay unrestored or unused against the wish,
    DamagedCheckpoint when files do, BadArgument for another ``read_once`` or ``prove``, Unsupported where the process
    group cannot exchange what is to be read once; and, with everything in place, ProofFailed.
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
    return _report(catalog, reading, path, (nbytes, bytes_read), sharing is not None, watch, proved)


def _report(
    catalog: Catalog,
    reading: Reading,
    path: str,
    nbytes: tuple[int, int],
    read_once: bool,
    watch: Stopwatch,
    proved: Proof | None,
) -> LoadReport:
    """nbytes: of what was restored, and read by this rank."""
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
    """What is read once; None where every rank reads for itself. Collective."""
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


def _size(nbytes: int) -> str:
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
