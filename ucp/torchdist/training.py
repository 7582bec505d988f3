"""Save and load all that a torch.distributed run needs to continue: a model and what belongs to it, in any layout."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict as api

from ucp import limits
from ucp.catalog import Catalog, TrainingState
from ucp.errors import Mismatch
from ucp.formats.shared.roles import MODEL, PARAM
from ucp.formats.shared.training_state import values_beside
from ucp.job import data_loaders, generators, ranks
from ucp.job.stopwatch import Stopwatch
from ucp.loading.exchange import ADAPTIVE
from ucp.loading.load import load as load_target
from ucp.loading.name_match import bare
from ucp.loading.nouns import Wish
from ucp.loading.options import stays_at
from ucp.loading.report import LoadReport
from ucp.loading.spec_names import config_of, shapes_of
from ucp.loading.target import Loaded
from ucp.printable import logger
from ucp.saving.save import SaveReport
from ucp.saving.source import Source
from ucp.torchdist.changes import DECLARE, Given, are_requantised, as_changed
from ucp.torchdist.dtensors import local_tensor
from ucp.torchdist.load import entries_of, open_for, tell
from ucp.torchdist.optimizers import (
    OPTIMIZER,
    Made,
    Optimizers,
    listed,
    names_without_states,
    set_states,
    state_by_flat_name,
    state_dict_of,
    tensors_now,
    to_save,
)
from ucp.torchdist.requantise import Requantised
from ucp.torchdist.save import PendingSave, write, write_in_background
from ucp.torchdist.saved_options import with_saved_options
from ucp.torchdist.source import make_source
from ucp.torchdist.state_dicts import flatten
from ucp.torchdist.target import StateDictTarget
from ucp.torchdist.words import StateDictWords

log = logger(__name__)


def save_training(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module,
    optimizer: Optimizers = (),
    lr_scheduler: Any = None,
    dataloader: Any = None,
    step: int | None = None,
    samples: int | None = None,
    rng: bool = True,
    extra: Mapping[str, Any] | None = None,
    background: bool = False,
    memory: int = limits.STAGING_BYTES,
    timeout: float = limits.SAVE_TIMEOUT_SECONDS,
    metrics: bool = False,
) -> SaveReport | PendingSave:
    """Save everything that a run needs to continue. Collective.

    `load_training` restores it in any layout. The checkpoint resumes under DeepSpeed as well.

    Parameters
    ----------
    path, timeout, metrics
        As for `save`.
    model
        A module under any parallelism that torch's ``get_model_state_dict`` knows.
    optimizer
        One optimizer, or several.
    lr_scheduler, dataloader
        Objects with ``state_dict``. The data loader's state is each rank's own.
    step, samples
        How many steps the run has taken, and how many samples it has consumed.
    rng
        Keep the states of each rank's random number generators.
    extra
        Plain values, which `load_training` gives back.
    background
        Return once everything is copied, as `async_save` does.
    memory
        With background: how many bytes of host memory a rank's copies may take.

    Returns
    -------
    SaveReport or PendingSave
        A PendingSave in the background.

    Raises
    ------
    Unsupported, DestinationError, SaveFailed
        As for `save`, or as for `async_save` in the background.
    """
    parts = TrainingParts(model, optimizer, lr_scheduler, dataloader, step, samples, rng, extra)
    source = training_source(parts, late=background)
    if background:
        return write_in_background(source, path, memory=memory, timeout=timeout, metrics=metrics)
    return write(source, path, timeout, metrics)


@dataclass(frozen=True, eq=False)
class TrainingParts:
    """What a run consists of, as `save_training` and `load_training` take it."""

    model: torch.nn.Module
    optimizer: Optimizers = ()
    lr_scheduler: Any = None
    dataloader: Any = None
    step: int | None = None
    samples: int | None = None
    rng: bool = True
    extra: Mapping[str, Any] | None = None

    def progress(self) -> TrainingState:
        """The run's progress, as a checkpoint records it."""
        return TrainingState(
            lr_scheduler=None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            global_steps=self.step,
            global_samples=self.samples,
            client_state=dict(self.extra or {}),
        )


def training_source(of: TrainingParts, late: bool = False) -> Source:
    """What `save_training` saves of this rank. Collective. late: as for `make_source`."""
    state_dict, _ = state_dict_of(of.model, of.optimizer, blank=True)
    to_save(state_dict, of.optimizer)
    return make_source(
        state_dict,
        _kinds(of.model, of.optimizer),
        of.progress(),
        {**({"rng": generators.capture()} if of.rng else {}), **data_loaders.kept_of(of.dataloader)},
        late,
    )


