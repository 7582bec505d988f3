"""A state dict of torch.distributed as a target: its tensors by name, filled where they are.

Optimizer states and hyperparameters are found by the parameters' names, so that neither the order of param groups nor
the framework that saved them matters. What a name means also depends on the checkpoint. A tensor that belongs to no
parameter is stored under its flat name, and a rank's own values are stored beside the tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ucp.catalog import Catalog, TrainingState
from ucp.errors import Unsupported
from ucp.formats.shared.roles import PARAM, VALUES, Roles, StateEntry, assign
from ucp.geometry import Blocks, Shape, empty, numel
from ucp.job import ranks
from ucp.loading.name_match import match
from ucp.loading.options import OWN_OPTIONS, own_values, shared_values
from ucp.loading.refusals import VALUE, Item, Words, named
from ucp.loading.target import Asked, Group, Loaded, Member, Placement, Slot, Weights
from ucp.parallel.mesh import Layout
from ucp.storage.dtypes import from_torch
from ucp.torchdist.dtensors import blocks_of, holders_of, layout_of, local_tensor
from ucp.torchdist.state_dicts import put, storage_key


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


_OF_WEIGHTS = Asked(frozenset({PARAM}))
_NONE: Mapping[str, Any] = {}


@dataclass(slots=True)
class _OfName:
    """What is asked for under one name: state -> flat name, for tensors and for single values."""

    tensors: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)


class StateDictTarget:
    """The entries of a state dict on one rank.

    filled: after `apply`, the flat names of the tensors that have been filled. values: flat name -> new value, for
    entries that are no tensors; `put_values` sets them.
    """

    copies = True
    keeps_memory = False
    elsewhere: Mapping[str, str] = {}

    def __init__(
        self,
        path: str,
        entries: Mapping[str, StateEntry],
        catalog: Catalog,
        *,
        only: Collection[str] | None = None,
        roles: Roles | None = None,
        unseen: Collection[str] = (),
        blank: bool = False,
        words: StateDictWords | None = None,
    ) -> None:
        """Ask for the entries, as `state_dicts.flatten` gives them. Does not communicate.

        path, catalog: the checkpoint's. The tensors of its training state are real ones. only: flat names of what is
        asked for; None for all. roles: the entries', if they are known. unseen: flat names of tensors that are thrown
        away if the load fails, so that they are read into directly. blank: the elements of unseen tensors mean nothing
        yet, so none may stay as it is. words: the words of refusals, without the names.

        Raises Unsupported for unknown kinds of shards, and for two entries that see the same memory in two ways.
        """
        self._entries = entries
        self._catalog = catalog
        self._unseen = frozenset(unseen)
        self._blank = blank
        self._world = ranks.world_size()
        self._keys: dict[tuple[str, str], str] = {}
        self._options: dict[tuple[int, str], str] = {}
        self.filled: set[str] = set()
        self.values: dict[str, Any] = {}
        self.named: dict[str, Any] = {}
        self._entry_of: dict[tuple[int, str], str] = {}  # (slot key, state) -> flat name
        self._memory: dict[tuple[int, str], torch.Tensor] = {}  # the same, for tensors -> what lies there
        self._alike_places: dict[Any, _Place] = {}
        roles = assign(entries, complete=False) if roles is None else roles
        asked = self._take(roles, entries.keys() if only is None else only)
        self.tied: Mapping[str, str] = self._untie(asked, roles)
        self.groups: Sequence[Group] = self._groups(roles, entries.keys() if only is None else only)
        with torch.no_grad():  # once for all tensors, not for each
            self.slots: Sequence[Slot] = self._slots(asked)
        saved = catalog.training_state.extra.get("ranks", ())
        own = {key: len(saved) for values in saved for key in values.get(VALUES, {})}
        self.words: Words = replace(
            words or StateDictWords(),
            path=path,
            keys=self._keys,
            options=self._options,
            nested=self._filled_there(),
            own=own,
        )

    # --- what is asked for ---

    def _take(self, roles: Roles, only: Collection[str]) -> dict[str, _OfName]:
        """The tensors and single values by name. Also fills ``named``."""
        catalog = self._catalog
        own, shared = own_values(catalog), shared_values(catalog)
        asked = {**roles.tensors, **roles.scalars}
        names = match(catalog, [name for name, _ in asked.values()], copies=True)
        out: dict[str, _OfName] = {}
        for key, (name, state) in asked.items():
            if key not in only:
                continue
            is_tensor = self._entries[key].shape is not None
            source = names.get(name)
            if source is not None and is_tensor and (source, state) in catalog.tensors:
                out.setdefault(name, _OfName()).tensors[state] = key
            elif source is not None and state in catalog.parameters[source].scalars and self._is_single(key):
                out.setdefault(name, _OfName()).values[state] = key
            elif is_tensor and isinstance(own.get(key), torch.Tensor):
                self.named[key] = local_tensor(self._entries[key].value)
                continue
            elif is_tensor and (key, PARAM) in catalog.tensors:
                name, state = key, PARAM
                out.setdefault(name, _OfName()).tensors[state] = key
            elif not is_tensor and key in shared:
                self.named[key] = self._entries[key].value
                continue
            elif is_tensor and key in roles.tensors:
                out.setdefault(name, _OfName()).tensors[state] = key
            else:
                out.setdefault(name, _OfName()).values[state] = key
            self._keys[name, state] = key
        self.named.update((key, self._entries[key].value) for key in roles.values if key in only)
        return out

    def _filled_there(self) -> dict[str, list[str]]:
        """Lists that are empty here and hold tensors or mappings in the checkpoint -> their entries there."""
        empty_here = {key for key, e in self._entries.items() if isinstance(e.value, (list, tuple)) and not e.value}
        out: dict[str, list[str]] = {}
        for name in (*self._catalog.parameters, *shared_values(self._catalog)) if empty_here else ():
            head = name
            while head := head.rpartition(".")[0]:
                if head in empty_here:
                    out.setdefault(head, []).append(name)
        return out

    def _is_single(self, key: str) -> bool:
        shape = self._entries[key].shape
        return shape is None or numel(shape) == 1

    def _untie(self, asked: dict[str, _OfName], roles: Roles) -> dict[str, str]:
        """Remove all names but one of tensors that are one memory. Returns removed name -> name that stays. A name that
        the checkpoint has is preferred."""
        if self._lie_apart(asked):
            return {}
        same: dict[Any, list[str]] = {}
        views: dict[tuple[int, int], Any] = {}
        for name, found in asked.items():
            key = found.tensors.get(PARAM)
            memory = None if key is None else storage_key(self._entries[key].value)
            if key is None or memory is None:
                continue
            same.setdefault(memory, []).append(name)
            local = local_tensor(self._entries[key].value)
            if local.numel() and views.setdefault((local.data_ptr(), local.nbytes), memory) != memory:
                other = self._keys[same[views[local.data_ptr(), local.nbytes]][0], PARAM]
                raise Unsupported(
                    f"'{other}' and '{key}' of the state dict are one memory seen in two ways; leave one of them out"
                )
        out: dict[str, str] = {}
        for together in same.values():
            if len(together) > 1:
                known = match(self._catalog, together, copies=True)
                owner, *others = sorted(together, key=lambda name: (name not in known, name not in roles.trained))
                for name in others:
                    out[name] = owner
                    del asked[name].tensors[PARAM]
                    if not asked[name].tensors and not asked[name].values:
                        del asked[name]
        return out

    def _lie_apart(self, asked: Mapping[str, _OfName]) -> bool:
        """Whether no two of the weights begin at one address. Those without memory here can't tell."""
        weights = [key for found in asked.values() if (key := found.tensors.get(PARAM)) is not None]
        begins = {local_tensor(self._entries[key].value).data_ptr() for key in weights}
        return 0 not in begins and len(begins) == len(weights)

    def _groups(self, roles: Roles, only: Collection[str]) -> list[Group]:
        options: dict[str, dict[str, Any]] = {group: {} for group in roles.groups}
        order = {group: index for index, group in enumerate(roles.groups)}
        for key, (group, option) in roles.options.items():
            if option not in OWN_OPTIONS and key in only:
                value = self._entries[key].value
                options[group][option] = local_tensor(value) if isinstance(value, torch.Tensor) else value
                self._options[order[group], option] = key
        return [Group(names, options[group], None, takes=frozenset()) for group, names in roles.groups.items()]

    def _slots(self, asked: Mapping[str, _OfName]) -> list[Slot]:
        entries, none = self._entries, _NONE
        out = []
        for key, (name, found) in enumerate(asked.items()):
            for state, entry in found.tensors.items():
                self._entry_of[key, state] = entry
                self._memory[key, state] = local_tensor(entries[entry].value)
            for state, entry in found.values.items():
                self._entry_of[key, state] = entry
            if len(found.tensors) != 1 or found.values or self._blank or PARAM not in found.tensors:
                out.append(self._slot(key, name, found))
                continue
            place = self._place(found.tensors[PARAM])  # the usual case
            members = (Member(name, place.shape, place.blocks),)
            length, dtype, holders = place.length, place.dtype, place.holders
            out.append(Slot(key, "parameter", length, dtype, members, None, none, none, holders, _OF_WEIGHTS))
        return out

    def _slot(self, key: int, name: str, asked: _OfName) -> Slot:
        places = {state: self._place(entry) for state, entry in asked.tensors.items()}
        blank = frozenset[str]()
        if self._blank:
            every = {**asked.tensors, **asked.values}
            blank = frozenset(state for state, entry in every.items() if entry in self._unseen)
        values = {state: self._dtype(entry) for state, entry in asked.values.items()}
        wanted = Asked(frozenset(places), values, blank)
        base = places.get(PARAM) or next(iter(places.values()), None)
        if base is None:
            return Slot(key, "parameter", 0, "", (Member(name, (), empty(0)),), asked=wanted)
        member = Member(name, base.shape, base.blocks)
        states = {state: place.dtype for state, place in places.items() if state != PARAM}
        placed = {
            state: Placement(place.length, (place.blocks,), (place.holders,), place.shape)
            for state, place in places.items()
            if place is not base and not place.lies_as(base)
        }
        return Slot(
            key, "parameter", base.length, base.dtype, (member,), None, states, placed, base.holders, asked=wanted
        )

    def _place(self, key: str) -> _Place:
        entry = self._entries[key]
        tensor = entry.value
        # All that is asked of a tensor that is whole here depends on its shape and its element type.
        alike = (entry.shape, tensor.dtype) if type(tensor) is torch.Tensor else None
        found = self._alike_places.get(alike)
        if found is None:
            found = _Place(
                entry.shape or (),
                local_tensor(tensor).numel(),
                blocks_of(key, tensor),
                holders_of(tensor, self._world),
                from_torch(tensor.dtype),
            )
            if alike is not None:
                self._alike_places[alike] = found
        return found

    def _dtype(self, key: str) -> str | None:
        value = self._entries[key].value
        return from_torch(value.dtype) if isinstance(value, torch.Tensor) else None

    # --- as a target ---

    @cached_property
    def layout(self) -> Layout:
        return layout_of([entry.value for entry in self._entries.values()], self._world)

    def _has(self, name: str) -> bool:
        return self._keys[name, PARAM] in self.filled

    def room(self, key: int, state: str, dtype: str, length: int) -> torch.Tensor | None:
        if not self._unseen or self._entry_of[key, state] not in self._unseen:
            return None
        return self.home(key, state, dtype, length)

    def home(self, key: int, state: str, dtype: str, length: int) -> torch.Tensor | None:
        local = self._memory[key, state]
        return local.view(-1) if local.is_contiguous() and from_torch(local.dtype) == dtype else None

    def memory(self, key: int, state: str) -> torch.Tensor | None:
        return self._memory[key, state]

    def weights(self) -> tuple[Weights, ...]:
        """None, since a state dict has weights and no masters of them."""
        return ()

    def current(self, key: int, state: str) -> torch.Tensor | None:
        return self._memory[key, state].cpu().reshape(-1).clone()

    def check(self, training_state: TrainingState, sources: Mapping[int, int]) -> None:
        """Do nothing. The plan has compared all that a state dict asks for."""

    def begin(self) -> None:
        """Do nothing. Nobody but the caller knows what is done with the tensors meanwhile."""

    @torch.no_grad()
    def put(self, loaded: Loaded) -> None:
        """Fill the tensors. Other values are kept for `put_values`."""
        loaded.tensors.fill_all({key: self._memory[key] for key in loaded.tensors})
        self.filled.update([self._entry_of[key] for key in loaded.tensors])
        self.filled.update(self._keys[name, PARAM] for name, owner in self.tied.items() if self._has(owner))
        for key, values in loaded.scalars.items():
            for state, value in values.items():
                self._set(self._entry_of[key, state], value)
        for index, options in loaded.options.items():
            for option, value in options.items():
                self._set(self._options[index, option], value)
        for entry, value in loaded.named.items():
            self._set(entry, value)

    def apply(self, loaded: Loaded) -> None:
        """Do nothing. No other rank is needed."""

    def _set(self, key: str, value: Any) -> None:
        if self._entries[key].shape is None:
            self.values[key] = value
            return
        local = local_tensor(self._entries[key].value)
        self.filled.add(key)
        if isinstance(value, torch.Tensor):
            local.copy_(value)
        else:
            local.fill_(value)

    def put_values(self, state_dict: dict[str, Any]) -> None:
        """Set the values that are no tensors in the state dict from which the entries come."""
        for key, value in self.values.items():
            put(state_dict, self._entries[key].path, value)


@dataclass(frozen=True, eq=False, slots=True)
class _Place:
    """A tensor of the state dict on this rank. length is in elements."""

    shape: Shape
    length: int
    blocks: Blocks
    holders: tuple[int, ...]
    dtype: str

    def lies_as(self, other: _Place) -> bool:
        """Whether both lie in the same way. It can tell only because tensors that are cut alike share their blocks."""
        return self.blocks is other.blocks and (self.shape, self.holders) == (other.shape, other.holders)
