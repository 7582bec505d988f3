"""Compare a checkpoint with a live training state, whole, before anything is touched.

The result is either a complete plan or one refusal that lists everything that does not fit: what would stay
unrestored, what would stay unused, shapes that differ, hyperparameters that one group would have to merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ucp.catalog import Catalog, LogicalTensor, ParameterInfo
from ucp.errors import Mismatch
from ucp.loading.name_match import match
from ucp.loading.target import Member, Slot, Target
from ucp.storage.rounding import ROUNDED
from ucp.transfer.gather import EXACT, Want

# What a param group says of its implementation or its identity rather than of the training: always the target's.
OWN_OPTIONS = frozenset(
    ("params", "param_names", "foreach", "fused", "capturable", "differentiable", "step", "name", "moe", "use_muon")
)
SHOWN = 8


@dataclass(frozen=True)
class Wish:
    """What the caller of a load asked for. allow_missing, allow_unused: glob patterns of names, or of ``name:state``
    for optimizer states; what is missing stays as it is. strict: refuse missing and unused parameters and buffers."""

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
    left, unused: what stays as it is and what is not read, by the caller's leave (names, and ``name:state``). rounded:
    frozen weights and buffers that the live model keeps in fewer bits. tied: pairs of the checkpoint's tensors that are
    one parameter here and so have to be equal; the second is what is read.
    """

    wants: Mapping[tuple[int, str, str], list[Want]]
    scalars: Mapping[int, Mapping[str, Any]]
    options: Mapping[int, Mapping[str, Any]]
    sources: Mapping[int, int]
    left: tuple[str, ...]
    unused: tuple[str, ...]
    rounded: tuple[str, ...]
    notes: tuple[str, ...]
    tied: tuple[tuple[LogicalTensor, LogicalTensor], ...] = ()


@dataclass
class _Findings:
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    spared: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tied: list[tuple[LogicalTensor, LogicalTensor]] = field(default_factory=list)
    lacking: dict[str, list[str]] = field(default_factory=dict)
    unplaced: dict[str, list[str]] = field(default_factory=dict)

    def lacks(self, member: Member, state: str, allowed: bool) -> None:
        """The checkpoint has no such state of a parameter."""
        if allowed:
            self.left.append(f"{member.name}:{state}")
        else:
            self.lacking.setdefault(state, []).append(f"'{member.name}' {list(member.shape)}")

    def leaves(self, member: Member, state: str, allowed: bool) -> None:
        """The live optimizer has no place for a state of a parameter."""
        if allowed:
            self.spared.append(f"{member.name}:{state}")
        else:
            self.unplaced.setdefault(state, []).append(f"'{member.name}' {list(member.shape)}")


def plan(catalog: Catalog, target: Target, wish: Wish) -> Plan:
    """The plan of a load, or Mismatch with a list of all that does not fit. Changes nothing, talks to nobody."""
    found = _Findings()
    names = match(catalog, [*(m.name for s in target.slots for m in s.members), *target.elsewhere])
    _without_other_padding(catalog, target, names, found)
    wants: dict[tuple[int, str, str], list[Want]] = {}
    rounded: list[str] = []
    scalars: dict[int, dict[str, Any]] = {}
    restore_states = wish.optimizer and not wish.weights_only
    for slot in target.slots:
        _weights(catalog, slot, names, wish, found, wants, rounded)
        if slot.kind == "parameter" and restore_states:
            _states(catalog, target, slot, names, wish, found, wants, scalars)
    if restore_states and not wish.strict:
        _some_trained(target, names, wish, found)
    _unused(catalog, target, names, wish, found, restore_states)
    options: dict[int, Mapping[str, Any]] = {}
    sources: dict[int, int] = {}
    if restore_states:
        options, sources = _options(catalog, target, names, found)
    _refuse(catalog, target, found)
    return Plan(
        wants,
        scalars,
        options,
        sources,
        tuple(found.left),
        tuple(found.spared),
        tuple(rounded),
        tuple(dict.fromkeys(found.notes)),
        tuple(found.tied),
    )


