"""What refusals and reports of a state dict's load call its entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ucp.formats.shared.roles import PARAM
from ucp.geometry import Shape
from ucp.job import ranks
from ucp.loading.refusals import VALUE, Item, Words, named


@dataclass(frozen=True)
class StateDictWords(Words):
    """Entries are called by their flat names, as the caller's state dict has them.

    begins: the first words of a refusal. apart: what to do if two entries are one tensor here and two in the
    checkpoint. prefixes: those of the flat names of weights and of optimizer states; None if patterns with them mean
    only what is asked for by such names. path: the checkpoint's. keys: (name, state) -> flat name. options: (group,
    option) -> flat name. nested: flat name of an empty list here -> flat names of its entries in the checkpoint. own:
    flat name -> how many ranks have saved values of their own.
    """

    whole: str = "the state dict"
    allow: str = "allow_missing=[...] leaves what is missing as it is"
    anew: str = "load again, or fill its tensors anew"
    begins: str = "nothing was loaded"
    apart: str = "leave one of them out of the state dict"
    prefixes: tuple[str, str] | None = None
    path: str = ""
    keys: Mapping[tuple[str, str], str] = field(default_factory=dict)
    options: Mapping[tuple[int, str], str] = field(default_factory=dict)
    nested: Mapping[str, Sequence[str]] = field(default_factory=dict)
    own: Mapping[str, int] = field(default_factory=dict)

    unrestored = "are not in the checkpoint"

    def opening(self, checkpoint: object, here: object) -> str:
        return f"{self.path}: {self.begins}, since what is asked for is not what the checkpoint has"

    def advice(self, missing: Sequence[str], unused: Sequence[str]) -> str:
        return self.allow

    def label(self, name: str, state: str) -> str:
        return self.keys.get((name, state)) or named(name, state)

    def spellings(self, name: str, state: str) -> Sequence[str]:
        out = (self.label(name, state), *super().spellings(name, state))
        if self.prefixes is None or state == VALUE:
            return out
        return (*out, f"{self.prefixes[0]}{name}" if state == PARAM else f"{self.prefixes[1]}{name}.{state}")

    def live(self, item: Item) -> str:
        return f"'{self.label(item.name, item.state)}'{item.note}"

    def saved(self, item: Item) -> str:
        return f"{named(item.name, item.state)}{item.note}"

    def missing(self, items: Sequence[Item]) -> list[str]:
        return [f"{self.live(item)}{self._why(self.label(item.name, item.state))}" for item in items]

    def otherwise(self, item: Item) -> str | None:
        entries = self.nested.get(self.label(item.name, item.state))
        if entries is None:
            return None
        return f"{self.live(item)} is empty here and filled in the checkpoint ('{entries[0]}', …)"

    def _why(self, key: str) -> str:
        if key not in self.own:
            return ""
        return f" (each of {self.own[key]} ranks has its own, and {ranks.world_size()} load)"

    def unused(self, items: Sequence[Item]) -> list[str]:
        return sorted(map(self.saved, items))

    def other_shape(self, item: Item, found: Shape) -> str:
        return f"{self.live(item)} is {list(found)} in the checkpoint and {list(item.shape)} here"

    def other_options(self, group: int, option: str, origins: Sequence[int], values: Sequence[Any]) -> str:
        shown = ", ".join(map(repr, values))
        what = self.option_of(group, option)
        return f"{what} is for parameters of the checkpoint's groups {list(origins)}, which have {shown}"

    def option(self, group: int, option: str) -> str | None:
        return self.options[group, option]

    def value_of(self, item: Item) -> str:
        return self.live(item)

    def option_of(self, group: int, option: str) -> str:
        return f"'{self.options[group, option]}'"

    def tied_differ(self, name: str, owner: str, states: str) -> str:
        one, other = self.label(name, PARAM), self.label(owner, PARAM)
        return (
            f"{self.path}: {self.begins}: '{one}' and '{other}' are one tensor here, and the checkpoint has "
            f"different values for them ({states}); {self.apart}"
        )
