"""A state dict of torch.distributed as a target: its tensors by name, filled where they are.

Optimizer states and hyperparameters are found by the parameters' names, so that neither the order of param groups nor
the framework that saved them matters. What a name means also depends on the checkpoint. A tensor that belongs to no
parameter is stored under its flat name, and a rank's own values are stored beside the tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch

from ucp.catalog import Catalog, TrainingState
from ucp.columns import tuples_of
from ucp.errors import Unsupported
from ucp.formats.shared.roles import PARAM, VALUES, Roles, StateEntry, assign
from ucp.geometry import Blocks, Shape, empty, numel
from ucp.job import ranks
from ucp.loading.name_match import match
from ucp.loading.options import OWN_OPTIONS, own_values, shared_values
from ucp.loading.refusals import Words
from ucp.loading.target import Asked, Group, Loaded, Member, Placement, Slot, Weights
from ucp.parallel.mesh import Layout
from ucp.storage.dtypes import from_torch
from ucp.torchdist.dtensors import blocks_of, holders_of, layout_of, local_tensor
from ucp.torchdist.state_dicts import put, storage_key
from ucp.torchdist.words import StateDictWords

_OF_WEIGHTS = Asked(frozenset({PARAM}))
_NONE: Mapping[str, Any] = {}


@dataclass(frozen=True)
class _AskedEntries:
    """What is asked for: name -> state -> flat name, of tensors and of single values."""

    tensors: dict[str, dict[str, str]] = field(default_factory=dict)
    values: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, str]:
        """Name -> flat name of its weight."""
        return {name: found[PARAM] for name, found in self.tensors.items() if PARAM in found}


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
        self._local: dict[str, torch.Tensor] = {}  # flat name of a weight -> what lies here
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

    def _take(self, roles: Roles, only: Collection[str]) -> _AskedEntries:
        """The tensors and single values by name. Also fills ``named``."""
        catalog, entries = self._catalog, self._entries
        own, shared = own_values(catalog), shared_values(catalog)
        names = match(catalog, [name for name, _ in chain(roles.tensors.values(), roles.scalars.values())], copies=True)
        out = _AskedEntries()
        # The usual ones first: tensors here and there.
        found = {
            key: what
            for key, what in roles.tensors.items()
            if (names.get(what[0]), what[1]) in catalog.tensors and key in only and entries[key].shape is not None
        }
        for key, (name, state) in found.items():
            out.tensors.setdefault(name, {})[state] = key
        self._keys.update(zip(found.values(), found, strict=True))
        for key, (name, state) in chain(roles.tensors.items(), roles.scalars.items()):
            if key in found or key not in only:
                continue
            is_tensor = entries[key].shape is not None
            source = names.get(name)
            if source is not None and is_tensor and (source, state) in catalog.tensors:
                out.tensors.setdefault(name, {})[state] = key
            elif source is not None and state in catalog.parameters[source].scalars and self._is_single(key):
                out.values.setdefault(name, {})[state] = key
            elif is_tensor and isinstance(own.get(key), torch.Tensor):
                self.named[key] = local_tensor(entries[key].value)
                continue
            elif is_tensor and (key, PARAM) in catalog.tensors:
                name, state = key, PARAM
                out.tensors.setdefault(name, {})[state] = key
            elif not is_tensor and key in shared:
                self.named[key] = entries[key].value
                continue
            elif is_tensor and key in roles.tensors:
                out.tensors.setdefault(name, {})[state] = key
            else:
                out.values.setdefault(name, {})[state] = key
            self._keys[name, state] = key
        self.named.update((key, entries[key].value) for key in roles.values if key in only)
        return out

    def _filled_there(self) -> dict[str, list[str]]:
        """Lists that are empty here and hold tensors or mappings in the checkpoint -> their entries there."""
        plain = {key: e.value for key, e in self._entries.items() if e.shape is None}
        empty_here = {key for key, value in plain.items() if isinstance(value, (list, tuple)) and not value}
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

    def _untie(self, asked: _AskedEntries, roles: Roles) -> dict[str, str]:
        """Remove all names but one of tensors that are one memory. Returns removed name -> name that stays. A name that
        the checkpoint has is preferred."""
        weights = asked.weights
        self._local.update([(key, local_tensor(self._entries[key].value)) for key in weights.values()])
        begins = {local.data_ptr() for local in self._local.values()}
        if 0 not in begins and len(begins) == len(weights):
            return {}  # no two begin at one address; those without memory here can't tell
        same: dict[Any, list[str]] = {}
        views: dict[tuple[int, int], Any] = {}
        for name, key in weights.items():
            memory = storage_key(self._entries[key].value)
            if memory is None:
                continue
            same.setdefault(memory, []).append(name)
            local = self._local[key]
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
                    del asked.tensors[name][PARAM]
                    if not asked.tensors[name]:
                        del asked.tensors[name]
        return out

    def _groups(self, roles: Roles, only: Collection[str]) -> list[Group]:
        options: dict[str, dict[str, Any]] = {group: {} for group in roles.groups}
        order = {group: index for index, group in enumerate(roles.groups)}
        for key, (group, option) in roles.options.items():
            if option not in OWN_OPTIONS and key in only:
                value = self._entries[key].value
                options[group][option] = local_tensor(value) if isinstance(value, torch.Tensor) else value
                self._options[order[group], option] = key
        return [Group(names, options[group], None, takes=frozenset()) for group, names in roles.groups.items()]

    def _slots(self, asked: _AskedEntries) -> list[Slot]:
        alone = (
            {} if self._blank else {name: key for name, key in asked.weights.items() if len(asked.tensors[name]) == 1}
        )
        if asked.values:
            alone = {name: key for name, key in alone.items() if name not in asked.values}
        out = self._weights_alone(alone)
        names = [name for name in asked.tensors if name not in alone]
        names += [name for name in asked.values if name not in asked.tensors]
        for key, name in enumerate(names, len(out)):
            tensors, values = asked.tensors.get(name, {}), asked.values.get(name, {})
            for state, entry in tensors.items():
                self._entry_of[key, state] = entry
                self._memory[key, state] = local_tensor(self._entries[entry].value)
            for state, entry in values.items():
                self._entry_of[key, state] = entry
            out.append(self._slot(key, name, tensors, values))
        return out

    def _weights_alone(self, keys: Mapping[str, str]) -> list[Slot]:
        """The slots of names under which only a weight is asked for, as is usual. keys: name -> flat name."""
        known, places = self._alike_places, []
        for key in keys.values():
            entry = self._entries[key]
            alike = (entry.shape, entry.value.dtype) if type(entry.value) is torch.Tensor else None
            places.append(known.get(alike) or self._place(key))
        slots = list(zip(range(len(places)), repeat(PARAM), strict=False))
        self._entry_of.update(zip(slots, keys.values(), strict=True))
        self._memory.update(zip(slots, map(self._local.__getitem__, keys.values()), strict=True))
        shapes, lengths, blocks, holders, dtypes = zip(*places, strict=True) if places else ((),) * 5
        members = zip(tuples_of(Member, keys, shapes, blocks, repeat(False)), strict=True)
        some = repeat("parameter"), lengths, dtypes, members, repeat(None), repeat(_NONE), repeat(_NONE), holders
        return tuples_of(Slot, range(len(places)), *some, repeat(_OF_WEIGHTS), repeat(None))

    def _slot(self, key: int, name: str, tensors: Mapping[str, str], values_of: Mapping[str, str]) -> Slot:
        places = {state: self._place(entry) for state, entry in tensors.items()}
        blank = frozenset[str]()
        if self._blank:
            every = {**tensors, **values_of}
            blank = frozenset(state for state, entry in every.items() if entry in self._unseen)
        values = {state: self._dtype(entry) for state, entry in values_of.items()}
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
        if not local.is_contiguous() or from_torch(local.dtype) != dtype:
            return None
        return local if local.dim() == 1 else local.view(-1)

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


class _Place(NamedTuple):
    """A tensor of the state dict on this rank. length is in elements."""

    shape: Shape
    length: int
    blocks: Blocks
    holders: tuple[int, ...]
    dtype: str

    def lies_as(self, other: _Place) -> bool:
        """Whether both lie in the same way. It can tell only because tensors that are cut alike share their blocks."""
        return self.blocks is other.blocks and (self.shape, self.holders) == (other.shape, other.holders)
