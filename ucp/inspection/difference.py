"""How two checkpoints differ: names, shapes, element types, values, training state. Formats and layouts may differ."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from ucp import limits
from ucp.catalog import LogicalTensor, ParamGroup, TrainingState
from ucp.checkpoint import Checkpoint
from ucp.errors import BadArgument
from ucp.geometry import numel
from ucp.inspection import stream
from ucp.inspection.digests import digests as digests_of_some
from ucp.inspection.values import Distance
from ucp.printable import short
from ucp.storage import graphs

if TYPE_CHECKING:
    import torch

SCHEMA = "ucp.diff/1"

Progress = Callable[[int, int], None]

# These belong to the run's layout or its files, not to its state. They differ between checkpoints that are the same.
_OF_THE_LAYOUT = ("dp_world_size", "global_batch_size", "config", "extra.ranks")
# Only the files of some optimizers record these, and the config sets them anyway.
_NOT_ALWAYS_RECORDED = ("clip_grad",)


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that both have with the same shape, and whose values (or element types) differ.

    different: how many elements have other bits (other values, if the element types differ). beyond: how many are
    outside the tolerance. first: index of the first different one. absolute, relative: the largest differences of
    finite values; relative ones to the larger of the two. unlike: how many elements are finite on one side only.
    """

    name: str
    state: str
    dtypes: tuple[str, str]
    elements: int
    different: int
    beyond: int
    first: tuple[int, ...] | None
    absolute: float
    relative: float
    unlike: int

    @property
    def types_differ(self) -> bool:
        return self.dtypes[0] != self.dtypes[1]


@dataclass(frozen=True)
class Difference:
    """How two checkpoints differ.

    - a, b: the paths. only_a, only_b: ``name:state``, or ``name`` if the other has nothing of the parameter.
    - shapes: name -> both shapes. tensors: those that differ.
    - scalars, training_state: what differs -> both values, as text.
    - compared, bytes: how many tensors were compared, and their bytes on one side. equal: how many are the same bit
      for bit.
    - types_count: whether another element type is a difference.
    - by_digest: ``name:state`` -> both logical digests, if these were compared instead of the values.
    - read: bytes read on both sides for the values, or for digests that were not recorded.
    """

    a: str
    b: str
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    tensors: tuple[TensorDifference, ...]
    scalars: Mapping[str, tuple[str, str]]
    training_state: Mapping[str, tuple[str, str]]
    compared: int
    bytes: int
    equal: int
    types_count: bool = True
    by_digest: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    read: int = 0

    @property
    def same(self) -> bool:
        """Whether there is no difference that counts."""
        found = self.only_a or self.only_b or self.shapes or self.scalars or self.training_state
        if found or any(ours != theirs for ours, theirs in self.by_digest.values()):
            return False
        return not any(t.beyond or (self.types_count and t.types_differ) for t in self.tensors)

    def as_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "same": self.same, **asdict(self)}


def diff(
    a: Checkpoint,
    b: Checkpoint,
    *,
    params: Sequence[str] = (),
    states: Sequence[str] = (),
    absolute: float = 0.0,
    relative: float = 0.0,
    types: bool = True,
    training_state: bool = True,
    values: bool = True,
    quick: bool = False,
    progress: Progress | None = None,
) -> Difference:
    """Compare two open checkpoints and return the `Difference`. Tied parameters are found under any of their names.

    Parameters
    ----------
    a, b
        The open checkpoints.
    params, states
        Globs of the parameters and names of the states that count; all without.
    absolute, relative
        Elements count as equal within ``absolute + relative * max(|a|, |b|)``. Without, bits count (values, where the
        element types differ).
    types, training_state
        Another element type is a difference; compare the training state.
    values, progress
        Read the tensors, in pieces of a few megabytes, and call progress with (bytes done, bytes in all).
    quick
        Compare logical digests instead where the element types are the same, and read only what has none recorded.

    Raises
    ------
    BadArgument
        For a glob or a state that neither checkpoint has; and what reading raises.
    """
    counts = _counting(params)
    _check_filters(a, b, params, states)
    left, right, only_a, only_b = _paired(a, b, counts, states)
    both = list(zip(left, right, strict=True))
    shapes = {f"{x.name}:{x.state}": (x.shape, y.shape) for x, y in both if x.shape != y.shape}
    pairs = [(x, y) for x, y in both if x.shape == y.shape] if values else []
    tensors, digests, read = _contents(a, b, pairs, (absolute, relative), quick, progress)
    return Difference(
        a=str(a.path),
        b=str(b.path),
        only_a=only_a,
        only_b=only_b,
        shapes=shapes,
        tensors=tensors,
        scalars=_scalars(a, b, counts) if not states else {},
        training_state=_states(a, b) if training_state else {},
        compared=len(pairs),
        bytes=stream.total(ours for ours, _ in pairs),
        equal=len(pairs) - len(tensors) - sum(x != y for x, y in digests.values()),
        types_count=types,
        by_digest=digests,
        read=read,
    )


