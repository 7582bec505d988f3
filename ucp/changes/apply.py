"""Declared changes made to a catalog: states, workers, adapters, names, removed, element types, sizes, frozen,
unfrozen, added, in this order. A change that the checkpoint already has is none, so one declaration serves all
restarts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ucp.catalog import Catalog, LogicalTensor, ParameterInfo
from ucp.changes import adapters
from ucp.changes.build import PARAM, Build, few
from ucp.changes.changed import Changed
from ucp.changes.outline import LiveParameter, Outline
from ucp.changes.quantised import dequantised
from ucp.changes.resize import NewRows, resized
from ucp.changes.workers import rearranged
from ucp.checkpoint import open as open_checkpoint
from ucp.errors import BadArgument, UcpError, Unsupported
from ucp.formats.shared.renaming import rename
from ucp.loading.name_match import match
from ucp.merging.computed import Input, MergedTensor
from ucp.merging.operations import Copied
from ucp.run_folder import nearest
from ucp.spec.bound import Bound, bind
from ucp.spec.changes import ADDED, DEQUANTISED, MERGED, MODEL, REQUANTISED, SPLIT, ZEROS, Changes
from ucp.storage.numbers import FLOATS
from ucp.transfer.exact import EXACT
from ucp.units import counted


def applied(
    catalog: Catalog, changes: Changes, outline: Outline | None = None, config: Mapping[str, Any] | None = None
) -> Changed:
    """Make declared changes to a catalog.

    Parameters
    ----------
    catalog: the checkpoint's.
    outline: the live model that it is for; None for a conversion, which has none.
    config: the model's config.json as a mapping, for sizes.

    Raises
    ------
    BadArgument
        If a pattern matches no parameter of either side, or if a conversion cannot know what a change needs.
    Mismatch, Unsupported, SpecError
        If a change does not fit the checkpoint.
    """
    build = Build(catalog)
    steps = _Steps(build, changes, outline or Outline(), outline is not None)
    before = [*_names(catalog), *steps.outline.names]
    if changes.states == REQUANTISED and steps.outline.quantises is None:
        raise BadArgument(
            f"{changes.file}: states: '{REQUANTISED}' is for load_training with an optimizer that quantises its "
            f"states; '{DEQUANTISED}' gives float32 states to one that does not"
        )
    if changes.states == DEQUANTISED or steps.outline.quantises:
        build.lines += dequantised(build)
    if changes.workers is not None:
        build.lines += rearranged(build, *changes.workers)
    steps.adapters()
    if changes.names is not None:
        _rename(build, changes, config, steps.live)
    _check_patterns(changes, {*before, *_names(build.catalog)}, steps.live)
    steps.removed()
    steps.dtypes()
    steps.sizes()
    steps.frozen()
    steps.unfrozen()
    steps.added()
    return Changed(build.catalog, frozenset(build.grown), tuple(build.lines))


def _names(catalog: Catalog) -> list[str]:
    return [name for info in catalog.parameters.values() for name in (info.name, *info.aliases)]


def _rename(build: Build, changes: Changes, config: Mapping[str, Any] | None, live: bool) -> None:
    if changes.names is None:
        return
    held, bound = set(build.catalog.parameters), bind(changes.names, config)
    build.catalog = rename(build.catalog, bound, MODEL, to_framework=True, keep=True)
    if live and (moved := _moved_again(build.catalog, bound)):
        raise BadArgument(
            f"{changes.file}: names: '{moved}' has what another parameter, or another order, had under names that stay "
            "the same. A load of what is saved next would change it once more, for nothing tells that from this "
            "checkpoint: change it once, by ucp convert --changes, and load what that writes without this declaration"
        )
    gone, new = sorted(held - set(build.catalog.parameters)), sorted(set(build.catalog.parameters) - held)
    if new:
        build.lines.append(f"names: {few(gone)} became {few(new)}")


def _moved_again(catalog: Catalog, bound: Bound) -> str | None:
    """A parameter that renaming a renamed catalog once more would give other elements, with all names as they are.
    Where that changes names, or fails, a load says so."""
    try:
        again = rename(catalog, bound, MODEL, to_framework=True, keep=True)
    except UcpError:
        return None
    if again.parameters.keys() != catalog.parameters.keys():
        return None
    for (name, state), one in catalog.tensors.items():
        other = again.tensors[name, state]
        if other.blocks is not one.blocks or not np.array_equal(other.bases, one.bases):
            return name
    return None


def _check_patterns(changes: Changes, names: Collection[str], live: bool) -> None:
    """Raise BadArgument for a pattern that is about nothing. What was removed is in no later checkpoint of a live
    model, and what of a checkpoint a live model has no place for is refused anyway."""
    for section, pattern in changes.patterns:
        if live and section == "removed":
            continue
        alone = pattern.rpartition(":")[0] if section == "dtype" and ":" in pattern else pattern
        if not any(fnmatchcase(name, alone) for name in names):
            raise BadArgument(
                f"{changes.file}: {section}: '{pattern}' is no parameter of the checkpoint or of the model; "
                f"{nearest(pattern, names)}"
            )


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass
class _Steps:
    """The changes but those of names. live: whether there is a live model."""

    build: Build
    changes: Changes
    outline: Outline
    live: bool

    def adapters(self) -> None:
        how = self.changes.adapters
        if how == ADDED:
            self._needs_model("adapters: added")
            self.build.lines += adapters.added(self.build, self.outline)
        elif how == SPLIT:
            self.build.lines += adapters.split(self.build)
        elif how == MERGED:
            self.build.lines += adapters.merged(self.build, self.changes.scale)

    def _needs_model(self, what: str) -> None:
        if not self.live:
            raise BadArgument(
                f"{self.changes.file}: {what} needs the model, which a conversion has not got: declare it where the "
                'checkpoint is loaded ("load": {"changes": ...}, or changes=)'
            )

    def _matching(self, patterns: Sequence[str]) -> list[ParameterInfo]:
        """The checkpoint's parameters that a pattern is about, by its own names or those of the live model."""
        if not patterns:
            return []
        theirs = {source: name for name, source in self._sources().items()}
        return [
            info
            for info in self.build.catalog.parameters.values()
            if info.kind != "padding"
            and any(_any(name, patterns) for name in (info.name, *info.aliases, theirs.get(info.name, info.name)))
        ]

    def _sources(self) -> dict[str, str]:
        """Live name -> the checkpoint's."""
        return match(self.build.catalog, self.outline.names)

    def _live_of(self) -> dict[str, LiveParameter]:
        """The checkpoint's name -> the live parameter."""
        return {source: self.outline.parameters[name] for name, source in self._sources().items()}

    def removed(self) -> None:
        live = self._live_of()
        gone = [info.name for info in self._matching(self.changes.removed) if info.name not in live]
        if gone:
            self.build.drop(gone)
            self.build.lines.append(f"removed: not used: {counted(len(gone), 'parameter')} ({few(gone)})")

    def dtypes(self) -> None:
        reader, turned, rounded = self.build.reader(), Counter[tuple[str, str]](), set[str]()
        live = self._live_of() if self.changes.dtype else {}
        for info, patterns in self._patterns_of():
            tensors = []
            for tensor in self.build.tensors_of(info):
                dtype = self._dtype(patterns, info.name, tensor.state)
                if dtype is not None and dtype != tensor.dtype and tensor.dtype in FLOATS:
                    if (tensor.dtype, dtype) not in EXACT:
                        rounded.add(dtype)
                        if tensor.state == PARAM and info.name in live:
                            self._check_rounded(live[info.name], dtype)
                    turned[tensor.dtype, dtype] += 1
                    source = MergedTensor(
                        tensor.name,
                        tensor.state,
                        tensor.shape,
                        dtype,
                        Copied(0),
                        [Input("checkpoint", tensor, reader)],
                        finite=False,
                    )
                    tensor = self.build.computed(tensor.name, tensor.state, tensor.shape, dtype, source, dtype)
                tensors.append(tensor)
            if any(tensor.dtype != info.states.get(tensor.state) for tensor in tensors):
                self.build.put([(info, tensors)])
        for (old, dtype), count in turned.items():
            how = "rounded once" if dtype in rounded else "exactly"
            self.build.lines.append(f"dtype: {counted(count, 'tensor')} from {old} to {dtype}, {how}")

    def _check_rounded(self, there: LiveParameter, dtype: str) -> None:
        """Raise BadArgument if weights would be rounded for a live model that keeps them in more bits."""
        if there.dtype is not None and there.dtype != dtype and (dtype, there.dtype) in EXACT:
            raise BadArgument(
                f"{self.changes.file}: dtype: '{there.name}' would be rounded to {dtype}, and here it is "
                f"{there.dtype}, so that each further restart would round it again; declare element types for what is "
                "kept in them, or round once, by ucp convert --changes"
            )

    def _patterns_of(self) -> list[tuple[ParameterInfo, list[tuple[str, str]]]]:
        """Parameters with the patterns under dtype: that are about them. Buffers are no masters: a pattern that is
        about parameters leaves them as they are."""

        def about(info: ParameterInfo, pattern: str) -> bool:
            names = (info.name, *(f"{info.name}:{state}" for state in info.states if ":" in pattern))
            return any(fnmatchcase(name, pattern) for name in names)

        infos = list(self.build.catalog.parameters.values())
        out: list[tuple[ParameterInfo, list[tuple[str, str]]]] = []
        taken: set[str] = set()
        for info in sorted(infos, key=lambda info: info.kind == "buffer"):
            found = [(p, dtype) for p, dtype in self.changes.dtype if about(info, p)]
            if info.kind == "buffer":
                found = [(p, dtype) for p, dtype in found if p not in taken]
            else:
                taken.update(p for p, _ in found)
            if found:
                out.append((info, found))
        return out

    def _dtype(self, patterns: Sequence[tuple[str, str]], name: str, state: str) -> str | None:
        """The element type that is declared for a tensor: by patterns with a state, else by those without."""
        with_state = [(p, dtype) for p, dtype in patterns if ":" in p and fnmatchcase(f"{name}:{state}", p)]
        chosen = with_state or [(p, dtype) for p, dtype in patterns if fnmatchcase(name, p)]
        for other, second in chosen[1:]:
            one, first = chosen[0]
            if first != second:
                raise BadArgument(
                    f"{self.changes.file}: dtype: '{one}' says {first} and '{other}' says {second} of "
                    f"'{name}:{state}'; one of them has to leave it out"
                )
        return chosen[0][1] if chosen else None

    def sizes(self) -> None:
        live = self._live_of()
        rows: NewRows | None = None
        said: dict[str, tuple[str, tuple[int, ...] | None]] = {}
        for pattern, shape in self.changes.resized:
            for info in self._matching((pattern,)):
                there = live.get(info.name)
                wanted = there.shape if shape is None and there is not None else shape
                other, before = said.setdefault(info.name, (pattern, wanted))
                if before != wanted:
                    raise BadArgument(
                        f"{self.changes.file}: resized: '{other}' says {list(before or ())} and '{pattern}' says "
                        f"{list(wanted or ())} of '{info.name}'; it has one shape"
                    )
                if wanted is None:
                    self._needs_model(f"resized: '{pattern}' without a shape")
                elif wanted != info.shape:
                    rows = rows or self._new_rows()
                    self.build.lines.append(resized(self.build, info, wanted, rows))

    def _new_rows(self) -> NewRows:
        given = self.changes.new_rows
        if given is None and not self.live:
            return NewRows("none")
        if given is None or given == ZEROS:
            return NewRows("live" if given is None else "zeros")
        with open_checkpoint(given) as opened:
            return NewRows("checkpoint", opened.catalog, str(opened.path))

    def frozen(self) -> None:
        live = self._live_of()
        infos = [
            info
            for info in self._matching(self.changes.frozen)
            if len(info.states) > 1 and (info.name not in live or live[info.name].kind != "parameter")
        ]
        if infos:
            adapters.freeze(self.build, infos)
            names = [info.name for info in infos]
            self.build.lines.append(
                f"frozen: the optimizer states of {counted(len(infos), 'parameter')} are left out ({few(names)})"
            )

    def unfrozen(self) -> None:
        if not self.changes.unfrozen:
            return
        self._needs_model("unfrozen")
        live = self._live_of()
        made = []
        for info in self._matching(self.changes.unfrozen):
            there = live.get(info.name)
            if there is not None and there.kind == "parameter" and len(info.states) == 1:
                made.append(self._with_fresh_states(info, there, self.build.tensors_of(info)))
        self.build.put(made)
        self._report("unfrozen", [info for info, _ in made])

    def added(self) -> None:
        if not self.changes.added and self.changes.adapters != ADDED:
            return
        self._needs_model("added")
        known = self._sources()
        made = []
        for name, there in self.outline.parameters.items():
            declared = _any(name, self.changes.added) or (self.changes.adapters == ADDED and adapters.is_adapter(name))
            if declared and name not in known:
                info = ParameterInfo(name, there.shape, {}, there.kind)
                made.append(self._with_fresh_states(info, there, ()))
                self.build.grown.add(name)
        self.build.put(made)
        self._report("added", [info for info, _ in made])

    def _report(self, what: str, infos: Sequence[ParameterInfo]) -> None:
        if not infos:
            return
        names = [info.name for info in infos]
        weights = "" if what == "unfrozen" else ", as the model made them"
        states = " with optimizer states of zero" if any(i.kind == "parameter" for i in infos) else ""
        self.build.lines.append(f"{what}: {counted(len(infos), 'parameter')}{weights}{states} ({few(names)})")
        steps = {value for info in infos for key, value in info.scalars.items() if key == "step" and value}
        if steps:
            self.build.lines.append(
                f"{what}: they share a buffer of the optimizer with others, and so their step count, "
                f"{', '.join(map(str, sorted(steps)))}: the first updates are not corrected for moments of zero"
            )

    def _with_fresh_states(
        self, info: ParameterInfo, there: LiveParameter, tensors: Sequence[LogicalTensor]
    ) -> tuple[ParameterInfo, list[LogicalTensor]]:
        """A parameter with optimizer states of zero, as the live optimizer will keep them. There are none for a
        checkpoint of a run that has not stepped."""
        state = self.build.catalog.training_state
        stepped = state.global_steps is None or state.global_steps > (state.skipped_steps or 0)
        out = list(tensors)
        kept = replace(info, kind=there.kind)
        if there.kind != "parameter" or not stepped:
            return kept, out
        if there.states is None:
            raise Unsupported(
                f"'{there.name}': the live optimizer does not tell which states it keeps, so none can be made for it; "
                "train without it first, or give it an optimizer of its own"
            )
        out += [self.build.zeros(info.name, name, there.shape, dtype) for name, dtype in sorted(there.states.items())]
        return replace(kept, scalars=self._values(there)), out

    def _values(self, there: LiveParameter) -> dict[str, Any]:
        """Single values for a parameter with fresh states: those of its neighbours in one buffer, or 0."""
        sources = self._sources()
        for name in there.together:
            info = self.build.catalog.parameters.get(sources.get(name, ""))
            if info is not None and info.scalars:
                return dict(info.scalars)
        return dict.fromkeys(sorted(there.values), 0)
