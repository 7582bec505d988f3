"""A proof of exactness after a load: what is live has the logical digests that the checkpoint has.

Every rank digests what it holds now (masters, states, weights, buffers, frozen weights), where it lies. The ranks add
their digests up; replicas are compared and not added. The sums are compared with the digests that were recorded when
the checkpoint was made. This finds any fault of the files, of reading, of the layouts' arithmetic or of putting values
in place, whatever else was checked. If the model computes with rounded copies of masters, these are compared with the
masters. Frozen weights and buffers that are kept rounded are compared with what was read for them.

In a device's memory everything is digested. In host memory this takes about as long as reading, so blocks of 64 KiB are
sampled: one of every 64 of each tensor, and at least one, drawn by the checkpoint's own seed. The text says what share
of the bytes that was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

import xxhash

from ucp.catalog import LogicalTensor
from ucp.errors import BadArgument, ProofFailed
from ucp.geometry import numel
from ucp.interpreter import no_collections
from ucp.job import ranks
from ucp.job.live_digest import LiveElements, digests
from ucp.job.live_sums import Key, Part, SumOverRanks, add_up, region_of
from ucp.loading.nouns import Entry, LoadPlan
from ucp.loading.target import Target, Weights
from ucp.logical.digest import Digest
from ucp.logical.record import drawn
from ucp.logical.runs import SAMPLE_BLOCK, Sample
from ucp.storage.dtypes import from_torch, itemsize
from ucp.transfer.digesting import digest_files
from ucp.transfer.exact import EXACT
from ucp.transfer.gather import Want
from ucp.transfer.reader import Reader
from ucp.units import bytes_text, counted

if TYPE_CHECKING:
    import torch

    from ucp.catalog import Catalog

ALWAYS, FULL = "always", "full"
CHOICES = (True, False, ALWAYS, FULL)
"""Of ``prove``: where digests are recorded; never; of a source without them from its files, too; and never a sample."""

SAMPLED_FROM = 32 << 20
"""Bytes in a rank's host memory from which on they are sampled: fewer take no time."""
SHOWN = 8
_ROUNDED = ", rounded"

WEIGHTS, MASTERS = "weights", "masters"
"""In the place of a state: weights that are rounded, and what they are rounded from."""


@dataclass(frozen=True)
class Proof:
    """What was proved. tensors, nbytes: the checkpoint's proved tensors and their bytes, on all ranks together, each
    counted once. weights: how many tensors of rounded weights are equal to their masters. sample: which blocks were
    compared; None for all. unproved: tensor -> why it was not proved.
    """

    of: str
    tensors: int
    nbytes: int
    weights: int
    sample: Sample | None
    unproved: Mapping[str, str] = field(default_factory=dict)
    seen: int = 0

    @property
    def complete(self) -> bool:
        """Whether everything that was loaded is proved."""
        return not self.unproved

    @property
    def rounded(self) -> tuple[str, ...]:
        """What was not proved since it is kept rounded, and what was read for it is no longer there."""
        return tuple(name for name, why in self.unproved.items() if why.endswith(_ROUNDED))

    def __str__(self) -> str:
        text = f"proved: {counted(self.tensors, 'tensor')}, {bytes_text(self.nbytes)} live equal to {self.of}'s"
        if self.weights:
            masters = "its master" if self.weights == 1 else "their masters"
            text += f", {counted(self.weights, 'weight')} of the model to {masters}"
        if self.sample is not None:
            rest = ", and each tensor's first" if self.sample.first else " of each tensor"
            text += (
                f" (a sample: one of {self.sample.every} blocks of {bytes_text(SAMPLE_BLOCK)}{rest}),"
                f" {100 * self.seen / max(self.nbytes, 1):.1f} % of the bytes"
            )
        if self.unproved:
            name, why = next(iter(self.unproved.items()))
            text += f"; not proved: {len(self.unproved)} ('{name}': {why})"
        return text


def check_choice(prove: bool | str) -> None:
    """Raise BadArgument for an unknown choice."""
    if not any(prove is known or (isinstance(prove, str) and prove == known) for known in CHOICES):
        raise BadArgument(f'prove is True, False, "{FULL}" or "{ALWAYS}"; found {prove!r}')


