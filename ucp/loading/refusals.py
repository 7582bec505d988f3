"""Why a checkpoint does not fit a target, and the one sentence that says so in the target's own words."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ucp import limits
from ucp.catalog import LogicalTensor
from ucp.errors import Mismatch
from ucp.geometry import Shape
from ucp.units import counted

PARAM = "param"
VALUE = "value"
"""In the place of a state: a value that belongs to no parameter."""


@dataclass(frozen=True)
class Item:
    """A weight, an optimizer state or a single value, of the live side or of the checkpoint.

    kind: as in slots. state: 'param' for the weight. note: what to say after its name.
    """

    kind: str
    name: str
    shape: Shape
    state: str = PARAM
    note: str = ""


@dataclass(frozen=True)
class Words:
    """How messages speak of a target. A target with other words derives a class of its own.

    whole: what is filled. allow: how a caller says what may be left. unstrict: what to add if not even a load without
    strictness can resume. alone: how a caller loads weights without an optimizer's states. declare: how a
    caller declares what was changed on purpose, with ``%s`` for what is declared; "" where that is not possible. anew:
    what to do if a load failed half-way.
    """

    whole: str
    allow: str
    unstrict: str = ""
    alone: str = ""
    declare: str = ""
    anew: str = "load again, or make it anew"

    unrestored = "would stay unrestored"

    def opening(self, checkpoint: object, here: object) -> str:
        """How a refusal begins. checkpoint, here: the layouts."""
        return f"nothing was loaded: the checkpoint ({checkpoint}) and {self.whole} ({here}) do not match"

    def partly(self, path: str, why: str) -> str:
        """What to say if a load failed when it had begun to change the target. why: what went wrong."""
        start = f"{path}: " if path else ""
        return (
            f"{start}the load failed when it had begun to change {self.whole}: {why}; {self.whole} now has old values "
            f"and new ones and is not to be trained on or saved; {self.anew}"
        )

    def advice(self, missing: Sequence[str], unused: Sequence[str]) -> str:
        """How a refusal ends. missing, unused: patterns that would allow what it lists (`patterns`)."""
        return f"to load all the same, name them in {self.allow}"

    def label(self, name: str, state: str) -> str:
        """A weight or state in one word, for reports."""
        return named(name, state)

    def spellings(self, name: str, state: str) -> Sequence[str]:
        """The names by which a caller's pattern may match it. A parameter's name also matches its states."""
        return tuple(dict.fromkeys((name, named(name, state))))

    def live(self, item: Item) -> str:
        """An item of the target, in words."""
        if item.state != PARAM:
            return f"optimizer state '{item.state}' of '{item.name}'{item.note}"
        return f"{'buffer' if item.kind == 'buffer' else 'parameter'} '{item.name}' {list(item.shape)}{item.note}"

    def saved(self, item: Item) -> str:
        """An item of the checkpoint, in words."""
        return self.live(item)

    def missing(self, items: Sequence[Item]) -> list[str]:
        """The target's items that the checkpoint lacks, in words. A state of several parameters is one entry."""
        return _by_state(items, self.live)

    def otherwise(self, item: Item) -> str | None:
        """A refusal, if the checkpoint has the item in another form that cannot be restored; else None."""
        return None

    def unused(self, items: Sequence[Item]) -> list[str]:
        """The checkpoint's items that have no place in the target, in words."""
        return _by_state(items, self.saved)

    def other_shape(self, item: Item, found: Shape) -> str:
        return f"{self.live(item)} has shape {list(found)} in the checkpoint"

    def other_options(self, group: int, option: str, origins: Sequence[int], values: Sequence[Any]) -> str:
        """A param group holds parameters from several of the checkpoint's groups, which do not agree."""
        listed, last = ", ".join(map(str, origins[:-1])), origins[-1]
        shown = " and ".join(map(repr, values))
        return (
            f"param group {group} here holds parameters of the checkpoint's groups {listed} and {last}, whose "
            f"'{option}' differ ({shown})"
        )

    def option(self, group: int, option: str) -> str | None:
        """A hyperparameter in one word, for reports. None if reports do not list them one by one."""
        return None

    def not_held(self, what: str, value: Any, dtype: str) -> str:
        return f"{what} is the value {value!r} in the checkpoint, which torch.{dtype} does not hold"

    def value_of(self, item: Item) -> str:
        """A single value that an optimizer keeps for a parameter, in words."""
        return f"'{item.state}' of '{item.name}'"

    def option_of(self, group: int, option: str) -> str:
        """A hyperparameter, in words."""
        return f"'{option}' of param group {group}"

    def tied_differ(self, name: str, owner: str, states: str) -> str:
        """The checkpoint has different values under two names that are one parameter here."""
        return (
            f"nothing was loaded: '{name}' is tied to '{owner}' here, and the checkpoint has different values for them "
            f"({states}); to load '{owner}' alone, name '{name}' in {self.allow}"
        )