def _without_other_padding(catalog: Catalog, target: Target, names: dict[str, str], found: _Findings) -> None:
    """Leave out padding that is not as wide in the checkpoint as here: it is no part of the parameter."""
    for slot in target.slots:
        for member in slot.members:
            source = catalog.parameters.get(names.get(member.name, ""))
            if member.padding and (source is None or source.shape != member.shape):
                names.pop(member.name, None)
                found.notes.append(f"{member.name} {list(member.shape)} stays as it is: the checkpoint's is another")


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
            if member.padding or not wish.strict or _allowed(member.name, None, wish.allow_missing):
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
            if slot.kind == "parameter" or (tensor.dtype, dtype) not in ROUNDED:
                found.wrong.append(
                    f"{what} is {tensor.dtype} in the checkpoint and {dtype} here, which would lose bits"
                )
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
    """The optimizer states of one slot, which has the same ones for all of its members, and one value of 'step'."""
    members = [(m, catalog.parameters[names[m.name]]) for m in slot.members if m.name in names]
    if not members:
        return
    kept = {m.name: set(info.states) - {"param"} for m, info in members}
    brought = set().union(*kept.values())
    if not brought and _steps_taken(catalog) == 0:
        scalars[slot.key] = {}
        return
    group = target.groups[slot.group] if slot.group is not None else None
    if group is None or group.expects is None:
        expects = brought
        found.notes.append(f"the optimizer's states are not known beforehand; it is given {sorted(brought)}")
    else:
        expects = set(group.expects)
    for member, _ in members:
        for state in sorted(expects - kept[member.name]):
            found.lacks(member, state, _allowed(member.name, state, wish.allow_missing))
        for state in sorted(kept[member.name] - expects):
            found.leaves(member, state, _allowed(member.name, state, wish.allow_unused))
    values = _common_values([(m, info) for m, info in members if kept[m.name] or info.scalars], found)
    if group is not None and group.values is not None:
        values = {k: v for k, v in values.items() if k in group.values}
        if brought & expects:
            for value in sorted(group.values - set(values)):
                for member, _ in members:
                    found.lacks(member, value, _allowed(member.name, value, wish.allow_missing))
    if not (brought & expects or values):
        return
    scalars[slot.key] = values
    places = {state: dict(zip(slot.members, slot.placement(state).blocks, strict=True)) for state in expects}
    for state in sorted(expects):
        dtype = slot.states.get(state, slot.dtype)
        # A state that nobody brings (by the caller's leave) stays, or starts from zero where there is none yet.
        of_state = wants.setdefault((slot.key, state, dtype), [])
        for member, info in members:
            if state not in kept[member.name]:
                continue
            tensor = catalog.tensors[info.name, state]
            if tensor.dtype != dtype and (tensor.dtype, dtype) not in EXACT:
                found.wrong.append(
                    f"optimizer state '{state}' of '{member.name}' is {tensor.dtype} in the checkpoint and {dtype} "
                    "here, which would lose bits"
                )
                return
            of_state.append(Want(tensor, places[state][member], dtype))


def _common_values(members: Sequence[tuple[Member, ParameterInfo]], found: _Findings) -> dict[str, Any]:
    """The values (such as 'step') that all of a slot's members have."""
    if not members:
        return {}
    first, values = members[0][0], dict(members[0][1].scalars)
    for member, info in members[1:]:
        if dict(info.scalars) != values:
            found.wrong.append(
                f"'{member.name}' has {_values(info.scalars)} and '{first.name}' {_values(values)}, but one flat "
                "buffer has one value here"
            )
            break
    return values


def _steps_taken(catalog: Catalog) -> int | None:
    state = catalog.training_state
    return None if state.global_steps is None else state.global_steps - (state.skipped_steps or 0)


def _trained(target: Target) -> set[str]:
    """The parameters that are trained here, on any rank."""
    trained = {m.name for s in target.slots if s.kind == "parameter" for m in s.members}
    return trained | {name for name, kind in target.elsewhere.items() if kind == "parameter"}


def _some_trained(target: Target, names: Mapping[str, str], wish: Wish, found: _Findings) -> None:
    """Without strictness some names may be missing; where all that are trained are, it is no resume."""
    trained = sorted(_trained(target))
    if trained and not any(n in names or _allowed(n, None, wish.allow_missing) for n in trained):
        found.wrong.append(
            f"none of the {len(trained)} parameters trained here ('{trained[0]}', …) is in the checkpoint, not even "
            "load_module_strict=False resumes from that (load_module_only=True takes the weights that are)"
        )


