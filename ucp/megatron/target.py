"""A sharded state dict of Megatron-Core as a target: its tensors by logical names, filled where they are.

Each parameter has up to two slots: the module's own tensor, and what the optimizer keeps for it. Weights that have
masters in the checkpoint are rounded from them, as Megatron's own copies do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ucp.catalog import Catalog, TrainingState
from ucp.formats.megatron import keys
from ucp.formats.shared.roles import PARAM
from ucp.geometry import Blocks, Shape, empty
from ucp.loading.refusals import Item, Words, few
from ucp.loading.target import Asked, Group, Loaded, Member, Placement, Slot, Weights
from ucp.megatron import parts
from ucp.megatron.parts import Held, HeldPart, Key, Taken
from ucp.megatron.source import Told
from ucp.parallel.mesh import Layout
from ucp.storage.rounding import ROUNDED


@dataclass(frozen=True)
class ShardedWords(Words):
    whole: str = "the sharded state dict"
    allow: str = "allow_missing=[...] or allow_unused=[...]"

    unrestored = "are not in the checkpoint"

    def advice(self, missing: Sequence[str], unused: Sequence[str]) -> str:
        said = {"allow_missing": missing, "allow_unused": unused}
        return f"to load all the same: {', '.join(f'{key}={few(names)}' for key, names in said.items() if names)}"

    def other_shape(self, item: Item, found: Shape) -> str:
        text = super().other_shape(item, found)
        if item.shape[1:] != found[1:]:
            return text
        return f"{text}; where the rest is padding of the vocabulary, vocab_size= says how many rows are real"


@dataclass(frozen=True, eq=False)
class _Memory:
    """A state on this rank. held: cut down to what the checkpoint has. memory: the parts as one buffer, where they are
    one. beyond: what the checkpoint has nothing of: rows of a vocabulary that is padded wider here."""

    held: Held
    memory: torch.Tensor | None
    blocks: Blocks
    length: int
    beyond: tuple[HeldPart, ...] = ()

    def packed(self) -> torch.Tensor:
        if self.memory is not None:
            return self.memory
        return torch.cat([part.view.reshape(-1) for part in self.held.parts]) if self.held.parts else torch.empty(0)


@dataclass(eq=False)
class ShardedTarget:
    """The tensors of a sharded state dict on one rank.

    names: live name -> the checkpoint's, where it is another. wider: parameters whose vocabulary is padded wider here
    than in the checkpoint.
    """

    catalog: Catalog
    taken: Taken
    told: Told
    words: Words = field(default_factory=ShardedWords)
    copies = False
    keeps_memory = False
    named: Mapping[str, Any] | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    groups: Sequence[Group] = ()

    def __post_init__(self) -> None:
        self.wider: set[str] = set()
        self._states: dict[tuple[int, str], _Memory] = {}
        self.slots: list[Slot] = []
        kinds = {name: "parameter" if self._kind(name) else "buffer" for name in self.told.states}
        with torch.no_grad():
            for name, all_states in self.told.states.items():
                states = [state for state in all_states if (name, state) in self.taken.held]
                if keys.WEIGHT in states:
                    self._add(name, kinds[name], {PARAM: keys.WEIGHT})
                if kept := {state: state for state in states if state != keys.WEIGHT}:
                    self._add(name, kinds[name], kept)
        here = {slot.members[0].name for slot in self.slots}
        self.elsewhere = {self.name(n): kind for n, kind in kinds.items() if self.name(n) not in here}

    def _kind(self, name: str) -> bool:
        return name in self.told.trained or "float" in self.told.some(name, self.told.states[name][0]).dtype

    def name(self, live: str) -> str:
        """The checkpoint's name of a parameter. Megatron's own classes give the norm before experts another one than
        Transformer Engine's."""
        if live in self.catalog.parameters:
            return live
        other = live.replace(".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight")
        if other == live:
            other = live.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")
        return other if other in self.catalog.parameters else live

    # --- what is asked for ---

    def _add(self, live: str, kind: str, states: Mapping[str, str]) -> None:
        """A slot for these states of a parameter. states: the checkpoint's name of each -> the one it has here."""
        key, name = len(self.slots), self.name(live)
        found = {state: self._memory(name, self.taken.held[live, own]) for state, own in states.items()}
        self._states.update({(key, state): memory for state, memory in found.items()})
        holders = {state: self._holders((live, own)) for state, own in states.items()}
        base_state = PARAM if PARAM in found else next(iter(found))
        base = found[base_state]
        placed = {
            state: Placement(m.length, (m.blocks,), (holders[state],))
            for state, m in found.items()
            if state != base_state
        }
        self.slots.append(
            Slot(
                key,
                kind,
                base.length,
                self._dtype(name, base_state, base.held.dtype, weight=keys.WEIGHT in states.values()),
                (Member(name, base.held.shape, base.blocks),),
                None,
                {state: m.held.dtype for state, m in found.items() if state != PARAM},
                placed,
                holders[base_state],
                Asked(frozenset(found), {} if keys.WEIGHT in states.values() else self._values(name)),
            )
        )

    def _values(self, name: str) -> dict[str, None]:
        """The optimizer's single values of a parameter, such as 'step'. Megatron has them in its param groups, and the
        common state brings those."""
        info = self.catalog.parameters.get(name)
        return {} if info is None else dict.fromkeys(info.scalars)

    def _dtype(self, name: str, state: str, own: str, *, weight: bool) -> str:
        """The element type to read in: for weights that are rounded copies, the one that the checkpoint has."""
        tensor = self.catalog.tensors.get((name, state))
        return tensor.dtype if weight and tensor is not None and (tensor.dtype, own) in ROUNDED else own

    def _holders(self, key: Key) -> tuple[int, ...]:
        """The ranks that hold the same boxes of it; () where another holds only some of them."""
        regions = self.taken.held[key].regions
        return tuple(rank for rank, fact in self.told.by_key[key].items() if fact.regions == regions)

    def _memory(self, name: str, held: Held) -> _Memory:
        info = self.catalog.parameters.get(name)
        beyond: list[HeldPart] = []
        if info is not None and held.flexible and _narrower(info.shape, held.shape):
            self.wider.add(name)
            rows = info.shape[0]
            inside = [(part, max(0, min(part.view.shape[0], rows - part.offsets[0]))) for part in held.parts]
            beyond = [
                HeldPart((part.offsets[0] + n, *part.offsets[1:]), part.view[n:])
                for part, n in inside
                if n < part.view.shape[0]
            ]
            kept = tuple(replace(part, view=part.view[:n]) for part, n in inside if n)
            held = replace(held, shape=info.shape, parts=kept)
        if not held.parts:
            return _Memory(held, None, empty(len(held.shape)), 0, tuple(beyond))
        return _Memory(held, *parts.flat(held), tuple(beyond))

    # --- as a target ---

    @property
    def layout(self) -> Layout:
        return parts.layout(self.taken)

    def room(self, key: int, state: str, dtype: str, length: int) -> torch.Tensor | None:
        return None

    def memory(self, key: int, state: str) -> torch.Tensor | None:
        return self._states[key, state].packed()

    def weights(self) -> Iterable[Weights]:
        """None: what they are rounded from is read for them, and compared as such."""
        return ()

    def current(self, key: int, state: str) -> torch.Tensor | None:
        return self._states[key, state].packed().cpu().clone()

    def check(self, training_state: TrainingState, sources: Mapping[int, int]) -> None:
        """Do nothing. The plan has compared all that is asked for."""

    def home(self, key: int, state: str, dtype: str, length: int) -> torch.Tensor | None:
        memory = self._states[key, state].memory
        if memory is None or not memory.is_contiguous() or memory.numel() != length:
            return None
        return memory.detach().view(-1)

    def begin(self) -> None:
        """Do nothing. Nobody but the caller knows what is done with the tensors meanwhile."""

    @torch.no_grad()
    def put(self, loaded: Loaded) -> None:
        for key, state in loaded.tensors:
            own = self._states[key, state]
            if own.memory is not None:
                loaded.tensors.fill(key, state, own.memory)
                continue
            tensor, at = loaded.tensors[key, state], 0
            for part in own.held.parts:
                part.view.copy_(tensor[at : at + part.view.numel()].view(part.view.shape))
                at += part.view.numel()
        self._fill_beyond()

    def apply(self, loaded: Loaded) -> None:
        """Do nothing more. No other rank is needed."""

    def _fill_beyond(self) -> None:
        """Rows of padding that the checkpoint has nothing of: weights stay, masters are the weights, moments are 0."""
        live = {
            (slot.members[0].name, part.region): part.view
            for slot in self.slots
            if (m := self._states.get((slot.key, PARAM))) is not None and m.held.state == keys.WEIGHT
            for part in m.beyond
        }
        for (key, state), own in self._states.items():
            for part in own.beyond if own.held.state != keys.WEIGHT else ():
                weight = live.get((self.slots[key].members[0].name, part.region)) if state == PARAM else None
                if weight is None:
                    part.view.zero_()
                else:
                    part.view.copy_(weight)


def _narrower(there: Shape, here: Shape) -> bool:
    """Whether the checkpoint has fewer rows and is otherwise alike."""
    return len(there) == len(here) and there[1:] == here[1:] and there[0] < here[0]
