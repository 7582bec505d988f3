"""A spec from what a checkpoint, or a model, says of itself: DeepSpeed's ``universal_checkpoint_info``, and shapes.

The lists of names and their order are those of DeepSpeed's converter (``checkpoint/ds_to_universal.py``, version 0.4 of
the info). Affine maps come first, then what is replicated, averaged, made of two or more sub-parameters, or cut along
dimension 1. Everything else is cut along dimension 0. What a vocabulary has beyond its original size is padding. What
this leaves open, or what contradicts the shapes, is marked as unknown.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.geometry import Shape
from ucp.parallel.mesh import Layout
from ucp.spec import affine, affine_places
from ucp.spec.affine_places import AffinePlaces
from ucp.spec.draft import Axes, Drafted, Pending, write
from ucp.spec.language import Spec, loads
from ucp.spec.places import Parts

# The newest version of the info that is understood.
VERSION = 0.4
ORIGIN = "universal_checkpoint_info"

_LISTS = (
    "tp_replicated_parameter_patterns",
    "parameter_to_average_patterns",
    "parameter_with_2_sub_params_cat_dim_0",
    "parameter_with_row_parallelism_patterns",
    "vocabulary_parameter_patterns",
    "pipeline_replicated_parameter_patterns",
)

# Shapes of one parameter's shards by tensor-parallel rank.
Shards = Mapping[int, Shape]


def infer(
    info: Mapping[str, Any],
    parts: Parts,
    layout: Layout,
    buffers: Collection[str] = (),
    captures: Sequence[tuple[str, str]] = (),
) -> Spec:
    """The spec that a model's ``universal_checkpoint_info`` amounts to, for the local shapes of all its parts.

    buffers: names that the info need not mention.
    captures: as for `draft`.

    Raises Unsupported for a newer version of the info, DamagedCheckpoint for one that is malformed. What the info
    leaves open is marked as unknown in the spec, and such a spec is refused when it is used.
    """
    return loads(draft(info, parts, layout, buffers, captures), ORIGIN)


def pieced(info: Mapping[str, Any], parts: Parts) -> dict[str, AffinePlaces]:
    """The parameters whose affine maps no axes say, with what the maps say.

    A parameter whose map is of other shapes than its shards, or of no boxes, is left out: `draft` says why.
    """
    if not info.get("affine_map"):
        return {}
    said, out = _Info(info), {}
    for name, held in _shards(parts).items():
        if not isinstance(held, Pending) and sorted(held) == list(range(len(held))):
            found = said.pieced(name, [held[r] for r in sorted(held)])
            if found is not None:
                out[name] = found
    return out


def draft(
    info: Mapping[str, Any] | None,
    parts: Parts,
    layout: Layout,
    buffers: Collection[str] = (),
    captures: Sequence[tuple[str, str]] = (),
    *,
    model: str = "drafted",
    head: Sequence[str] = (),
    contents: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
) -> str:
    """The text of a spec, for a person to complete. Other arguments and errors are those of `infer`.

    info: None if there is none.
    captures: (regular expression, capture) for numbers in names that are places along an axis, such as an expert's. The
    capture is ``{axis}`` or ``{axis/degree}``.
    head: comments at the top.
    contents: parameter -> 'equal', 'constant' or 'differ': how its shards on the tensor-parallel ranks compare, if that
    is known.
    tied: other name -> parameter.
    """
    shards = _shards(parts)
    axes = Axes()
    said = None if info is None else _Info(info)
    lines: dict[str, Drafted | Pending] = {}
    for name, held in shards.items():
        if name in buffers and (said is None or not said.mentions(name)):
            continue
        if isinstance(held, Pending):
            lines[name] = held
        elif layout.tp == 1 and not (said and said.listed("vocabulary_parameter_patterns", name)):
            lines[name] = _whole(axes, held[0])
        elif sorted(held) != list(range(layout.tp)):
            lines[name] = Pending(f"only the tensor-parallel ranks {sorted(held)} have it")
        elif said is None:
            lines[name] = _guarded(axes, held, (contents or {}).get(name, ""))
        else:
            lines[name] = said.line(axes, name, held)
    found = [
        (pattern, capture, [int(m[0]) for name in lines if (m := re.search(pattern, name))])
        for pattern, capture in captures
    ]
    for _, capture, numbers in found:
        if numbers:
            axis = capture.strip("{}").partition("/")[0]
            axes.name(axis, max(numbers) + 1, "the numbers in the parameters' names")
    return write(
        lines,
        axes.sizes,
        model=model,
        head=head,
        tied={a: o for a, o in (tied or {}).items() if o in lines},
        captures=[(pattern, capture) for pattern, capture, numbers in found if numbers],
    )


def _shards(parts: Parts) -> dict[str, Shards | Pending]:
    """Shapes by tensor-parallel rank. They must be the same on all pipeline stages and expert ranks."""
    out: dict[str, Any] = {}
    for at, held in sorted(parts.items()):
        for name, shape in held.items():
            known = out.setdefault(name, {})
            if isinstance(known, dict) and known.setdefault(at.tp, shape) != shape:
                out[name] = Pending(
                    f"tensor-parallel rank {at.tp} has it as {list(known[at.tp])} and as {list(shape)} on different "
                    "pipeline stages"
                )
    return out


def _whole(axes: Axes, shape: Shape) -> Drafted:
    return Drafted(" ".join(map(axes.whole, shape)) or "scalar")


def _guarded(axes: Axes, held: Shards, contents: str) -> Drafted | Pending:
    """What can be said from shapes and contents alone."""
    shapes = [held[r] for r in sorted(held)]
    shown = f"{list(shapes[0])} on every rank"
    if len(set(shapes)) > 1:
        return Pending(
            f"the ranks hold {_shown(shapes)}; say how they are cut: in one piece (axis/tp), or segment by segment "
            "((a/tp | b/tp))"
        )
    if contents == "equal":
        return _whole(axes, shapes[0])
    if contents == "constant":
        return Pending(f"{shown}, all of one value: whole on every rank, or cut; say which")
    if contents == "differ":
        return Pending(
            f"{shown}, with other values: say along which dimension it is cut, and whether segment by segment"
        )
    return Pending(f"{shown}: whole on every rank, or cut; say which")


class _PatternTable:
    """What patterns say: of one name, or of all names that a regular expression matches from their beginning."""

    def __init__(self, said: Mapping[str, Any]) -> None:
        bodies = {p: p[1:-1].replace("\\", "") for p in said}
        self._names = {body: said[p] for p, body in bodies.items() if p == f"^{re.escape(body)}$"}  # as AutoTP has them
        self._rest = [(_compiled(p), said[p]) for p, body in bodies.items() if body not in self._names]

    def get(self, name: str) -> Any:
        """What is said of the name, or None."""
        if name in self._names:
            return self._names[name]
        return next((value for pattern, value in self._rest if pattern.match(name)), None)


class _Info:
    """The lists of names, compiled."""

    def __init__(self, info: Mapping[str, Any]) -> None:
        self.version = info.get("universal_checkpoint_version", 0.0)
        if not isinstance(self.version, (int, float)) or self.version > VERSION:
            raise Unsupported(
                f"the checkpoint's universal_checkpoint_info is of version {self.version}; this program knows those up "
                f"to {VERSION}; give a spec instead (spec=, --spec)"
            )
        self.lists = {key: _PatternTable(dict.fromkeys(_texts(info, key), True)) for key in _LISTS}
        unsupported = info.get("autotp_unsupported_parameter_patterns") or {}
        self.unsupported = _PatternTable(_mapping(unsupported, "autotp_unsupported_parameter_patterns"))
        self.vocabulary = info.get("original_vocab_size")
        maps = _mapping(info.get("affine_map") or {}, "affine_map")
        if maps and maps.get("version", affine.VERSION) not in range(1, affine.VERSION + 1):
            raise Unsupported(
                f"the checkpoint's affine_map is of version {maps['version']}; this program knows {affine.VERSION}; "
                "give a spec instead (spec=, --spec)"
            )
        self.maps = _PatternTable(_mapping(maps.get("params", {}), "affine_map"))
        widths = _mapping(info.get("sub_param_shard_widths") or {}, "sub_param_shard_widths")
        entries = [_mapping(e, "parameter_with_sub_params") for e in info.get("parameter_with_sub_params") or ()]
        self.subs = _PatternTable({p: (entry, widths.get(p)) for entry in entries for p in _texts(entry, "patterns")})

    def mentions(self, name: str) -> bool:
        """Whether any list has the name."""
        return any(table.get(name) is not None for table in (self.maps, self.subs, *self.lists.values()))

    def listed(self, key: str, name: str) -> bool:
        return self.lists[key].get(name) is not None

    def line(self, axes: Axes, name: str, held: Shards) -> Drafted | Pending:
        """What the info says of one parameter."""
        with _readable(name):
            return self._line(axes, name, [held[r] for r in sorted(held)])

    def pieced(self, name: str, shapes: Sequence[Shape]) -> AffinePlaces | None:
        """What an affine map says of one parameter that no axes can say; None if it has none, or they can."""
        found = self.maps.get(name)
        if found is None or self.unsupported.get(name) is not None:
            return None
        with _readable(name):
            entry = _mapping(found, name)
            if isinstance(_from_map(Axes(), entry, shapes), Drafted):
                return None
            try:
                places = affine_places.read(entry)
            except affine_places.NotBoxes:
                return None
        return places if list(places.shards.values()) == list(shapes) else None

    def _line(self, axes: Axes, name: str, shapes: Sequence[Shape]) -> Drafted | Pending:
        why = self.unsupported.get(name)
        if why is not None:
            return Pending(f"DeepSpeed's AutoTP says that it can't tell how it is cut: {why}")
        found = self.maps.get(name)
        if found is not None and self._is_padded(found, name):
            return self._in_segments(axes, name, shapes, 0, _equal(shapes, 0, 1))
        if found is not None:
            return _from_map(axes, _mapping(found, name), shapes)
        if self.listed("tp_replicated_parameter_patterns", name):
            if len(set(shapes)) > 1:
                return Pending(f"it is listed as replicated, and ranks hold {_shown(shapes)}")
            return _whole(axes, shapes[0])
        if self.listed("parameter_to_average_patterns", name):
            if len(set(shapes)) > 1:
                return Pending(f"it is listed as an average of copies, and ranks hold {_shown(shapes)}")
            return Drafted(f"average({_whole(axes, shapes[0]).axes}, tp)")
        if self.listed("parameter_with_2_sub_params_cat_dim_0", name):
            return self._in_segments(axes, name, shapes, 0, _equal(shapes, 0, 2))
        sub = self.subs.get(name)
        if sub is not None:
            return self._sub_params(axes, name, shapes, *sub)
        dim = 1 if self.listed("parameter_with_row_parallelism_patterns", name) else 0
        return self._in_segments(axes, name, shapes, dim, _equal(shapes, dim, 1))

    def _is_padded(self, found: Any, name: str) -> bool:
        """Whether the map is of a vocabulary with its padding, as only this project writes it."""
        if not self.listed("vocabulary_parameter_patterns", name) or not isinstance(self.vocabulary, int):
            return False
        return int(_mapping(found, name)["logical_shape"][0]) > self.vocabulary

    def _sub_params(
        self, axes: Axes, name: str, shapes: Sequence[Shape], entry: Mapping[str, Any], widths: Any
    ) -> Drafted | Pending:
        dim = int(entry["partition_dim"])
        said = entry["shape"][dim]
        if widths is not None:
            segments = [tuple(int(w) for w in one) for one in widths]
        elif self.version >= 0.4:
            return Pending(
                "it is listed as made of sub-parameters, and sub_param_shard_widths does not say how wide they are"
            )
        elif isinstance(said, (tuple, list)):
            if any(int(n) % len(shapes) for n in said):
                return Pending(
                    f"its sub-parameters {list(said)} do not divide by {len(shapes)} ranks; say how they are cut"
                )
            segments = [(int(n) // len(shapes),) * len(shapes) for n in said]
        else:
            return self._in_segments(axes, name, shapes, dim, _equal(shapes, dim, int(said)))
        if len(entry["shape"]) != len(shapes[0]):
            return Pending(
                f"its sub-parameters are those of another shape, {entry['shape']}; ranks hold {_shown(shapes)}"
            )
        return self._in_segments(axes, name, shapes, dim, segments)

    def _in_segments(
        self, axes: Axes, name: str, shapes: Sequence[Shape], dim: int, segments: Sequence[tuple[int, ...]] | None
    ) -> Drafted | Pending:
        rest = {(*s[:dim], *s[dim + 1 :]) for s in shapes}
        if segments is None or len(shapes[0]) <= dim or len({len(s) for s in shapes}) > 1 or len(rest) > 1:
            return Pending(f"it is said to be cut along dimension {dim}, and ranks hold {_shown(shapes)}")
        if any(sum(one[r] for one in segments) != s[dim] for r, s in enumerate(shapes)):
            return Pending(f"the widths of its sub-parameters, {segments}, are not those of {_shown(shapes)}")
        dims = [axes.whole(n) for n in shapes[0]]
        total = sum(map(sum, segments))
        if self.listed("vocabulary_parameter_patterns", name):
            n = self.vocabulary
            if not isinstance(n, int) or dim or len(segments) > 1 or n > total:
                return Pending(f"it is listed as a vocabulary of {n}, and ranks hold {_shown(shapes)}")
            if n < total:
                dims[0] = axes.padded("vocab", n)
                return Drafted(" ".join(dims))
        cut = axes.dimension(segments)
        if cut is None:
            return Pending(
                f"its segments are cut as {segments}, which no cut of one axis makes; give them axes by hand"
            )
        dims[dim] = cut
        return Drafted(" ".join(dims))


def _from_map(axes: Axes, entry: Mapping[str, Any], shapes: Sequence[Shape]) -> Drafted | Pending:
    try:
        found = affine.read(entry)
    except affine.NotSegments as why:
        reason = str(why)
        try:
            affine_places.read(entry)
        except affine_places.NotBoxes as nor:  # else only a spec's text can't say it
            reason = str(nor)
        return Pending(f"its affine map can't be written as axes: {reason}")
    if list(found.shards) != list(shapes):
        return Pending(f"its affine map is one of the shards {_shown(found.shards)}, and ranks hold {_shown(shapes)}")
    dims = [axes.whole(n) for n in found.shape]
    if found.dim is not None:
        cut = axes.dimension(found.segments)
        if cut is None:
            return Pending(
                f"its segments are cut as {found.segments}, which no cut of one axis makes; write them by hand"
            )
        dims[found.dim] = cut
    return Drafted(" ".join(dims) or "scalar")


def _equal(shapes: Sequence[Shape], dim: int, parts: int) -> list[tuple[int, ...]] | None:
    """Every rank's shard as ``parts`` equal segments; None if it can't be divided so."""
    if any(len(s) <= dim or s[dim] % parts for s in shapes):
        return None
    return [tuple(s[dim] // parts for s in shapes)] * parts


def _shown(shapes: Sequence[Shape]) -> str:
    return ", ".join(str(list(s)) for s in shapes)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Errors from malformed entries, as ours."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise DamagedCheckpoint(
            f"universal_checkpoint_info: what it says of '{name}' can't be read ({type(error).__name__}: {error}); "
            "give a spec instead (spec=, --spec)"
        ) from error


def _texts(info: Mapping[str, Any], key: str) -> list[str]:
    found = info.get(key) or []
    if not isinstance(found, (list, tuple)) or not all(isinstance(p, str) for p in found):
        raise DamagedCheckpoint(f"universal_checkpoint_info: '{key}' is no list of patterns")
    return list(found)


def _mapping(found: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise DamagedCheckpoint(f"universal_checkpoint_info: '{what}' is a {type(found).__name__}, not a mapping")
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise DamagedCheckpoint(
            f"universal_checkpoint_info: '{pattern}' is no regular expression ({error}); give a spec instead"
        ) from None