# Which optimizers keep just these states for a parameter.
_OPTIMIZERS = {
    frozenset(("exp_avg", "exp_avg_sq")): "Adam's",
    frozenset(("exp_avg",)): "Lion's",
    frozenset(("momentum_buffer",)): "SGD's with momentum",
    frozenset(("sum",)): "Adagrad's",
    frozenset(("square_avg",)): "RMSprop's",
}

_OF_8_BITS = {"state1", "state2"}  # bitsandbytes' AdamW8bit


def named(name: str, state: str) -> str:
    """A weight, a state (``name:state``) or a value, in one word."""
    return name if state in (PARAM, VALUE) else f"{name}:{state}"


def patterns(items: Sequence[Item]) -> list[str]:
    """What a caller would say to allow just these: names, and states of several parameters together (``*:state``)."""
    found = Counter(item.state for item in items)
    alike = {state for state, count in found.items() if count > 1 and state not in (PARAM, VALUE)}
    return list(dict.fromkeys(f"*:{i.state}" if i.state in alike else literal(named(i.name, i.state)) for i in items))


def few(names: Sequence[str]) -> str:
    """The first of these as a list that a caller would write, and an ellipsis for more."""
    return f"[{', '.join([*map(json.dumps, names[:3]), *(['...'] if len(names) > 3 else [])])}]"


def literal(name: str) -> str:
    """The pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _by_state(items: Sequence[Item], single: Any) -> list[str]:
    out = [single(item) for item in items if item.state == PARAM or item.note]
    by_state: dict[str, list[str]] = {}
    for item in items:
        if item.state != PARAM and not item.note:
            by_state.setdefault(item.state, []).append(f"'{item.name}' {list(item.shape)}")
    shown = max(1, min(3, limits.REFUSAL_ITEMS_COUNT // max(1, len(by_state))))
    for state, names in by_state.items():
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        out.append(f"optimizer state '{state}' of {', '.join(names[:shown])}{more}")
    return out


def _states(items: Sequence[Item]) -> list[str]:
    """States without their parameters' names, which say no more where the cause is said."""
    found = Counter(item.state for item in items)
    return [f"optimizer state '{state}' of {counted(count, 'parameter')}" for state, count in found.items()]


