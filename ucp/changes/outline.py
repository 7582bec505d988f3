"""The changed model as it is live: what a declaration leaves to it, such as the new shape of a vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ucp.catalog import bare
from ucp.geometry import Shape
from ucp.job import ranks
from ucp.loading.target import Slot, Target, kept_for

PARAM = "param"


@dataclass(frozen=True)
class LiveParameter:
    """A parameter or buffer of the live model.

    kind: as in slots. states: optimizer states of its shape -> element type; None if the optimizer does not tell.
    values: names of single values that the optimizer keeps for it. together: names of parameters that share one buffer
    of the optimizer with it, and so its single values. dtype: of the most precise weights held; None if not known.
    """

    name: str
    shape: Shape
    kind: str
    states: Mapping[str, str] | None = None
    values: frozenset[str] = frozenset()
    together: tuple[str, ...] = ()
    dtype: str | None = None


@dataclass(frozen=True)
class Outline:
    """The live model's parameters by name, from all ranks. quantises: whether the live optimizer quantises float32
    states once they are there; False if it has the checkpoint's own blocks, None if that is not known."""

    parameters: Mapping[str, LiveParameter] = field(default_factory=dict)
    quantises: bool | None = None

    @property
    def names(self) -> Collection[str]:
        return self.parameters.keys()

    def find(self, name: str) -> LiveParameter | None:
        """The live parameter of this name, whatever wrappers put into it."""
        found = self.parameters.get(name)
        return found if found is not None else self._bare.get(bare(name))

    @cached_property
    def _bare(self) -> dict[str, LiveParameter]:
        return {bare(name): parameter for name, parameter in self.parameters.items()}


def outline_of(target: Target) -> Outline:
    """What one rank knows of the live model."""
    out: dict[str, LiveParameter] = {}
    for slot in target.slots:
        states, values = _kept(target, slot)
        members = [member for member in slot.members if not member.padding]
        together = tuple(m.name for m in members) if len(members) > 1 else ()
        for member in members:
            out[member.name] = LiveParameter(member.name, member.shape, slot.kind, states, values, together, slot.dtype)
    return Outline(out)


def _kept(target: Target, slot: Slot) -> tuple[Mapping[str, str] | None, frozenset[str]]:
    """What the optimizer keeps for the parameters of a slot: states -> element type, and names of single values."""
    if slot.kind != "parameter":
        return {}, frozenset()
    if slot.asked is not None:
        states = {s: slot.states.get(s, slot.dtype) for s in slot.asked.states - {PARAM}}
        return states, frozenset(slot.asked.values)
    tensors, values = kept_for(slot, target.groups)
    if tensors is None:
        return None, frozenset()
    return {s: slot.states.get(s, slot.dtype) for s in tensors}, values or frozenset()


def of_all_ranks(outline: Outline) -> Outline:
    """What all ranks know together. Collective."""
    said, _ = ranks.distinct(outline)
    merged: dict[str, LiveParameter] = {}
    for one in said:
        merged.update({name: found for name, found in one.parameters.items() if name not in merged})
    return Outline(merged)