def _counting(params: Sequence[str]) -> Callable[[str], bool]:
    """Whether a parameter's name counts, by the globs."""
    return lambda name: not params or any(fnmatchcase(name, pattern) for pattern in params)


def _contents(
    a: Checkpoint,
    b: Checkpoint,
    pairs: Sequence[tuple[LogicalTensor, LogicalTensor]],
    within: tuple[float, float],
    quick: bool,
    progress: Progress | None,
) -> tuple[tuple[TensorDifference, ...], dict[str, tuple[str, str]], int]:
    """Tensors whose values differ, digests of those that were compared by them, and the bytes read for both."""
    alike = [pair for pair in pairs if quick and pair[0].dtype == pair[1].dtype]
    others = [pair for pair in pairs if not quick or pair[0].dtype != pair[1].dtype]
    digests = _digests(a, b, alike, progress)
    tensors = tuple(_values(a, b, others, within, progress))
    read = stream.total(t for pair in others for t in pair)
    read += stream.total(t for pair in alike for t in pair if t.digest is None)
    return tensors, digests, read


def _states(a: Checkpoint, b: Checkpoint) -> dict[str, tuple[str, str]]:
    """What differs between the training states."""
    ours, theirs = a.training_state, b.training_state
    state = _changed(_flat_state(ours), _flat_state(theirs))
    state.update(_groups(ours.param_groups, theirs.param_groups, lambda name: _name_in(a, b, name)))
    return state


def _check_filters(a: Checkpoint, b: Checkpoint, params: Sequence[str], states: Sequence[str]) -> None:
    """Raise BadArgument if nothing would be compared because of a mistyped name."""
    names = [name for checkpoint in (a, b) for name in checkpoint.parameters]
    for pattern in params:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BadArgument(f"no parameter of either checkpoint matches '{pattern}'; there are {_listed(names)}")
    known = {state for checkpoint in (a, b) for _, state in checkpoint.catalog.tensors}
    for state in states:
        if state not in known:
            raise BadArgument(f"neither checkpoint has a state '{state}'; there are {_listed(sorted(known))}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[: limits.DIFFERENCE_NAMES_COUNT]) + (
        ", …" if len(names) > limits.DIFFERENCE_NAMES_COUNT else ""
    )


def _paired(
    a: Checkpoint, b: Checkpoint, counts: Callable[[str], bool], states: Sequence[str]
) -> tuple[list[LogicalTensor], list[LogicalTensor], tuple[str, ...], tuple[str, ...]]:
    """The tensors that both have, in a's order, and what only one has."""
    left, right = [], []
    only_a, met = [], set()
    for info in a.parameters.values():
        if not counts(info.name):
            continue
        other = _counterpart(b, (info.name, *info.aliases))
        if other is None:
            only_a.append(info.name)
            continue
        met.add(other)
        for state in info.states:
            if states and state not in states:
                continue
            theirs = b.catalog.tensors.get((other, state))
            if theirs is None:
                only_a.append(f"{info.name}:{state}")
                continue
            left.append(a.catalog.tensors[info.name, state])
            right.append(theirs)
    only_b = [name for name in b.parameters if counts(name) and name not in met]
    held = {(t.name, t.state) for t in right}
    for name in met:
        only_b += [
            f"{name}:{s}" for s in b.parameters[name].states if (name, s) not in held and (not states or s in states)
        ]
    return left, right, tuple(only_a), tuple(only_b)