@dataclass
class Findings:
    """What a comparison has found so far. missing, unused, wrong: what a refusal lists. left, spared: what stays as it
    is and what is not read, since the caller allows it. tied: pairs that have to be equal. notes: what else to log.
    changes: part of a declaration of changes -> what in it would make this fit."""

    words: Words
    missing: list[Item] = field(default_factory=list)
    unused: list[Item] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    spared: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tied: list[tuple[LogicalTensor, LogicalTensor]] = field(default_factory=list)
    changes: dict[str, dict[str, str]] = field(default_factory=dict)

    def changed(self, part: str, name: str, value: str = "") -> None:
        """Note that the model may have been changed here: what a caller would declare (`ucp.spec.changes`)."""
        self.changes.setdefault(part, {})[name] = value

    def lacks(self, item: Item, allowed: bool) -> None:
        """Note that the checkpoint lacks an item of the target."""
        if allowed:
            self.left.append(self.words.label(item.name, item.state))
        elif (otherwise := self.words.otherwise(item)) is not None:
            self.wrong.append(otherwise)
        else:
            self.missing.append(item)

    def leaves(self, item: Item, allowed: bool) -> None:
        """Note that the target has no place for an item of the checkpoint."""
        if allowed:
            self.spared.append(named(item.name, item.state))
        else:
            self.unused.append(item)

    def cause(self, kept: Collection[str]) -> str:
        """Why states are missing, if one reason explains them: the checkpoint has another optimizer's, or none at all.
        kept: the names of all states that the checkpoint has. An empty text if no such reason is known."""
        lacking = [item for item in self.missing if item.state not in (PARAM, VALUE)]
        spare = [item for item in self.unused if item.state not in (PARAM, VALUE)]
        wanted = sorted({item.state for item in lacking} - {"step"})
        has, whose = ", ".join(sorted(kept)), _OPTIMIZERS.get(frozenset(kept))
        said = f"the checkpoint has {has}" if whose is None else f"the checkpoint is {whose} ({has})"
        wants = f"wants {', '.join(wanted)}"
        if wanted and not kept:
            said = "the checkpoint has no optimizer's states"
        elif not wanted and kept and len(spare) == len(self.unused) and {item.state for item in spare} == set(kept):
            wants = "keeps none of that"
        elif not wanted or not {item.name for item in lacking} & {item.name for item in spare}:
            return ""
        alone = f"; {self.words.alone}" if self.words.alone else ""
        if self.words.declare and set(kept) == _OF_8_BITS and wanted == ["exp_avg", "exp_avg_sq"]:
            alone += "; for float32 states: " + self.words.declare % '{"states": "dequantised"}'
        return f"{said}, and the optimizer here {wants}{alone}"

    def refuse(self, checkpoint: object, here: object, kept: Collection[str] = ()) -> None:
        """Raise Mismatch if anything does not fit. checkpoint, here: the layouts. kept: as for `cause`."""
        parts = [text] if (text := self.cause(kept)) else []
        if self.wrong:
            fit = "does" if len(self.wrong) == 1 else "do"
            parts.append(f"{len(self.wrong)} {fit} not fit: {listed(self.wrong)}")
        if self.missing:
            parts.append(f"{len(self.missing)} {self.words.unrestored}: {listed(self.words.missing(self.missing))}")
        if self.unused:
            many = text and len(self.missing) + len(self.unused) > limits.REFUSAL_ITEMS_COUNT
            states = [item for item in self.unused if many and item.state not in (PARAM, VALUE)]
            others = [item for item in self.unused if item not in states]
            told = [*self.words.unused(others), *_states(states)]
            parts.append(f"{len(self.unused)} of the checkpoint would stay unused: {listed(told)}")
        # What does not fit is refused whatever names are allowed.
        if (self.missing or self.unused) and not self.wrong:
            parts.append(self.words.advice(patterns(self.missing), patterns(self.unused)))
        # The advice already says how to load what was added alone, or removed alone.
        if parts and self.words.declare and (len(self.changes) > 1 or self.changes.keys() - {"added", "removed"}):
            parts.append(f"if the model was changed on purpose, declare it: {self.words.declare % self._declaration()}")
        if parts:
            raise Mismatch("; ".join([self.words.opening(checkpoint, here), *parts]))

    def _declaration(self) -> str:
        """What a caller would declare, as JSON; long lists are cut short."""
        changes = dict(self.changes)
        here, there = changes.get("added", {}), changes.get("removed", {})
        if here and len(here) == len(there):  # as many: rather other names than other parameters
            changes = {"names": dict(zip(here, there, strict=True)), **changes}
            del changes["added"], changes["removed"]
        parts = []
        for part, found in changes.items():
            pairs = [
                json.dumps(name) + (f": {json.dumps(value)}" if value else "")
                for name, value in list(found.items())[:3]
            ]
            pairs += ["..."] if len(found) > 3 else []
            inside = ", ".join(pairs)
            parts.append(f'"{part}": ' + (f"{{{inside}}}" if any(found.values()) else f"[{inside}]"))
        return f"{{{', '.join(parts)}}}"


def listed(items: Sequence[str]) -> str:
    """The first items, and how many more there are."""
    return ", ".join(items[: limits.REFUSAL_ITEMS_COUNT]) + (
        f", and {len(items) - limits.REFUSAL_ITEMS_COUNT} more" if len(items) > limits.REFUSAL_ITEMS_COUNT else ""
    )


def allowed(spellings: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether any of these names matches one of the patterns, which are a shell's."""
    return any(fnmatchcase(name, pattern) for name in spellings for pattern in patterns)


def values_text(scalars: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in sorted(scalars.items())) or "no values"
