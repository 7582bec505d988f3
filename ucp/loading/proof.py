"""A proof of exactness after a load: what is live has the logical digests that the checkpoint has.

Every rank digests what it holds now (masters, states, weights, buffers, frozen weights), where it is; the ranks add up,
replicas compared instead of added; and the sums are compared with the digests that were recorded when the checkpoint
was made. So a fault of the files, of reading, of the layouts' arithmetic or of putting things in place is found,
whatever else was checked. Where masters have rounded copies, which the model computes with, these are compared with the
masters.

In a device's memory all is digested. In host memory, where that takes about as long as reading, blocks of 64 KiB are
sampled: the first of each tensor, and one of every 32, drawn by the checkpoint's own seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import xxhash

from ucp.catalog import LogicalTensor
from ucp.errors import BadArgument, ProofFailed
from ucp.geometry import numel
from ucp.job import ranks
from ucp.job.live_digest import LiveElements, digests
from ucp.job.live_sums import Key, Part, SumOverRanks, add_up, region_of
from ucp.loading.match import LoadPlan
from ucp.loading.target import Target, Weights
from ucp.logical.digest import Digest
from ucp.logical.record import EVERY
from ucp.logical.runs import SAMPLE_BLOCK, Sample
from ucp.storage.dtypes import from_torch
from ucp.transfer.digesting import digest_files
from ucp.transfer.exact import EXACT
from ucp.transfer.gather import Reader

if TYPE_CHECKING:
    from ucp.catalog import Catalog

ALWAYS, FULL = "always", "full"
CHOICES = (True, False, ALWAYS, FULL)
"""Of ``prove``: where digests are recorded; never; of a source without them from its files, too; and never a sample."""

SAMPLED_FROM = 32 << 20
"""Bytes in a rank's host memory from which on they are sampled: fewer take no time."""
SHOWN = 8


@dataclass(frozen=True)
class Proof:
    """What was proved. tensors, nbytes: of the checkpoint's, on all ranks together, each once; weights: tensors of
    rounded weights equal to their masters. sample: of which blocks, None for all. unproved: tensors -> why not.
    """

    of: str
    tensors: int
    nbytes: int
    weights: int
    sample: Sample | None
    unproved: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether everything that was loaded is proved."""
        return not self.unproved

    def __str__(self) -> str:
        scale, unit = next((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1, "B")) if self.nbytes >= s or s == 1)
        size = f"{self.nbytes / scale:.{0 if unit == 'B' else 1}f} {unit}"
        text = f"proved: {self.tensors} tensors, {size} live equal to {self.of}'s"
        if self.weights:
            text += f", {self.weights} rounded weights to their masters"
        if self.sample is not None:
            text += (
                f" (a sample: one of {self.sample.every} blocks of {SAMPLE_BLOCK >> 10} KiB, and each tensor's first)"
            )
        if self.unproved:
            name, why = next(iter(self.unproved.items()))
            text += f"; not proved: {len(self.unproved)} ('{name}': {why})"
        return text


def check_choice(prove: bool | str) -> None:
    """Raise BadArgument for what is no choice."""
    if not any(prove is known or (isinstance(prove, str) and prove == known) for known in CHOICES):
        raise BadArgument(f'prove is True, False, "{FULL}" or "{ALWAYS}"; found {prove!r}')


@dataclass(frozen=True, eq=False)
class _LiveCopy:
    """A tensor of the checkpoint in this rank's memory. turn: of several that one tensor of the checkpoint fills."""

    tensor: LogicalTensor
    live: LiveElements
    turn: int

    @property
    def key(self) -> Key:
        return self.tensor.name, self.tensor.state, str(self.turn)


