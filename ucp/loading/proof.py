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

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from ucp.catalog import LogicalTensor
from ucp.columns import firsts, numbered
from ucp.errors import BadArgument, ProofFailed
from ucp.geometry import numel
from ucp.interpreter import no_collections
from ucp.job import ranks
from ucp.job.live_digest import LiveElements, digest_lanes
from ucp.job.live_sums import Key, RankParts, Sums, add_up
from ucp.loading.held import ROUNDED, HeldTensors, find_held
from ucp.loading.nouns import Entry, LoadPlan
from ucp.loading.target import Target, Weights
from ucp.logical.batch import lanes_of
from ucp.logical.digest import Digest
from ucp.logical.record import drawn
from ucp.logical.runs import SAMPLE_BLOCK, Sample
from ucp.storage.dtypes import from_torch, itemsize
from ucp.transfer.digesting import digest_files
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
        return tuple(name for name, why in self.unproved.items() if why.endswith(ROUNDED))

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
        if not memory.is_cpu:
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
    held = HeldTensors()
    pairs: list[_Pair] = []

    def found() -> bool:
        find_held(held, target, what, choice == ALWAYS, brought, unproved)
        pairs.extend(_pairs_of(held, target))
        return choice != FULL and _is_much(held, pairs)

    sample = _sample(catalog) if any(ranks.every(found)) else None
    sums = _sums(held, pairs, sample, threads)
    if odd := {key for key in sums if key[1] == WEIGHTS and not _agree(sums, key)}:
        again = [pair for pair in pairs if (pair.name, WEIGHTS, pair.which) in odd]
        sums = sums.updated(_sums(HeldTensors(), again, sample, threads, one_nan=True))
    wanted = _wanted(sums, catalog, reader, sample, threads)
    of = f"step {catalog.training_state.global_steps}"
    if catalog.training_state.global_steps is None:
        of = "the checkpoint"
    if alone:
        parts = [
            key
            for key, elements in zip(sums, sums.elements.tolist(), strict=True)
            if not _is_whole(catalog, key, elements)
        ]
        for name, state, _ in parts:
            unproved[f"{name}:{state}"] = "other ranks hold the rest of it, and do not take part"
        sums = sums.without(set(parts))
    return _judged(sums, wanted, catalog, sample, of, unproved)


def _pairs_of(held: HeldTensors, target: Target) -> Iterator[_Pair]:
    """Pairs of rounded weights with what they are rounded from."""
    for weights in target.weights():
        yield _Pair(",".join(map(str, weights.group)), weights)
    for k, rounded in held.rounded.items():
        live, name = held.lives[k], held.tensors[k].name
        weights = Weights(name, (), live.shape, live.tensor, live.blocks, rounded, live.blocks)
        yield _Pair(f"copy {held.turns[k]}", weights)


def _is_much(held: HeldTensors, pairs: Sequence[_Pair]) -> bool:
    """Whether this rank has so much in host memory that it is to be sampled."""
    lives = [live for live in chain(held.lives, (_ends(pair)[0] for pair in pairs)) if live.tensor.is_cpu]
    alike = numbered([(id(live.blocks), live.tensor.dtype, live.dtype) for live in lives])
    return (
        sum(lives[k].nbytes * times for k, times in zip(firsts(alike), np.bincount(alike).tolist(), strict=True))
        >= SAMPLED_FROM
    )


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
    held: HeldTensors,
    pairs: Sequence[_Pair],
    sample: Sample | None,
    threads: int,
    *,
    one_nan: bool = False,
) -> Sums:
    """What all ranks hold: of what was brought, and of weights twice, as they are and as their masters give them.
    one_nan: treat all NaNs of weights as equal. Collective, all at once: ranks wait for one another each time."""
    ends = [
        (key, live._replace(one_nan=one_nan))
        for pair in pairs
        for key, live in zip(
            ((pair.name, WEIGHTS, pair.which), (pair.name, MASTERS, pair.which)), _ends(pair), strict=True
        )
    ]
    turned = [k for k, live in enumerate(held.lives) if live.dtype is not None]
    lives = [*held.lives, *(live for _, live in ends)]
    lives += [held.lives[k]._replace(dtype=None) for k in turned]
    lives += [held.lives[k]._replace(back=True) for k in turned]
    found = ranks.all_or_none(lambda: digest_lanes(lives, sample=sample, threads=threads))
    count = len(held.lives) + len(ends)
    here, back = found[count : count + len(turned)], found[count + len(turned) :]
    flawed = np.array(turned, np.int64)[(here != back).any(axis=1)].tolist()
    keys = [*held.keys, *(key for key, _ in ends)]
    return add_up(RankParts.of(keys, found[:count], [live.blocks for live in lives[:count]], flawed))


