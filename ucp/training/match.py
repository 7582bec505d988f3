"""Compare a checkpoint with a live training state, whole, before anything is touched.

The result is either a complete plan or one refusal that lists everything that does not fit: what would stay
unrestored, what would stay unused, shapes that differ, hyperparameters that one group would have to merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ucp.catalog import Catalog
from ucp.errors import Mismatch
from ucp.training.names import match
from ucp.training.target import Slot, Target
from ucp.transfer.gather import EXACT, Want

# What a param group says of its implementation or its identity rather than of the training: always the target's.
OWN_OPTIONS = frozenset(
    ("params", "param_names", "foreach", "fused", "capturable", "differentiable", "step", "name", "moe", "use_muon")
)
SHOWN = 8


@dataclass(frozen=True)
class Wish:
    """What the caller of a load asked for. allow_missing, allow_unused: glob patterns of names, or of
    ``name:state`` for optimizer states. strict: refuse missing and unused parameters and buffers."""

    weights_only: bool = False
    optimizer: bool = True
    lr_scheduler: bool = True
    strict: bool = True
    allow_missing: tuple[str, ...] = ()
    allow_unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that a load will do on this rank.

    wants: (slot key, state, element type to read) -> what to gather. scalars: slots whose optimizer state will be
    set. options: by param group. sources: param group -> index of the checkpoint's group.
    left, unused: what stays as it is and what is not read, by the caller's leave. rounded: frozen weights that the
    live model keeps in fewer bits.
    """

    wants: Mapping[tuple[int, str, str], list[Want]]
    scalars: Mapping[int, Mapping[str, Any]]
    options: Mapping[int, Mapping[str, Any]]
    sources: Mapping[int, int]
    left: tuple[str, ...]
    unused: tuple[str, ...]
    rounded: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass
class _Findings:
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    spared: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan(catalog: Catalog, target: Target, wish: Wish) -> Plan:
    """The plan of a load, or Mismatch with a list of all that does not fit. Changes nothing, talks to nobody."""
    found = _Findings()
    names = match(catalog, [m.name for s in target.slots for m in s.members])
    wants: dict[tuple[int, str, str], list[Want]] = {}
    rounded: list[str] = []
    scalars: dict[int, dict[str, Any]] = {}
    restore_states = wish.optimizer and not wish.weights_only
    for slot in target.slots:
        _weights(catalog, slot, names, wish, found, wants, rounded)
        if slot.kind == "parameter" and restore_states:
            _states(catalog, target, slot, names, wish, found, wants, scalars)
    _unused(catalog, target, names, wish, found, restore_states)
    options: dict[int, Mapping[str, Any]] = {}
    sources: dict[int, int] = {}
    if restore_states:
        options, sources = _options(catalog, target, names, found)
    _refuse(catalog, target, found)
    return Plan(
        wants, scalars, options, sources, tuple(found.left), tuple(found.spared), tuple(rounded), tuple(dict.fromkeys(found.notes))
    )


def _allowed(name: str, state: str | None, patterns: Iterable[str]) -> bool:
    keys = [name] if state is None else [name, f"{name}:{state}"]
    return any(fnmatchcase(k, p) for k in keys for p in patterns)


def _weights(
    catalog: Catalog,
    slot: Slot,
    names: Mapping[str, str],
    wish: Wish,
    found: _Findings,
    wants: dict[tuple[int, str, str], list[Want]],
    rounded: list[str],
) -> None:
    for member in slot.members:
        what = f"{'buffer' if slot.kind == 'buffer' else 'parameter'} '{member.name}' {list(member.shape)}"
        source = names.get(member.name)
        if source is None:
            if not wish.strict or _allowed(member.name, None, wish.allow_missing):
                found.left.append(member.name)
            else:
                found.missing.append(what)
            continue
        tensor = catalog.tensors.get((source, "param"))
        if tensor is None:
            found.missing.append(f"{what} (the checkpoint has its optimizer state but no weight)")
            continue
        if tensor.shape != member.shape:
            found.wrong.append(f"{what} has shape {list(tensor.shape)} in the checkpoint")
            continue
        dtype = slot.dtype
        if tensor.dtype != dtype and (tensor.dtype, dtype) not in EXACT:
            if slot.kind != "frozen":
                found.wrong.append(f"{what} is {tensor.dtype} in the checkpoint and {dtype} here, which would lose bits")
                continue
            rounded.append(member.name)
            dtype = tensor.dtype
        wants.setdefault((slot.key, "param", dtype), []).append(Want(tensor, member.blocks, dtype))