@dataclass(frozen=True)
class TrainingReport:
    """What `load_training` found.

    Attributes
    ----------
    step, samples
        How many steps the run had taken, and how many samples it had consumed. None if the checkpoint does not say.
    extra
        What was given to the save as extra. For a checkpoint from DeepSpeed it is the client state; for one of DCP's
        the values that are of neither model nor optimizer, by their flat names.
    tensors
        What was restored, what stayed as it was, and what of the checkpoint was not asked for.
    clip_grad
        The norm to which DeepSpeed clipped gradients in the run that saved. The program has to clip them itself now.
        None if that run did not clip, or if the checkpoint does not say.
    """

    step: int | None
    samples: int | None
    extra: Mapping[str, Any]
    tensors: LoadReport
    clip_grad: float | None = None


def load_training(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module,
    optimizer: Optimizers = (),
    lr_scheduler: Any = None,
    dataloader: Any = None,
    rng: bool = True,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
    verify: bool = True,
    read_once: bool | str = ADAPTIVE,
    metrics: bool = False,
    prove: bool | str = True,
    changes: Given = None,
    memory: int = limits.LOAD_MEMORY_BYTES,
    **opening: Any,
) -> TrainingReport:
    """Restore a whole training state of any supported format and layout, or refuse. Collective.

    Everything that was saved of the model and the optimizers has to be used, and all that they have has to be there,
    unless allow_missing and allow_unused say otherwise. States of data loaders and random number generators are each
    rank's own: another number of ranks moves or refuses a loader's (`ucp.job.data_loaders`), and keeps its generators.

    Parameters
    ----------
    path, opening, verify, read_once, metrics, prove, changes, memory
        As for `load`. A spec's sizes come from a transformers model's own config.
    model, optimizer, lr_scheduler, dataloader, rng
        As for `save_training`.
    allow_missing, allow_unused
        Patterns of names, of ``name:state`` for optimizer states (``*:*``: weights alone), or flat names ("optim.*").

    Returns a `TrainingReport`, and raises as `load` does.
    """
    watch, live = Stopwatch(), TrainingParts(model, optimizer, lr_scheduler, dataloader, rng=rng)
    asked = Requantised() if are_requantised(changes) else None
    state_dict, made = _states_of(model, asked, optimizer, True)
    asking = path, state_dict, {"param_shapes": _whole_shapes(model), **opening}, changes, config_of(model)
    where, catalog = ranks.from_first(lambda: watch.timed("open", lambda: _opened(*asking)))
    opening.setdefault("model_config", asking[-1])
    quantised = asked.if_needed(catalog) if asked else None
    changed = as_changed(catalog, changes, lambda: flatten(state_dict), opening, asked.needed if asked else None)
    catalog = changed.catalog
    live = ranks.all_or_none(lambda: _to_restore(where, catalog, live, allow_missing))
    if live.optimizer is not optimizer:
        state_dict, made = state_dict_of(model, (), blank=True)
    position = ranks.all_or_none(lambda: _check(where, catalog.training_state, live))
    weights = () if listed(live.optimizer) else ("*:*",)
    unread = (*allow_unused, *map(glob.escape, values_beside(catalog.training_state)), *weights)
    wish = Wish(allow_missing=tuple(allow_missing), allow_unused=unread, grown=changed.grown)
    how: dict[str, Any] = {"verify": verify, "read_once": read_once, "prove": prove, "memory": memory}

    def fill(state_dict: dict[str, Any], made: Made, blank: bool) -> LoadReport:
        target = partial(TrainingTarget, live, position, where, catalog, state_dict, made, blank, quantised)
        return load_target(catalog, target, wish, path=where, watch=watch, changes=changed.lines, **how)

    report = _filled(fill, (state_dict, made), lambda: _states_of(model, quantised, live.optimizer, False))
    tell(report := report if quantised is None else quantised.told(report), metrics)
    return _report(where, catalog, report, optimizer)


def _opened(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Any],
    opening: Mapping[str, Any],
    changes: Given,
    config: Mapping[str, Any] | None,
) -> tuple[str, Catalog]:
    return open_for(path, entries_of(state_dict)[1], opening, changes, config)


def _whole_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the module's parameters. None under FSDP1, which has cut or flattened them."""
    found = {bare(name): shape for name, shape in shapes_of(model).items()}
    return None if any("_fsdp_wrapped_module" in name or "_flat_param" in name for name in found) else found