def _agree(sums: Sums, key: Key) -> bool:
    """Whether weights are equal to their masters, rounded. True if no rank has the masters."""
    name, _, which = key
    masters = sums.get((name, MASTERS, which))
    found = sums[key]
    return masters is None or (
        not found.differ and (found.digest, found.elements) == (masters.digest, masters.elements)
    )


def _wanted(
    sums: Sums,
    catalog: Catalog,
    reader: Reader,
    sample: Sample | None,
    threads: int,
) -> dict[tuple[str, str], Digest]:
    """The checkpoint's digests of the tensors that are held. Those that are not recorded are computed from the files;
    then it is collective."""
    out: dict[tuple[str, str], Digest] = {}
    missing: dict[tuple[str, str], LogicalTensor] = {}
    names = list(_names_of(sums))
    for key, tensor in zip(names, map(catalog.tensors.get, names), strict=True):
        if tensor is None:
            continue
        recorded = tensor.digest
        if recorded is not None and sample is None:
            out[key] = recorded.whole
        elif recorded is not None and (recorded.sample is sample or recorded.sample == sample):
            out[key] = recorded.sampled
        else:
            missing[key] = tensor
    if missing:
        rank, world, tensors = ranks.rank(), ranks.world_size(), list(missing.values())
        mine = ranks.all_or_none(
            lambda: digest_files(reader, tensors, sample=sample, share=rank, shares=world, threads=threads)
        )
        # The rank stands for the region, so that the ranks' shares are added and not taken for replicas.
        found = add_up(RankParts.of_region([*missing], mine, rank))
        out.update({key: found[key].digest for key in missing})
    return out


_names_of = partial(map, itemgetter(0, 1))
"""Of keys their names and states."""


def _is_whole(catalog: Catalog, key: Key, elements: int) -> bool:
    tensor = catalog.tensors.get((key[0], key[1]))
    return tensor is None or elements >= numel(tensor.shape)


def _as_saved(
    sums: Sums, wanted: Mapping[tuple[str, str], Digest], catalog: Catalog
) -> tuple[dict[tuple[str, str], int], list[Key]]:
    """The tensors that are whole and as they were saved, with their bytes, and the keys of all else."""
    names = list(_names_of(sums))
    tensors = [None if state in (WEIGHTS, MASTERS) else catalog.tensors.get((name, state)) for name, state in names]
    sizes = {shape: numel(shape) for shape in {t.shape for t in tensors if t is not None}}
    counts = [-1 if t is None else sizes[t.shape] for t in tensors]
    nothing = Digest()
    digests = lanes_of(list(map(wanted.get, names, repeat(nothing))))
    fine = (sums.elements == counts) & (sums.digests == digests).all(axis=1) & ~sums.differ & ~sums.flawed
    proved = {
        name: count * itemsize(t.dtype)
        for name, t, count, is_fine in zip(names, tensors, counts, fine.tolist(), strict=True)
        if t is not None and is_fine
    }
    return proved, [key for key, is_fine in zip(sums, fine.tolist(), strict=True) if not is_fine]


def _judged(
    sums: Sums,
    wanted: Mapping[tuple[str, str], Digest],
    catalog: Catalog,
    sample: Sample | None,
    of: str,
    unproved: dict[str, str],
) -> Proof:
    """The proof. Raises ProofFailed."""
    wrong: list[str] = []
    weights = 0
    proved, rest = _as_saved(sums, wanted, catalog)
    for key in rest:
        found, (name, state, which) = sums[key], key
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
    sizes = Counter(proved.values())
    seen = sum(nbytes * times for nbytes, times in sizes.items())
    if sample is not None:
        seen = sum(sample.seen(nbytes) * times for nbytes, times in sizes.items())
    return Proof(of, len(proved), sum(proved.values()), weights, sample, why, seen)