def prove(
    catalog: Catalog, target: Target, what: LoadPlan, reader: Reader, choice: bool | str, *, threads: int = 1
) -> Proof | None:
    """Compare what is live with the checkpoint; None where nothing is to be compared. Collective.

    choice: one of `CHOICES`. Raises ProofFailed on every rank, with the first tensors that differ, and what reading
    raises where files are read.
    """
    if choice is False or (choice != ALWAYS and all(t.digest is None for t in catalog.tensors.values())):
        return None
    unproved: dict[str, str] = {}
    held, weights = ranks.all_or_none(
        lambda: (list(_held(target, what, choice == ALWAYS, unproved)), list(target.weights()))
    )
    sample = _sample(catalog, held, weights, choice)
    sums = _live_sums(held, weights, sample, threads)
    wanted = _wanted(held, sums, catalog, reader, sample, threads)
    of = f"step {catalog.training_state.global_steps}"
    if catalog.training_state.global_steps is None:
        of = "the checkpoint"
    return _judged(sums, wanted, catalog, sample, of, unproved)


def _held(target: Target, what: LoadPlan, always: bool, unproved: dict[str, str]) -> Iterator[_LiveCopy]:
    """What was brought to this rank, where it is now."""
    turns: dict[tuple[str, str], int] = {}
    for (key, state, _), wants in what.wants.items():
        memory = target.memory(key, state) if wants else None
        for want in wants:
            tensor = want.tensor
            name = f"{tensor.name}:{tensor.state}"
            turn = turns[tensor.name, tensor.state] = turns.get((tensor.name, tensor.state), -1) + 1
            if memory is None:
                unproved[name] = "its memory is not at hand"
            elif tensor.digest is None and not always:
                unproved[name] = "the checkpoint has no digest of it"
            elif (own := from_torch(memory.dtype)) != tensor.dtype and (tensor.dtype, own) not in EXACT:
                unproved[name] = f"it is {tensor.dtype} in the checkpoint and kept as {own}, rounded"
            else:
                as_saved = None if own == tensor.dtype else tensor.dtype
                yield _LiveCopy(tensor, LiveElements(memory, tensor.shape, want.blocks, as_saved), turn)


def _sample(
    catalog: Catalog, held: Sequence[_LiveCopy], weights: Sequence[Weights], choice: bool | str
) -> Sample | None:
    """What is looked at: all, or where any rank has much in host memory a sample. Collective."""
    here = sum(h.live.nbytes for h in held if h.live.tensor.device.type == "cpu")
    here += sum(w.live.nbytes for w in weights if w.live.device.type == "cpu")
    much = choice != FULL and here >= SAMPLED_FROM
    said, _ = ranks.distinct(much)
    if not any(said):
        return None
    recorded = {t.digest.sample for t in catalog.tensors.values() if t.digest is not None}
    if len(recorded) == 1:
        return recorded.pop()
    return Sample(xxhash.xxh3_64_intdigest(repr(sorted(catalog.tensors)).encode("utf-8", "surrogatepass")), EVERY)


def _live_sums(
    held: Sequence[_LiveCopy], weights: Sequence[Weights], sample: Sample | None, threads: int
) -> dict[Key, SumOverRanks]:
    """What all ranks hold, by tensor: of weights twice, as they are and as their masters say."""
    lives = [h.live for h in held]
    turned = [k for k, live in enumerate(lives) if live.dtype is not None]
    lives += [replace(lives[k], dtype=None) for k in turned]
    lives += [replace(lives[k], back=True) for k in turned]
    first = len(lives)
    lives += [LiveElements(w.live, w.shape, w.live_blocks) for w in weights]
    lives += [LiveElements(w.master, w.shape, w.master_blocks, from_torch(w.live.dtype), rounded=True) for w in weights]
    found = ranks.all_or_none(lambda: digests(lives, sample=sample, threads=threads))
    exact = {k: found[len(held) + n] == found[len(held) + len(turned) + n] for n, k in enumerate(turned)}
    parts: dict[Key, list[Part]] = {}

    def add(key: Key, number: int, flawed: bool = False) -> None:
        blocks = lives[number].blocks
        if len(blocks):
            part = Part(found[number], int(blocks.counts.sum()), region_of(blocks), flawed)
            parts.setdefault(key, []).append(part)

    for k, h in enumerate(held):
        add(h.key, k, flawed=not exact.get(k, True))
    for n, w in enumerate(weights):
        group = ",".join(map(str, w.group))
        add((w.name, "weights", group), first + n)
        add((w.name, "masters", group), first + len(weights) + n)
    return add_up(parts)