def _states_of(
    model: torch.nn.Module, quantised: Requantised | None, optimizer: Optimizers, blank: bool
) -> tuple[dict[str, Any], Made]:
    """As `state_dict_of`, with float32 tensors for states that are to be quantised again."""
    out = state_dict_of(model, optimizer, blank=blank)
    if quantised is not None and listed(optimizer):
        quantised.take(out[0])
    return out


def _filled(
    fill: Callable[[dict[str, Any], Made, bool], LoadReport],
    quick: tuple[dict[str, Any], Made],
    real: Callable[[], tuple[dict[str, Any], Made]],
) -> LoadReport:
    """Fill states that were made quickly; if the checkpoint's are others, those that the optimizer makes itself."""
    try:
        return fill(*quick, True)
    except Exception as error:  # ranks may fail in different ways, so they agree on a second try
        if not quick[1] or not all(ranks.distinct(isinstance(error, Mismatch))[0]):
            raise
        return fill(*real(), False)


def _report(where: str, catalog: Catalog, report: LoadReport, optimizer: Optimizers) -> TrainingReport:
    state = catalog.training_state
    clip = _clipping(where, state, optimizer)
    extra = state.client_state or values_beside(state)
    return TrainingReport(state.global_steps, state.global_samples, extra, report, clip)


def _clipping(where: str, state: TrainingState, optimizer: Optimizers) -> float | None:
    """The norm to which gradients were clipped. Logs a warning, since nothing here clips them by itself."""
    clip = state.clip_grad or None
    if clip is not None and listed(optimizer) and ranks.rank() == 0:
        log.warning(
            "%s: the run that saved it clipped gradients to a norm of %g; nothing here does it by itself: call "
            "torch.nn.utils.clip_grad_norm_ with the report's clip_grad before every step",
            where,
            clip,
        )
    return clip


class TrainingTarget(StateDictTarget):
    """A model, its optimizers and the other state that a run continues with, on one rank.

    position: the data loader's state. state_dict, made, blank: those of `state_dict_of`. quantised: states of it that
    the optimizer quantises again.
    """

    def __init__(
        self,
        live: TrainingParts,
        position: Any,
        where: str,
        catalog: Catalog,
        state_dict: dict[str, Any],
        made: Made,
        blank: bool,
        quantised: Requantised | None = None,
    ) -> None:
        self._quantised = quantised
        self._live, self._position, self._where = live, position, where
        self._state_dict, self._made = state_dict, made
        self._now: Mapping[tuple[str, str], Any] | None = None
        self._stepped = any(info.scalars or set(info.states) - {PARAM} for info in catalog.parameters.values())
        if listed(live.optimizer) and not self._stepped:
            state_dict[OPTIMIZER]["state"].clear()
        self._more = with_saved_options(state_dict, catalog) if listed(live.optimizer) else ()
        unseen = {
            f"{OPTIMIZER}.state.{name}.{key}"
            for name in names_without_states(state_dict, live.optimizer)
            for key in state_dict[OPTIMIZER]["state"].get(name, ())
        }
        words = StateDictWords(
            whole="the model with its optimizers",
            anew="load again, or make them anew",
            allow="allow_missing=[...] leaves what is missing as it is, allow_unused=[...] leaves out what is unused",
            alone="leave optimizer= out to load the weights alone",
            apart="allow_unused=[...] with one of their names takes the other alone",
            prefixes=(f"{MODEL}.", f"{OPTIMIZER}.state."),
            declare=DECLARE,
        )
        super().__init__(where, flatten(state_dict), catalog, unseen=unseen, blank=blank, words=words)

    def memory(self, key: int, state: str) -> torch.Tensor | None:
        """What the model and the optimizers themselves have now, since torch's functions may have given them copies."""
        if self._now is None:
            self._now = tensors_now(self._live.model, self._live.optimizer, self._state_dict)
        name = self.slots[key].members[0].name
        plain = None if self._quantised is None else self._quantised.plain(name, state)
        found = self._now.get((name, state)) if plain is None else plain
        if found is None and name.startswith(f"{OPTIMIZER}.state."):
            found = state_by_flat_name(self._now, name.removeprefix(f"{OPTIMIZER}.state."))
        return local_tensor(found) if isinstance(found, torch.Tensor) else None

    def apply(self, loaded: Loaded) -> None:
        super().apply(loaded)
        self._now = None
        self.put_values(self._state_dict)
        live = self._live
        if self._quantised is not None:
            self._quantised.give()
        api.set_model_state_dict(live.model, self._state_dict[MODEL])
        if listed(live.optimizer):
            states = self._state_dict[OPTIMIZER]
            unstepped = self._unstepped() if self._made else ()
            made = self._made if self._stepped else None
            set_states(live.model, live.optimizer, states, made, unstepped, self._more)
        state = loaded.training_state
        if state is None:
            return
        if live.lr_scheduler is not None:
            live.lr_scheduler.load_state_dict(state.lr_scheduler)
        if live.dataloader is not None:
            live.dataloader.load_state_dict(self._position)
        if live.rng:
            _restore_generators(self._where, state)

    def _unstepped(self) -> set[str]:
        """Parameters whose optimizer states were made here, and for which the checkpoint had none."""
        brought = self.filled | self.values.keys()
        states = self._state_dict[OPTIMIZER]["state"]
        return {
            name
            for name in names_without_states(self._state_dict, self._live.optimizer)
            if not any(f"{OPTIMIZER}.state.{name}.{key}" in brought for key in states.get(name, ()))
        }