def _states(
    catalog: Catalog,
    target: Target,
    slot: Slot,
    names: Mapping[str, str],
    wish: Wish,
    found: _Findings,
    wants: dict[tuple[int, str, str], list[Want]],
    scalars: dict[int, dict[str, Any]],
) -> None:
    """The optimizer states of one slot: all of its members bring the same ones, with the same values of 'step'."""
    members = [(m, catalog.parameters[names[m.name]]) for m in slot.members if m.name in names]
    if not members:
        return
    first = members[0][1]
    expects = target.groups[slot.group].expects if slot.group is not None else None
    names_of = set(first.states) - {"param"}
    for member, info in members[1:]:
        others = set(info.states) - {"param"}
        if others != names_of:
            found.wrong.append(
                f"'{member.name}' has optimizer states {sorted(others)} and '{first.name}' {sorted(names_of)}, but one "
                "flat buffer holds both here"
            )
            return
        if names_of and dict(info.scalars) != dict(first.scalars):
            found.wrong.append(
                f"'{member.name}' has {_values(info.scalars)} and '{first.name}' {_values(first.scalars)}, but one flat "
                "buffer has one value here"
            )
            return
    never_stepped = not names_of and _steps_taken(catalog) == 0
    if expects is not None and not never_stepped:
        for state in sorted(expects - names_of):
            for member, _ in members:
                if not _allowed(member.name, state, wish.allow_missing):
                    found.missing.append(f"optimizer state '{state}' of '{member.name}' {list(member.shape)}")
        for state in sorted(names_of - expects):
            for member, _ in members:
                if not _allowed(member.name, state, wish.allow_unused):
                    found.unused.append(f"optimizer state '{state}' of '{member.name}' {list(member.shape)}")
        names_of &= expects
    elif expects is None:
        found.notes.append(f"the optimizer's states are not known beforehand; it is given {sorted(names_of)}")
    places = {state: dict(zip(slot.members, slot.placement(state).blocks, strict=True)) for state in names_of}
    for state in sorted(names_of):
        for member, info in members:
            tensor = catalog.tensors[info.name, state]
            dtype = slot.states.get(state, slot.dtype)
            if tensor.dtype != dtype and (tensor.dtype, dtype) not in EXACT:
                found.wrong.append(
                    f"optimizer state '{state}' of '{member.name}' is {tensor.dtype} in the checkpoint and {dtype} "
                    "here, which would lose bits"
                )
                return
            wants.setdefault((slot.key, state, dtype), []).append(Want(tensor, places[state][member], dtype))
    scalars[slot.key] = dict(first.scalars) if names_of or first.scalars and not never_stepped else {}


def _steps_taken(catalog: Catalog) -> int | None:
    state = catalog.training_state
    return None if state.global_steps is None else state.global_steps - (state.skipped_steps or 0)


def _unused(
    catalog: Catalog,
    target: Target,
    names: Mapping[str, str],
    wish: Wish,
    found: _Findings,
    restore_states: bool,
) -> None:
    used = set(names.values())
    trained = {m.name for s in target.slots if s.kind == "parameter" for m in s.members}
    for info in catalog.parameters.values():
        if info.name in used:
            continue
        if not wish.strict or _allowed(info.name, None, wish.allow_unused):
            found.spared.append(info.name)
        else:
            found.unused.append(f"{'buffer' if info.kind == 'buffer' else 'parameter'} '{info.name}' {list(info.shape)}")
    if not restore_states:
        return
    for live, source in names.items():
        states = set(catalog.parameters[source].states) - {"param"}
        if live not in trained:
            for state in sorted(states):
                if not _allowed(live, state, wish.allow_unused):
                    found.unused.append(f"optimizer state '{state}' of '{live}', which is not trained here")


def _options(
    catalog: Catalog, target: Target, names: Mapping[str, str], found: _Findings
) -> tuple[dict[int, Mapping[str, Any]], dict[int, int]]:
    """Each live group's hyperparameters, from the checkpoint's groups that hold the same parameters."""
    groups = catalog.training_state.param_groups
    owner = {n: i for i, g in enumerate(groups) for n in g.names}
    options: dict[int, Mapping[str, Any]] = {}
    sources: dict[int, int] = {}
    for index, group in enumerate(target.groups):
        origins = sorted({owner[names[n]] for n in group.names if n in names and names[n] in owner})
        if not origins:
            if group.names:
                found.notes.append(f"param group {index} keeps its own hyperparameters: the checkpoint has none for it")
            continue
        kept = [_training_options(groups[i].options) for i in origins]
        if any(k is None for k in kept):
            found.notes.append(
                f"param group {index} keeps its own hyperparameters: this checkpoint (an elastic one) recorded none"
            )
            continue
        for i, other in zip(origins[1:], kept[1:], strict=True):
            differing = sorted(k for k in {*(kept[0] or {}), *(other or {})} if (kept[0] or {}).get(k) != (other or {}).get(k))
            if differing:
                k = differing[0]
                found.wrong.append(
                    f"param group {index} here holds parameters of the checkpoint's groups {origins[0]} and {i}, whose "
                    f"'{k}' differ ({(kept[0] or {}).get(k)!r} and {(other or {}).get(k)!r})"
                )
        options[index] = {k: v for k, v in (kept[0] or {}).items() if k in group.options or k == "initial_lr"}
        if len(origins) == 1:
            sources[index] = origins[0]
    return options, sources


def _training_options(options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if options is None else {k: v for k, v in options.items() if k not in OWN_OPTIONS}


def _values(scalars: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in sorted(scalars.items())) or "no values"


def _refuse(catalog: Catalog, target: Target, found: _Findings) -> None:
    parts = []
    if found.wrong:
        parts.append(f"{len(found.wrong)} do not fit: {_list(found.wrong)}")
    if found.missing:
        parts.append(f"{len(found.missing)} would stay unrestored: {_list(found.missing)}")
    if found.unused:
        parts.append(f"{len(found.unused)} of the checkpoint would stay unused: {_list(found.unused)}")
    if parts:
        raise Mismatch(
            f"nothing was loaded: the checkpoint ({catalog.layout}) and the engine ({target.layout}) do not match; "
            + "; ".join(parts)
            + '; to load all the same, name them in "ucp": {"load": {"allow_missing": [...], "allow_unused": [...]}}'
        )


def _list(items: Sequence[str]) -> str:
    return ", ".join(items[:SHOWN]) + (f", and {len(items) - SHOWN} more" if len(items) > SHOWN else "")