def _wanted(
    held: Sequence[_LiveCopy],
    sums: Mapping[Key, SumOverRanks],
    catalog: Catalog,
    reader: Reader,
    sample: Sample | None,
    threads: int,
) -> dict[tuple[str, str], Digest]:
    """The digests of the checkpoint's tensors that are held; those that are not recorded, from the files. Collective
    where there are such."""
    names = {(key[0], key[1]) for key in sums} & catalog.tensors.keys()
    out: dict[tuple[str, str], Digest] = {}
    missing: list[LogicalTensor] = []
    for key in sorted(names):
        tensor = catalog.tensors[key]
        recorded = tensor.digest
        if recorded is not None and sample is None:
            out[key] = recorded.whole
        elif recorded is not None and recorded.sample == sample:
            out[key] = recorded.sampled
        else:
            missing.append(tensor)
    if missing:
        rank, world = ranks.rank(), ranks.world_size()
        mine = ranks.all_or_none(
            lambda: digest_files(reader, missing, sample=sample, share=rank, shares=world, threads=threads)
        )
        # Each rank's are of another part, so that no two are taken for replicas of each other.
        found = add_up({(t.name, t.state): [Part(digest, 0, rank)] for t, digest in zip(missing, mine, strict=True)})
        out.update({(t.name, t.state): found[t.name, t.state].digest for t in missing})
    return out


def _judged(
    sums: Mapping[Key, SumOverRanks],
    wanted: Mapping[tuple[str, str], Digest],
    catalog: Catalog,
    sample: Sample | None,
    of: str,
    unproved: dict[str, str],
) -> Proof:
    """The proof. Raises ProofFailed."""
    wrong: list[str] = []
    proved: set[tuple[str, str]] = set()
    weights = 0
    for (name, state, which), found in sums.items():
        if state == "masters" and (name, "weights", which) in sums:
            continue
        if state == "weights" and (name, "masters", which) in sums:
            masters = sums[name, "masters", which]
            if found.differ:
                wrong.append(f"'{name}' (weights): ranks hold different values of it")
            elif (found.digest, found.elements) != (masters.digest, masters.elements):
                wrong.append(f"'{name}' (weights): they are not its masters, rounded")
            else:
                weights += 1
            continue
        tensor = catalog.tensors[name, state]
        count = numel(tensor.shape)
        if found.differ:
            wrong.append(f"'{name}' ({state}): ranks hold different values of it")
        elif found.flawed:
            wrong.append(f"'{name}' ({state}): it has values that {tensor.dtype}, as it was saved, does not hold")
        elif found.elements > count and found.held % max(count, 1) == 0:
            # Replicas that ranks cut differently, as under tensor parallelism: all of them together.
            if found.every != wanted[name, state] * (found.held // max(count, 1)):
                wrong.append(f"'{name}' ({state}): its values are not those that were saved, in one of its copies")
            else:
                proved.add((name, state))
        elif found.elements > count:
            unproved[f"{name}:{state}"] = "ranks hold parts of it that overlap"
        elif found.elements < count:
            wrong.append(f"'{name}' ({state}): {found.elements} of {count} elements are held by the ranks")
        elif found.digest != wanted[name, state]:
            wrong.append(f"'{name}' ({state}): its values are not those that were saved")
        else:
            proved.add((name, state))
    if wrong:
        raise ProofFailed(
            f"what was loaded is not what {of} has: {len(wrong)} of {len(sums)} tensors differ: "
            f"{'; '.join(wrong[:SHOWN])}{'; …' if wrong[SHOWN:] else ''}. The training state is not to be trained on; "
            "ucp verify looks for damage in the files"
        )
    told, _ = ranks.distinct(sorted(unproved.items()))
    nbytes = sum(catalog.tensors[key].nbytes for key in proved)
    return Proof(of, len(proved), nbytes, weights, sample, dict(pair for pairs in told for pair in pairs))