def _counterpart(checkpoint: Checkpoint, names: Sequence[str]) -> str | None:
    for name in names:
        try:
            return checkpoint.catalog.resolve(name)
        except KeyError:
            continue
    return None


def _values(
    a: Checkpoint,
    b: Checkpoint,
    pairs: Sequence[tuple[LogicalTensor, LogicalTensor]],
    tolerance: tuple[float, float],
    progress: Progress | None,
) -> Iterator[TensorDifference]:
    left, right = [ours for ours, _ in pairs], [theirs for _, theirs in pairs]
    distances = [Distance() for _ in pairs]
    total, done = stream.total(left), 0
    for batch in stream.batches(left):
        raw_a, raw_b = stream.read(a.reader, left, batch), stream.read(b.reader, right, batch)
        for piece, x, y in zip(batch, raw_a, raw_b, strict=True):
            types = left[piece.index].dtype, right[piece.index].dtype
            distances[piece.index].add(piece.first, x, y, types, tolerance)
            done += len(x)
        if progress is not None:
            progress(done, total)
    for (ours, theirs), found in zip(pairs, distances, strict=True):
        if found.first is not None or ours.dtype != theirs.dtype:
            first = None if found.first is None or not ours.shape else np.unravel_index(found.first, ours.shape)
            yield TensorDifference(
                name=ours.name,
                state=ours.state,
                dtypes=(ours.dtype, theirs.dtype),
                elements=numel(ours.shape),
                different=found.different,
                beyond=found.beyond,
                first=None if first is None else tuple(int(i) for i in first),
                absolute=found.absolute,
                relative=found.relative,
                unlike=found.unlike,
            )


def _digests(
    a: Checkpoint, b: Checkpoint, pairs: Sequence[tuple[LogicalTensor, LogicalTensor]], progress: Progress | None
) -> dict[str, tuple[str, str]]:
    """``name:state`` -> both digests, of tensors of one shape and element type."""
    ours = digests_of_some(a, [x for x, _ in pairs], progress=progress)
    theirs = digests_of_some(b, [y for _, y in pairs], progress=progress)
    return {f"{x.name}:{x.state}": (str(x.digest), str(y.digest)) for x, y in zip(ours, theirs, strict=True)}


def _scalars(a: Checkpoint, b: Checkpoint, counts: Callable[[str], bool]) -> dict[str, tuple[str, str]]:
    out: dict[str, tuple[str, str]] = {}
    for info in a.parameters.values():
        other = _counterpart(b, (info.name, *info.aliases)) if counts(info.name) else None
        if other is not None:
            found = _changed(_flat(info.scalars), _flat(b.parameters[other].scalars))
            out.update({f"{info.name}:{key}": values for key, values in found.items()})
    return out


# --- training state --------------------------------------------------------------------------------------------------


def _flat_state(state: TrainingState) -> dict[str, Any]:
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    del fields["param_groups"]
    flat = _flat(fields)
    return {
        path: value
        for path, value in flat.items()
        if not any(path == own or path.startswith(f"{own}.") or path.startswith(f"{own}[") for own in _OF_THE_LAYOUT)
    }