def is_wanted(catalog: Catalog, choice: bool | str) -> bool:
    """Whether `prove` has anything to do: there are digests, or the choice is to make them from the files."""
    return choice is not False and (choice == ALWAYS or any(t.digest is not None for t in catalog.tensors.values()))


@dataclass(frozen=True, eq=False, slots=True)
class _LiveCopy:
    """A tensor of the checkpoint in this rank's memory. turn: its number, if one tensor of the checkpoint fills
    several. rounded: what the program keeps, if that has fewer bits than what was read. ``live`` is what was read then.
    """

    tensor: LogicalTensor
    live: LiveElements
    turn: int
    rounded: torch.Tensor | None = None

    @property
    def key(self) -> Key:
        return self.tensor.name, self.tensor.state, str(self.turn)


@dataclass(frozen=True, eq=False)
class _Pair:
    """Weights and what they are rounded from. which: tells pairs of one name apart."""

    which: str
    weights: Weights

    @property
    def name(self) -> str:
        return self.weights.name


def sees_all(target: Target, entries: Mapping[Entry, Sequence[Want]]) -> bool:
    """Whether a proof will look at every element of these, as far as this rank knows before they are brought: they lie
    on devices, but for a few, and the checkpoint has digests of all."""
    on_host = on_device = 0
    for key, state, _ in entries:
        memory = target.memory(key, state)
        if memory is None:
            return False
        if memory.device.type != "cpu":
            on_device += memory.nbytes
            continue
        on_host += memory.nbytes
        if on_host >= SAMPLED_FROM:
            return False
    return on_device > 0 and all(want.tensor.digest is not None for wants in entries.values() for want in wants)


def prove(
    catalog: Catalog,
    target: Target,
    what: LoadPlan,
    reader: Reader,
    choice: bool | str,
    *,
    brought: Mapping[Entry, torch.Tensor] | None = None,
    threads: int = 1,
    alone: bool = False,
) -> Proof | None:
    """Compare what is live with the checkpoint. None if nothing is to be compared. Collective.

    choice: one of `CHOICES`. brought: what was read; weights that are kept rounded are compared with it. alone: this
    rank is in `ucp.job.ranks.alone`, and tensors of which it holds only a part are not proved.

    Raises ProofFailed on every rank, with the first tensors that differ, and what reading raises if files are read.
    """
    if not is_wanted(catalog, choice):
        return None
    with no_collections():
        return _prove(catalog, target, what, reader, choice, brought or {}, threads, alone)


def _prove(
    catalog: Catalog,
    target: Target,
    what: LoadPlan,
    reader: Reader,
    choice: bool | str,
    brought: Mapping[Entry, torch.Tensor],
    threads: int,
    alone: bool,
) -> Proof:
    unproved: dict[str, str] = {}
    held: list[_LiveCopy] = []
    pairs: list[_Pair] = []

    def found() -> bool:
        _find(held, pairs, target, what, choice == ALWAYS, brought, unproved)
        return choice != FULL and _is_much(held, pairs)

    sample = _sample(catalog) if any(ranks.every(found)) else None
    sums = _sums(held, pairs, sample, threads)
    if odd := {key for key in sums if key[1] == WEIGHTS and not _agree(sums, key)}:
        again = [pair for pair in pairs if (pair.name, WEIGHTS, pair.which) in odd]
        sums.update(_sums([], again, sample, threads, one_nan=True))
    wanted = _wanted(held, sums, catalog, reader, sample, threads)
    of = f"step {catalog.training_state.global_steps}"
    if catalog.training_state.global_steps is None:
        of = "the checkpoint"
    if alone:
        for name, state, _ in [key for key, found in sums.items() if not _is_whole(catalog, key, found)]:
            unproved[f"{name}:{state}"] = "other ranks hold the rest of it, and do not take part"
        sums = {key: found for key, found in sums.items() if _is_whole(catalog, key, found)}
    return _judged(sums, wanted, catalog, sample, of, unproved)