def _kinds(model: torch.nn.Module, optimizer: Optimizers) -> dict[str, str]:
    """The kind of each of the model's tensors: a trained parameter, a frozen one or a buffer."""
    updated = {id(p) for o in listed(optimizer) for group in o.param_groups for p in group["params"]}
    out = {bare(name): "buffer" for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, param in model.named_parameters(remove_duplicate=False):
        trained = id(param) in updated if updated else param.requires_grad
        out[bare(name)] = "parameter" if trained else "frozen"
    return out


def _to_restore(where: str, catalog: Catalog, live: TrainingParts, allow_missing: Sequence[str]) -> TrainingParts:
    """What the checkpoint can restore: without the optimizer if it knows none, as has to be allowed; else Mismatch."""
    states = any(info.scalars or set(info.states) - {PARAM} for info in catalog.parameters.values())
    if states or catalog.training_state.param_groups or not listed(live.optimizer):
        return live
    if "*:*" not in allow_missing:
        raise Mismatch(
            f"{where}: nothing was loaded: it has weights alone, and an optimizer would stay as it is; leave "
            "optimizer= out to load the weights alone, or say so: allow_missing=['*:*']"
        )
    if ranks.rank() == 0:
        log.warning("%s: it has weights alone, so the optimizer stays as it is", where)
    return replace(live, optimizer=())


def _check(where: str, state: TrainingState, live: TrainingParts) -> Any:
    """Raise Mismatch if the scheduler or the loader would stay unrestored. Returns the loader's state for this rank."""
    lr_scheduler, dataloader = live.lr_scheduler, live.dataloader
    if lr_scheduler is not None:
        current, saved = lr_scheduler.state_dict(), state.lr_scheduler
        if saved is None:
            raise Mismatch(f"{where}: nothing was loaded: it has no lr scheduler's state; pass lr_scheduler=None")
        if not isinstance(saved, Mapping) or set(saved) != set(current):
            found = sorted(saved) if isinstance(saved, Mapping) else type(saved).__name__
            raise Mismatch(
                f"{where}: nothing was loaded: its lr scheduler's state has {found}, and {type(lr_scheduler).__name__} "
                f"has {sorted(current)}; it is another scheduler's, so pass lr_scheduler=None"
            )
    elif state.lr_scheduler is not None and ranks.rank() == 0:
        rates = stays_at(group.options or {} for group in state.param_groups if listed(live.optimizer))
        log.warning("%s: the lr scheduler's state is not used: none was passed%s", where, rates)
    if dataloader is None:
        return None
    try:
        moved = data_loaders.restored(state.extra.get("ranks", ()), dataloader, ranks.rank(), ranks.world_size())
    except Mismatch as error:
        raise Mismatch(f"{where}: nothing was loaded: {error}") from None
    if moved.note and ranks.rank() == 0:
        log.warning("%s: %s", where, moved.note)
    return moved.state


def _restore_generators(where: str, state: TrainingState) -> None:
    saved = [own["rng"] for own in state.extra.get("ranks", ()) if "rng" in own]
    if len(saved) == ranks.world_size():
        generators.restore(saved[ranks.rank()])
    elif ranks.rank() == 0:
        log.warning(
            "%s: random number generators stay as this program seeded them: %d ranks saved theirs, and %d resume",
            where,
            len(saved),
            ranks.world_size(),
        )