def _groups(
    ours: Sequence[ParamGroup], theirs: Sequence[ParamGroup], named: Callable[[str], str]
) -> dict[str, tuple[str, str]]:
    """What differs between param groups of the same parameters, in any order: one line for their names, and one for
    each hyperparameter. The numbers are a's. A group without a counterpart has its own number. named: b's name of a
    parameter -> a's."""
    left = [dict.fromkeys(group.names) for group in ours]
    right = [dict.fromkeys(map(named, group.names)) for group in theirs]
    pairs = _matched(left, right)
    out: dict[str, tuple[str, str]] = {}
    for i, j in sorted(pairs.items()):
        label = f"param_groups[{i}]"
        if left[i].keys() != right[j].keys():
            out[f"{label}.names"] = (_only(left[i], right[j]), _only(right[j], left[i]))
        options = ours[i].options, theirs[j].options
        if None in options and options != (None, None):
            texts = ["not recorded" if o is None else f"{len(o)} recorded" for o in options]
            out[f"{label}.options"] = (texts[0], texts[1])
        else:
            out.update(_changed(*(_flat(o, f"{label}.options") for o in options)))
    alone = {i: _only(left[i], {}) for i in range(len(left)) if i not in pairs}
    others = {j: _only(right[j], {}) for j in range(len(right)) if j not in pairs.values()}
    for k in sorted({*alone, *others}):
        out[f"param_groups[{k}]"] = (alone.get(k, "none"), others.get(k, "none"))
    return out


def _name_in(a: Checkpoint, b: Checkpoint, name: str) -> str:
    """What a calls b's parameter, or b's name if a has no such parameter."""
    info = b.parameters.get(name)
    return _counterpart(a, (name, *(info.aliases if info else ()))) or name


def _matched(left: Sequence[Mapping[str, None]], right: Sequence[Mapping[str, None]]) -> dict[int, int]:
    """Group on the left -> the group on the right with the most parameters in common. Each is used once."""
    owner = {name: j for j, names in enumerate(right) for name in names}
    shared: Counter[tuple[int, int]] = Counter(
        (i, owner[name]) for i, names in enumerate(left) for name in names if name in owner
    )
    # Groups without parameters are matched by their order.
    empty = zip(*([k for k, names in enumerate(side) if not names] for side in (left, right)), strict=False)
    out: dict[int, int] = {}
    taken: set[int] = set()
    for i, j in (*sorted(shared, key=lambda pair: (-shared[pair], pair)), *empty):
        if i not in out and j not in taken:
            out[i] = j
            taken.add(j)
    return out


def _only(names: Mapping[str, None], others: Mapping[str, None]) -> str:
    """How many names there are, and which of them the others lack."""
    only = [name for name in names if name not in others]
    text = f"{len(names)} name{'s' * (len(names) != 1)}"
    if only:
        text += f", only here: {_listed(only)}" if others else f": {_listed(only)}"
    return text


def _flat(value: Any, start: str = "") -> dict[str, Any]:
    """A nested value as its leaves by path. Tuples count as lists, numbers by their value.

    If a value shares so many containers that its leaves would be endless, each container is followed once. Where it is
    met again, there is the path of the first place.
    """
    out: dict[str, Any] = {}
    known: dict[int, str] | None = None if graphs.measure(value).is_spread else {}

    def add(value: Any, path: str) -> None:
        if isinstance(value, (Mapping, list, tuple)):
            if known is not None and known.setdefault(id(value), path) != path:
                out[path] = f"the same as {known[id(value)]}"
                return
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in items:
                named = f"{path}.{key}" if path else str(key)
                add(item, named if isinstance(value, Mapping) else f"{path}[{key}]")
        else:
            out[path] = value

    add(value, start)
    return out


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    out = {}
    for path in dict.fromkeys((*a, *b)):
        ours, theirs = a.get(path), b.get(path)
        unrecorded = path in _NOT_ALWAYS_RECORDED and None in (ours, theirs)
        if not unrecorded and not _equal(ours, theirs):
            out[path] = (_shown(ours), _shown(theirs))
    return out


def _equal(a: Any, b: Any) -> bool:
    if hasattr(a, "dtype") and hasattr(b, "dtype"):
        return _equal_arrays(a, b)
    if isinstance(a, float) and isinstance(b, float) and a != a and b != b:
        return True
    try:
        return bool(a == b)
    except (TypeError, ValueError, RuntimeError):
        return repr(a) == repr(b)


def _equal_arrays(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and tuple(a.shape) == tuple(b.shape) and bool((a == b).all())


def _shown(value: Any) -> str:
    if hasattr(value, "dtype"):
        return f"tensor {list(value.shape)} {value.dtype}"
    text = short(value) if value is not None else "none"
    return text if len(text) <= 60 else f"{text[:57]}..."