def _find(
    held: list[_LiveCopy],
    pairs: list[_Pair],
    target: Target,
    what: LoadPlan,
    always: bool,
    brought: Mapping[Entry, torch.Tensor],
    unproved: dict[str, str],
) -> None:
    """What was brought to this rank, and the pairs of rounded weights with what they are rounded from."""
    held += _held(target, what, always, brought, unproved)
    pairs += [_Pair(",".join(map(str, weights.group)), weights) for weights in target.weights()]
    for copy in held:
        if copy.rounded is not None:
            live, name = copy.live, copy.tensor.name
            weights = Weights(name, (), live.shape, live.tensor, live.blocks, copy.rounded, live.blocks)
            pairs.append(_Pair(f"copy {copy.turn}", weights))


def _held(
    target: Target, what: LoadPlan, always: bool, brought: Mapping[Entry, torch.Tensor], unproved: dict[str, str]
) -> Iterator[_LiveCopy]:
    """What was brought to this rank, where it lies now."""
    turns: dict[tuple[str, str], int] = {}
    for (key, state, dtype), wants in what.wants.items():
        memory = target.memory(key, state) if wants else None
        for want in wants:
            tensor = want.tensor
            named = tensor.name, tensor.state
            turn = turns[named] = turns.get(named, -1) + 1
            if memory is None:
                unproved[":".join(named)] = "its memory is not at hand"
            elif tensor.digest is None and not always:
                unproved[":".join(named)] = "the checkpoint has no digest of it"
            elif (own := from_torch(memory.dtype)) == tensor.dtype:
                yield _LiveCopy(tensor, LiveElements(memory, tensor.shape, want.blocks), turn)
            elif (tensor.dtype, own) in EXACT:
                yield _LiveCopy(tensor, LiveElements(memory, tensor.shape, want.blocks, tensor.dtype), turn)
            elif (read := brought.get((key, state, dtype))) is not None and dtype == tensor.dtype:
                yield _LiveCopy(tensor, LiveElements(read, tensor.shape, want.blocks), turn, rounded=memory)
            else:
                unproved[":".join(named)] = f"it is {tensor.dtype} in the checkpoint and kept as {own}{_ROUNDED}"


def _is_much(held: Sequence[_LiveCopy], pairs: Sequence[_Pair]) -> bool:
    """Whether this rank has so much in host memory that it is to be sampled."""
    here = 0
    for live in chain((h.live for h in held), (_ends(pair)[0] for pair in pairs)):
        here += live.nbytes if live.tensor.device.type == "cpu" else 0
        if here >= SAMPLED_FROM:
            return True
    return here >= SAMPLED_FROM


def _sample(catalog: Catalog) -> Sample:
    """What to compare where that is not everything: the sample that is recorded, if it is one."""
    # Most tensors share one object: few are compared by their values.
    recorded = {id(t.digest.sample): t.digest.sample for t in catalog.tensors.values() if t.digest is not None}
    if len(set(recorded.values())) == 1:
        return recorded.popitem()[1]
    return drawn(xxhash.xxh3_64_intdigest(repr(sorted(catalog.tensors)).encode("utf-8", "surrogatepass")))


def _ends(pair: _Pair) -> tuple[LiveElements, LiveElements]:
    """Weights as they are, and as their masters give them."""
    w = pair.weights
    masters = LiveElements(w.master, w.shape, w.master_blocks, from_torch(w.live.dtype), rounded=True)
    return LiveElements(w.live, w.shape, w.live_blocks), masters