def _unused(
    catalog: Catalog,
    target: Target,
    names: Mapping[str, str],
    wish: Wish,
    found: _Findings,
    restore_states: bool,
) -> None:
    used = set(names.values())
    trained = _trained(target)
    owners = _owners(catalog, target, names)
    for info in catalog.parameters.values():
        if info.name in used:
            continue
        if info.name in owners and wish.strict and not _allowed(info.name, None, wish.allow_unused):
            _same_as_owner(catalog, info, catalog.parameters[owners[info.name]], restore_states, found)
        elif info.kind == "padding" or not wish.strict or _allowed(info.name, None, wish.allow_unused):
            found.spared.append(info.name)
        else:
            found.unused.append(
                f"{'buffer' if info.kind == 'buffer' else 'parameter'} '{info.name}' {list(info.shape)}"
            )
    if not restore_states:
        return
    for live, source in names.items():
        states = set(catalog.parameters[source].states) - {"param"}
        if live not in trained:
            for state in sorted(states):
                if _allowed(live, state, wish.allow_unused):
                    found.spared.append(f"{live}:{state}")
                else:
                    found.unused.append(f"optimizer state '{state}' of '{live}', which is not trained here")


def _owners(catalog: Catalog, target: Target, names: Mapping[str, str]) -> dict[str, str]:
    """The checkpoint's parameters that are other names of a tied one here -> the one that is restored.

    torch's state dicts have a tied parameter under each of its names, and so have the checkpoints that keep them.
    """
    tied = {alias: owner for alias, owner in target.tied.items() if owner in names}
    return {
        source: names[tied[alias]] for alias, source in match(catalog, tied).items() if source not in names.values()
    }


def _same_as_owner(
    catalog: Catalog, info: ParameterInfo, owner: ParameterInfo, restore_states: bool, found: _Findings
) -> None:
    """What the checkpoint has under a tied parameter's other name has to be what it has under the one that is read."""
    for state in sorted(info.states):
        if state != "param" and not restore_states:
            continue
        one, other = catalog.tensors[info.name, state], catalog.tensors.get((owner.name, state))
        if other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
            has = "it has none" if other is None else f"it has {other.dtype} {list(other.shape)}"
            found.wrong.append(
                f"'{info.name}' ({state}, {one.dtype} {list(one.shape)}) is tied to '{owner.name}' here, and {has} in "
                "the checkpoint"
            )
        else:
            found.tied.append((one, other))
    if restore_states and info.scalars and dict(info.scalars) != dict(owner.scalars):
        found.wrong.append(
            f"'{info.name}' is tied to '{owner.name}' here, and they have {_values(info.scalars)} and "
            f"{_values(owner.scalars)} in the checkpoint"
        )


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
            differing = sorted(
                k for k in {*(kept[0] or {}), *(other or {})} if (kept[0] or {}).get(k) != (other or {}).get(k)
            )
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
    for listed, by_state, text in (
        (found.missing, found.lacking, "would stay unrestored"),
        (found.unused, found.unplaced, "of the checkpoint would stay unused"),
    ):
        count = len(listed) + sum(map(len, by_state.values()))
        if count:
            parts.append(f"{count} {text}: {_list([*listed, *_by_state(by_state)])}")
    if parts:
        raise Mismatch(
            f"nothing was loaded: the checkpoint ({catalog.layout}) and the engine ({target.layout}) do not match; "
            + "; ".join(parts)
            + '; to load all the same, name them in "ucp": {"load": {"allow_missing": [...], "allow_unused": [...]}}'
        )


def _by_state(found: Mapping[str, Sequence[str]]) -> list[str]:
    """One item for each state, however many parameters it is of."""
    out = []
    for state, names in found.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        out.append(f"optimizer state '{state}' of {', '.join(names[:3])}{more}")
    return out


def _list(items: Sequence[str]) -> str:
    return ", ".join(items[:SHOWN]) + (f", and {len(items) - SHOWN} more" if len(items) > SHOWN else "")
