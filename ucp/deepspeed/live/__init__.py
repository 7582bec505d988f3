"""A live DeepSpeed engine as a target: its optimizer's flat buffers, frozen parameters and buffers, as slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from ucp.catalog import Catalog, TrainingState
from ucp.deepspeed.live import partly
from ucp.deepspeed.live.alike import check_alike
from ucp.deepspeed.live.base import HeldTensor, Optimizer, held_slot, home_of, host_copy, new_home
from ucp.deepspeed.live.experts import LiveExperts
from ucp.deepspeed.live.parallel import PlacedSlots, layout_of, place_slots
from ucp.deepspeed.live.source import make_source, nbytes_to_save
from ucp.deepspeed.live.stage0 import Stage0
from ucp.deepspeed.live.stage3 import Stage3
from ucp.deepspeed.live.stage12 import Stage12
from ucp.deepspeed.live.state import check_state, restore_state, warn_of_scheduler
from ucp.deepspeed.live.weights import WeightsOnly
from ucp.errors import Unsupported
from ucp.job import ranks
from ucp.loading.host_memory import MemoryToCome
from ucp.loading.refusals import Words, few
from ucp.loading.target import Group, Loaded, Slot, Weights, kept_for
from ucp.parallel.mesh import Layout
from ucp.saving.source import Source
from ucp.spec.select import Choice
from ucp.storage.dtypes import itemsize, to_torch

V = TypeVar("V")


@dataclass(frozen=True)
class EngineWords(Words):
    def advice(self, missing: Sequence[str], unused: Sequence[str]) -> str:
        said = {"allow_missing": missing, "allow_unused": unused}
        parts = [f'"{key}": {few(names)}' for key, names in said.items() if names]
        return f'to load all the same: "ucp": {{"load": {{{", ".join(parts)}}}}}'


WORDS = EngineWords(
    "the engine",
    '"ucp": {"load": {"allow_missing": [...], "allow_unused": [...]}}',
    "not even load_module_strict=False resumes from that (load_module_only=True takes the weights that are)",
    "load_optimizer_states=False loads the weights alone",
    '"ucp": {"load": {"changes": %s}}',
    partly.ANEW,
)


class LiveEngine:
    """The training state of one rank of a DeepSpeed engine. It is built anew for every load, since engines change."""

    words = WORDS
    copies = False
    named = None
    keeps_memory = True

    def __init__(self, engine: Any, *, load_lr_scheduler: bool = True) -> None:
        self.engine = engine
        self._load_lr_scheduler = load_lr_scheduler
        self._optimizer = _adapter(engine)
        keys = self._numbers = iter(range(1 << 62))
        self._held: dict[int, HeldTensor] = {}
        slots = [] if self._optimizer is None else self._optimizer.make_slots(keys)
        trained = {m.name for s in slots for m in s.members}
        for kind, name, held in self._outside(trained):
            slot = held_slot(next(keys), kind, name, held)
            self._held[slot.key] = held
            slots.append(slot)
        self._experts = LiveExperts(engine)
        self._slots = tuple(self._experts.lift(slot) for slot in slots)
        self._placed: PlacedSlots | None = None
        self._whole: _Whole | None = None
        self._to_come = MemoryToCome({})
        self._choice = Choice()

    def place(self, choice: Choice, *, to_save: bool = False) -> None:
        """Lift the slots into the whole model's tensors, if tensor or pipeline parallelism cuts it. Collective.

        to_save: compare what ranks hold in common and the optimizer does not keep alike.

        Raises on every rank: SpecError and Mismatch if the spec does not fit, Unsupported if nothing says how the model
        is cut, or if ranks' states differ that a save takes from one of them.
        """
        self._choice = choice
        experts = self._experts.in_slots(self._slots)
        self._placed = place_slots(self.engine, self._slots, self._own_groups, choice, experts)
        if self._placed is not None and self._placed.some_lack:
            scheduler = self.engine.lr_scheduler.state_dict() if to_save and self.engine.lr_scheduler else None
            own = _Whole(self._own_groups, self._experts.ep, scheduler)
            self._whole = next(filter(None, ranks.gather(own if self._placed.has_all else None)))
        optimizer = self._optimizer
        if to_save and self._placed is not None and isinstance(optimizer, Stage0):
            self._placed.refuse_averages()
            apart = [(slot, self.live(slot.key)[0]) for slot in self.slots if optimizer.is_apart(slot.key)]
            check_alike(apart, self._placed.names_of_all)

    def make_room(self, catalog: Catalog, states: bool) -> None:
        """Take the checkpoint's states of other shapes than their parameters', which an optimizer that has not stepped
        has not made yet. states: whether any states are to be loaded; if not, not even those that there are.
        Collective. Raises as `place`."""
        if not isinstance(self._optimizer, Stage0):
            return
        if states:
            whole = {} if self._placed is None else self._placed.whole
            optimizer = self._optimizer
            to_come = ranks.all_or_none(lambda: optimizer.slots_to_come(catalog, self._numbers, whole))
            self._slots = (*(optimizer.with_codes(slot, catalog) for slot in self._slots), *to_come)
        else:
            self._slots = tuple(slot for slot in self._slots if not self._optimizer.is_apart(slot.key))
        if self._placed is not None:
            self.place(self._choice)

    def foresee_states(self) -> None:
        """Begin to get host memory for the states that a load will make, before it is known where they are read."""
        sizes = {}
        for slot in self._slots:
            if slot.kind != "parameter" or not self._is_in_memory(slot.key):
                continue
            weights, states = self.live(slot.key)
            if weights.device.type == "cpu":
                for state in sorted((kept_for(slot, self._own_groups)[0] or frozenset()) - states.keys()):
                    sizes[slot.key, state] = slot.length_of(state) * itemsize(slot.dtype)
        self._to_come = MemoryToCome(sizes)

    @cached_property
    def _own_groups(self) -> Sequence[Group]:
        groups = () if self._optimizer is None else self._optimizer.groups()
        return [self._experts.names(group) for group in groups]

    def _outside(self, trained: set[str]) -> Iterator[tuple[str, str, HeldTensor]]:
        """Parameters that the optimizer does not update, and persistent buffers."""
        for name, param in self.engine.module.named_parameters():
            if name not in trained:
                yield "frozen", name, HeldTensor.of_parameter(param)
        for name, buffer in persistent_buffers(self.engine.module):
            yield "buffer", name, HeldTensor.of_tensor(buffer)

    @property
    def layout(self) -> Layout:
        return replace(layout_of(self.engine), ep=self._experts.ep if self._whole is None else self._whole.ep)

    @property
    def slots(self) -> Sequence[Slot]:
        return self._slots if self._placed is None else self._placed.slots

    @property
    def elsewhere(self) -> Mapping[str, str]:
        return {} if self._placed is None else self._placed.elsewhere

    @property
    def tied(self) -> Mapping[str, str]:
        first = {param: name for name, param in self.engine.module.named_parameters()}
        every = self.engine.module.named_parameters(remove_duplicate=False)
        return {name: first[param] for name, param in every if name != first[param]}

    @property
    def trains(self) -> bool:
        """Whether there is an optimizer."""
        return self._optimizer is not None and not isinstance(self._optimizer, WeightsOnly)

    @property
    def groups(self) -> Sequence[Group]:
        """The param groups. Under model parallelism they have the names from all parts of the model."""
        groups = self._own_groups if self._whole is None else self._whole.groups
        if self._placed is None:
            return groups
        return [replace(g, names=names) for g, names in zip(groups, self._placed.groups, strict=True)]

    @property
    def scheduler_state(self) -> Any:
        """The lr scheduler's state, with entries of all param groups; None without one."""
        if self._whole is not None:
            return self._whole.scheduler
        return None if self.engine.lr_scheduler is None else self.engine.lr_scheduler.state_dict()

    def room(self, key: int, state: str, dtype: str, length: int) -> torch.Tensor | None:
        """New memory for a state that the optimizer has not made yet. What it has is in use."""
        if state == "param" or not self._is_in_memory(key):
            return None
        weights, states = self.live(key)
        if home_of(states.get(state), weights, dtype, length) is not None:
            return None
        foreseen = self._to_come.take((key, state), length * itemsize(dtype))
        return new_home(weights, dtype, length) if foreseen is None else foreseen.view(to_torch(dtype))

    def _is_in_memory(self, key: int) -> bool:
        return key in self._held or self._optimizer is None or self._optimizer.is_in_memory(key)

    def home(self, key: int, state: str, dtype: str, length: int) -> torch.Tensor | None:
        if not self._is_in_memory(key):
            return None
        weights, states = self.live(key)
        if state != "param":
            found = home_of(states.get(state), weights, dtype, length)
            return new_home(weights, dtype, length) if found is None else found
        return weights.detach().view(-1) if weights.is_contiguous() and weights.numel() == length else None

    def memory(self, key: int, state: str) -> torch.Tensor | None:
        weights, states = self.live(key)
        found = weights if state == "param" else states.get(state)
        return found.detach() if isinstance(found, torch.Tensor) else None

    def weights(self) -> Iterator[Weights]:
        if self._optimizer is not None:
            yield from self._optimizer.weights()

    def current(self, key: int, state: str) -> torch.Tensor | None:
        found = self.live(key)[0] if state == "param" else self.live(key)[1].get(state)
        return None if found is None else host_copy(found)

    def live(self, key: int) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """A slot's weights and the optimizer's state of them. Both are no copies."""
        if key in self._held or self._optimizer is None:
            return self._held[key].tensor, {}
        return self._optimizer.live(key)

    @property
    def nbytes_to_save(self) -> int:
        """About how many bytes this rank writes when it saves, with the states that its optimizer has yet to make."""
        return nbytes_to_save(self._slots, self._own_groups)

    def staging(self, most: int) -> int:
        """How many bytes of host memory a save's copies take if nobody says it: at most so many, and where states lie
        on a disk, no more than those of the largest subgroup."""
        away = [nbytes_to_save([s], self._own_groups) for s in self._slots if not self._is_in_memory(s.key)]
        return min(most, max(away)) if away else most

    @property
    def on_device(self) -> bool:
        """Whether any of the slots lies on a device."""
        return any(self.live(slot.key)[0].is_cuda for slot in self._slots)

    def source(self, client_state: Mapping[str, Any], *, frozen: bool = True, late: bool = False) -> Source:
        """The part of the engine's state that this rank saves. frozen: include parameters that are not trained. late:
        as for `make_source`."""
        placed = self._placed
        slots = self._slots if placed is None else placed.to_save(self._slots)
        return make_source(self, slots, client_state, frozen, late)

    def check(self, training_state: TrainingState, sources: Mapping[int, int]) -> None:
        """Raise before anything is changed if the rest of the training state does not fit this engine."""
        if isinstance(self._optimizer, Stage3):
            self._optimizer.check_room()
        own = self._of_own_groups(sources)
        check_state(self.engine, training_state, own, len(self._own_groups), self._load_lr_scheduler)

    def _of_own_groups(self, found: Mapping[int, V]) -> dict[int, V]:
        """What was found for the model's param groups, by this rank's own numbers of those that it has."""
        if self._placed is None:
            return dict(found)
        return {own: found[g] for own, g in enumerate(self._placed.own_groups) if g in found}

    @torch.no_grad()
    def begin(self) -> None:
        partly.refuse(self.engine)
        if self._optimizer is not None:
            self._optimizer.begin()

    @torch.no_grad()
    def put(self, loaded: Loaded) -> None:
        for key, held in self._held.items():
            if (key, "param") in loaded.tensors:
                held.put(key, loaded)
        if self._optimizer is not None:
            self._optimizer.put(loaded)

    @torch.no_grad()
    def apply(self, loaded: Loaded) -> None:
        if self._optimizer is not None:
            self._optimizer.finish()
        if loaded.training_state is not None:
            sources = self._of_own_groups(loaded.sources)
            restore_state(self.engine, loaded.training_state, self._load_lr_scheduler, sources)
        if self._optimizer is not None:
            self._optimizer.set_options(self._of_own_groups(loaded.options))
        if loaded.training_state is not None and self._load_lr_scheduler:
            warn_of_scheduler(self.engine, loaded.training_state)


@dataclass(frozen=True)
class _Whole:
    """What a pipeline's stage that has all param groups says to those without experts.

    ep: the number of ranks that experts are spread over. scheduler: the lr scheduler's state, for a save.
    """

    groups: Sequence[Group]
    ep: int
    scheduler: Any


def _adapter(engine: Any) -> Optimizer | None:
    """The adapter for the engine's optimizer, chosen by the class that DeepSpeed made."""
    optimizer = engine.optimizer
    if optimizer is None:
        return None
    for kind in (Stage12, Stage3, Stage0, WeightsOnly):
        if kind.fits(optimizer):
            return kind(engine)
    raise Unsupported(
        f"the engine's optimizer is a {type(optimizer).__module__}.{type(optimizer).__name__}, whose buffers are not "
        "known; nothing was changed"
    )


def persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the buffers that a state dict holds, each tensor once."""
    seen: set[int] = set()
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name in child._non_persistent_buffers_set or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            yield (f"{prefix}.{name}" if prefix else name), buffer