def _sums(
    held: Sequence[_LiveCopy],
    pairs: Sequence[_Pair],
    sample: Sample | None,
    threads: int,
    *,
    one_nan: bool = False,
) -> dict[Key, SumOverRanks]:
    """What all ranks hold: of what was brought, and of weights twice, as they are and as their masters give them.
    one_nan: treat all NaNs of weights as equal. Collective, all at once: ranks wait for one another each time."""
    ends = [
        (key, replace(live, one_nan=one_nan))
        for pair in pairs
        for key, live in zip(
            ((pair.name, WEIGHTS, pair.which), (pair.name, MASTERS, pair.which)), _ends(pair), strict=True
        )
    ]
    turned = [k for k, h in enumerate(held) if h.live.dtype is not None]
    lives = [h.live for h in held]
    lives += [replace(held[k].live, dtype=None) for k in turned]
    lives += [replace(held[k].live, back=True) for k in turned]
    lives += [live for _, live in ends]
    found = ranks.all_or_none(lambda: digests(lives, sample=sample, threads=threads))
    exact = {k: found[len(held) + n] == found[len(held) + len(turned) + n] for n, k in enumerate(turned)}
    parts: dict[Key, list[Part]] = {}
    # By the blocks themselves, which tensors that are cut alike may share: elements, region.
    known: dict[int, tuple[int, int]] = {}
    of_held = ((h.key, h.live, found[k], not exact.get(k, True)) for k, h in enumerate(held))
    of_ends = zip(ends, found[len(held) + 2 * len(turned) :], strict=True)
    for key, live, digest, flawed in chain(of_held, ((*end, digest, False) for end, digest in of_ends)):
        blocks = live.blocks
        if len(blocks):
            if id(blocks) not in known:
                known[id(blocks)] = live.elements, region_of(blocks)
            parts.setdefault(key, []).append(Part(digest, *known[id(blocks)], flawed))
    return add_up(parts)


def _agree(sums: Mapping[Key, SumOverRanks], key: Key) -> bool:
    """Whether weights are equal to their masters, rounded. True if no rank has the masters."""
    name, _, which = key
    masters = sums.get((name, MASTERS, which))
    found = sums[key]
    return masters is None or (
        not found.differ and (found.digest, found.elements) == (masters.digest, masters.elements)
    )


def _wanted(
    held: Sequence[_LiveCopy],
    sums: Mapping[Key, SumOverRanks],
    catalog: Catalog,
    reader: Reader,
    sample: Sample | None,
    threads: int,
) -> dict[tuple[str, str], Digest]:
    """The checkpoint's digests of the tensors that are held. Those that are not recorded are computed from the files;
    then it is collective."""
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
        # The rank stands for the region, so that the ranks' shares are added and not taken for replicas.
        found = add_up({(t.name, t.state): [Part(digest, 0, rank)] for t, digest in zip(missing, mine, strict=True)})
        out.update({(t.name, t.state): found[t.name, t.state].digest for t in missing})
    return out


def _is_whole(catalog: Catalog, key: Key, found: SumOverRanks) -> bool:
    tensor = catalog.tensors.get((key[0], key[1]))
    return tensor is None or found.elements >= numel(tensor.shape)


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
    proved: dict[tuple[str, str], int] = {}
    weights = 0
    for key, found in sums.items():
        name, state, which = key
        if state == MASTERS and (name, WEIGHTS, which) in sums:
            continue
        if state == WEIGHTS and (name, MASTERS, which) in sums:
            if found.differ:
                wrong.append(f"'{name}' (weights): ranks hold different values of it")
            elif not _agree(sums, key):
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
            # Replicas that ranks cut differently, as under tensor parallelism. They can only be checked all together.
            if found.every != wanted[name, state] * (found.held // max(count, 1)):
                wrong.append(f"'{name}' ({state}): its values are not those that were saved, in one of its copies")
            else:
                proved[name, state] = count * itemsize(tensor.dtype)
        elif found.elements > count:
            unproved[f"{name}:{state}"] = "ranks hold parts of it that overlap"
        elif found.elements < count:
            wrong.append(f"'{name}' ({state}): {found.elements} of {count} elements are held by the ranks")
        elif found.digest != wanted[name, state]:
            wrong.append(f"'{name}' ({state}): its values are not those that were saved")
        else:
            proved[name, state] = count * itemsize(tensor.dtype)
    if wrong:
        raise ProofFailed(
            f"what was loaded is not what {of} has: {len(wrong)} of {len(sums)} tensors differ: "
            f"{'; '.join(wrong[:SHOWN])}{'; …' if wrong[SHOWN:] else ''}. The training state is not to be trained on; "
            "ucp verify looks for damage in the files"
        )
    told, _ = ranks.distinct(sorted(unproved.items()))
    why = dict(pair for pairs in told for pair in pairs)
    seen = sum(proved.values() if sample is None else map(sample.seen, proved.values()))
    return Proof(of, len(proved), sum(proved.values()), weights, sample, why, seen)
