"""What a load did, as it tells people and logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ucp.job.stopwatch import stages_text
from ucp.loading import refusals
from ucp.loading.nouns import LoadPlan
from ucp.loading.proof import Proof
from ucp.units import bytes_text, counted


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
        How many bytes were read from the files for them, with gaps between short runs and whole digest chunks, and
        without those that were read before, to be checked.
    source, target
        The checkpoint's format and layout, and the layout of this run.
    seconds
        Stage -> seconds on this rank: open (the checkpoint on the first rank), plan, check (what is read before
        anything is changed, and what ranks verify together), read, exchange (of what is read once, and measuring
        whether that is worth it), apply, prove, and wait (for the other ranks).
    plan
        What the load did in detail.
    read_once
        Whether ranks that want the same bytes read them once, and exchanged them.
    overlapping
        Seconds within those stages, summed over all threads. 'digest': checking what was read. 'memory': getting memory
        for states that there are not yet. 'ring': getting windows of pinned memory. 'fill': reading into those windows.
        'device': waiting until a window was copied to the device, or could be filled again. 'put' and 'round': putting
        in place, and rounding the masters into the model.
    path
        The checkpoint's.
    verified_bytes
        How many of the bytes that this rank read were compared with the checkpoint's digests, or with CRC-32s of
        records that the ranks together read whole.
    unverified_bytes
        How many were not compared, since there is neither of these, or the record was read only in part.
    proof
        The proof that what is live now is what the checkpoint has. None without one, as if there are no digests.
    changes
        What was changed on purpose since the checkpoint was saved, as it was declared, a line each.
    strategy
        In which order the load read, verified and changed what is live: one of `ucp.loading.strategy.STRATEGIES`.
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
    strategy: str = ""

    @property
    def left(self) -> tuple[str, ...]:
        """What stayed as it was, since the caller allowed it or the checkpoint has no hyperparameters for it."""
        return self.plan.left

    @property
    def unused(self) -> tuple[str, ...]:
        """What the checkpoint has and the load did not use, since the caller allowed it."""
        return self.plan.unused

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to warn of after the load."""
        if not (odd := () if self.proof is None else self.proof.rounded):
            return self.plan.notes
        return (
            *self.plan.notes,
            f"the proof has not seen {counted(len(odd), 'tensor')} ('{odd[0]}'{', …' if len(odd) > 1 else ''}): they "
            "are kept in fewer bits than in the checkpoint, and holding what was read of them would take more than a "
            "quarter of the load's memory; give it more ('memory') to have them proved",
        )

    def noted(self, *notes: str) -> LoadReport:
        """The same, with these to warn of as well."""
        return replace(self, plan=replace(self.plan, notes=(*self.plan.notes, *notes))) if notes else self

    def __str__(self) -> str:
        text = (
            f"restored {counted(self.tensors, 'tensor')} ({bytes_text(self.nbytes)} on this rank) from {self.source} "
            f"to {self.target} in {stages_text(self.seconds)}"
        )
        if self.strategy:
            text += f"; {self.strategy}"
        if self.unverified_bytes:
            text += f"; verified {bytes_text(self.verified_bytes)}, not {bytes_text(self.unverified_bytes)}"
        if self.left:
            text += f"; left as they were: {len(self.left)} ({refusals.listed(self.left)})"
        if self.unused:
            text += f"; not used: {len(self.unused)} ({refusals.listed(self.unused)})"
        if self.changes:
            text += f"; changed as declared: {'; '.join(self.changes)}"
        if self.proof is not None:
            text += f"; {self.proof}"
        return f"{text} ({self.path})" if self.path else text
