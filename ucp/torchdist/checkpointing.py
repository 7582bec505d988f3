"""Checkpoints of torch.distributed programs (FSDP2, HSDP, tensor parallelism, DDP, one process), by state dict.

    import ucp
    state = {"model": model_state_dict, "optim": optimizer_state_dict, "epoch": epoch}
    ucp.save(state, "runs/step-1000")          # as torch.distributed.checkpoint.save
    ucp.load(state, "runs/step-1000")          # into its tensors, in place, whatever layout or framework saved

Every rank writes its own fragments, and a load reads only the byte ranges that a rank's shards need. The layout may be
any other one, and so may the framework: parameters, optimizer states and hyperparameters are found by the names of
``torch.distributed.checkpoint.state_dict`` (nested or flattened), so a DeepSpeed checkpoint loads too, and what is
saved here resumes under DeepSpeed.

`save_training` and `load_training` do the whole of it for a model and what belongs to it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict as api
from torch.distributed.checkpoint.stateful import Stateful

from ucp.catalog import Catalog, TrainingState
from ucp.checkpoint import open as open_checkpoint
from ucp.errors import BadArgument, Mismatch, SaveFailed
from ucp.formats.shared.roles import MODEL, PARAM, assign
from ucp.job import data_loaders, generators, ranks
from ucp.job.stopwatch import Stopwatch
from ucp.job.timings import record_load, record_save
from ucp.loading.name_match import bare
from ucp.loading.spec_names import config_of, under_spec
from ucp.printable import logger
from ucp.saving import commit
from ucp.saving.background import Saver
from ucp.saving.save import SaveReport
from ucp.saving.save import save as save_source
from ucp.saving.source import Source
from ucp.saving.staging import MEMORY
from ucp.torchdist.optimizers import OPTIMIZER, Optimizers, listed, names_without_states, set_states, state_dict_of
from ucp.torchdist.source import make_source
from ucp.torchdist.state_dicts import flatten, unwrap
from ucp.torchdist.target import StateDictReport, load_into

log = logger(__name__)

__all__ = ["PendingSave", "TrainingReport", "async_save", "load", "load_training", "save", "save_training"]


def save(
    state_dict: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    timeout: float = commit.TIMEOUT,
    metrics: bool = False,
) -> SaveReport:
    """Save a state dict as the checkpoint ``path``. Collective over all ranks; without a process group, one process.

    state_dict: tensors, DTensors, Stateful objects and plain Python values, nested as one likes. What ranks call by one
    name but have each for themselves (a tensor that is no DTensor, such as a random number generator's state) is kept
    for each of them; it comes back where as many ranks load. timeout: seconds that the first rank waits for the others.
    metrics: add every rank's timings to ``ucp-metrics.jsonl`` beside the checkpoint.

    A checkpoint at ``path`` is replaced in one rename once the new one is whole; until then, and after any failure, it
    is as it was. Raises on every rank: Unsupported (by name, for what cannot be kept exactly), DestinationError,
    SaveFailed (a rank failed, or ranks contradict each other).
    """
    return _write(make_source(unwrap(state_dict)), path, timeout, metrics)


def async_save(
    state_dict: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    lazy: bool = False,
    memory: int = MEMORY,
    timeout: float = commit.TIMEOUT,
    metrics: bool = False,
) -> PendingSave:
    """As `save`, but return once everything is copied to host memory; a process of its own writes it.

    lazy: return before that; then call ``hold()`` on what is returned before anything changes the tensors, so that
    the copying is done beside forward and backward. memory: bytes of host memory that a rank's copies may take; it is
    kept for the next save. A larger share is copied and written in turns, and the call or ``hold()`` waits for most of
    that. One save at a time is under way: the next one waits for it first, and raises what went wrong with it. Leaving
    the process waits, too.
    """
    source = make_source(unwrap(state_dict))
    return _write_in_background(source, path, lazy=lazy, memory=memory, timeout=timeout, metrics=metrics)


def load(
    state_dict: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    allow_missing: Sequence[str] = (),
    verify: bool = True,
    metrics: bool = False,
    **opening: Any,
) -> StateDictReport:
    """Fill a state dict from a checkpoint of any supported format and layout. Collective.

    Tensors and DTensors are filled in place, each rank's shards with the bytes that they need; other values are
    replaced; Stateful objects are given their loaded state. What the state dict does not ask for is not read, and is
    told in the report. Hyperparameters that say how an optimizer is implemented (foreach, fused, ...) stay.

    path: as for `ucp.open`, and so is ``opening`` (tag, spec, model_config, ...); a spec's ``names:`` tell what a
    checkpoint of another framework calls the parameters. allow_missing: patterns of flat names ("optim.*") that may
    stay as they are. verify: check digests, where the checkpoint has them. metrics: as for `save`.

    Raises on every rank, with nothing changed: Mismatch (missing entries, other shapes, element types that would lose
    bits), NotACheckpoint, DamagedCheckpoint.
    """
    watch = Stopwatch()
    unwrapped = unwrap(state_dict)
    where, catalog = ranks.from_first(lambda: watch.timed("open", lambda: _open(path, unwrapped, opening)))
    report = load_into(unwrapped, where, catalog, allow_missing, verify=verify, watch=watch)
    for key, value in state_dict.items():
        if isinstance(value, Stateful):
            value.load_state_dict(unwrapped[key])
        else:
            state_dict[key] = unwrapped[key]
    _tell(report, metrics)
    if ranks.rank() == 0 and report.unused:
        log.info("%s: %d of its tensors were not asked for (%s, …)", where, len(report.unused), report.unused[0])
    return report


def _tell(report: StateDictReport, metrics: bool) -> None:
    """The line after every load, and its record. Collective."""
    if ranks.rank() == 0:
        log.info("%s", report)
    if metrics:
        record_load(report.path, report.bytes_read, report.seconds, report.overlapping)


def _open(
    path: str | os.PathLike[str], state_dict: Mapping[str, Any], opening: Mapping[str, Any]
) -> tuple[str, Catalog]:
    """The checkpoint's folder and its catalog, whose training state has real tensors, by the state dict's names where
    a spec tells what they are in the checkpoint."""
    roles = assign(flatten(state_dict), complete=False)
    names = [list(group) for group in roles.groups.values()]
    with open_checkpoint(path, **{"param_names": names or None, **opening}) as checkpoint:
        catalog = replace(checkpoint.catalog, training_state=checkpoint.training_state)
    return str(checkpoint.path), under_spec(catalog, {name for name, _ in roles.tensors.values()}, opening)


# --- a whole training state ------------------------------------------------------------------------------------------


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
    memory: int = MEMORY,
    timeout: float = commit.TIMEOUT,
    metrics: bool = False,
) -> SaveReport | PendingSave:
    """Save everything that a run needs to go on: `load_training` takes it back, in any layout. Collective.

    model: of any parallelism that torch's ``get_model_state_dict`` knows. optimizer: one, or several. lr_scheduler,
    dataloader: objects with ``state_dict``; the data loader's is each rank's own, and so are the random number
    generators (rng). step, samples: how far the run has come. extra: plain values to be given back. background: return
    once everything is copied, as `async_save`, in so much host memory. metrics: as for `save`.

    The checkpoint resumes under DeepSpeed as well. Raises as `save` does.
    """
    state_dict, _ = state_dict_of(model, optimizer, blank=True)
    for name in names_without_states(state_dict, optimizer):
        state_dict[OPTIMIZER]["state"].pop(name, None)
    source = make_source(
        state_dict,
        _kinds(model, optimizer),
        TrainingState(
            lr_scheduler=None if lr_scheduler is None else lr_scheduler.state_dict(),
            global_steps=step,
            global_samples=samples,
            client_state=dict(extra or {}),
        ),
        {
            **({"rng": generators.capture()} if rng else {}),
            **data_loaders.kept_of(dataloader),
        },
    )
    if background:
        return _write_in_background(source, path, memory=memory, timeout=timeout, metrics=metrics)
    return _write(source, path, timeout, metrics)


@dataclass(frozen=True)
class TrainingReport:
    """What `load_training` found. step, samples: None where the checkpoint does not say. extra: as given to the save
    (under DeepSpeed: the client state). clip_grad: the norm to which DeepSpeed clipped gradients in the run that saved,
    which the program has to do itself now; None where it did not, or the checkpoint does not say."""

    step: int | None
    samples: int | None
    extra: Mapping[str, Any]
    tensors: StateDictReport
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
    metrics: bool = False,
    **opening: Any,
) -> TrainingReport:
    """Put a whole training state of any supported format and layout in place, or refuse. Collective.

    Arguments as for `save_training` and `load`. What was saved of a model or optimizer has to be used and all that they
    have has to be there, unless allow_missing and allow_unused (patterns of names, or ``name:state``) say otherwise. A
    data loader's state and random number generators are the ranks' own: with another number of ranks the loader's is
    moved where it is known how (`ucp.job.data_loaders`) and else refused, and the generators stay as the program seeded
    them, with a warning. A spec's sizes come from a transformers model's own config.

    Raises on every rank, with nothing changed: Mismatch, NotACheckpoint, DamagedCheckpoint.
    """
    watch = Stopwatch()
    # Nothing is known of what states the optimizers of the checkpoint had: those that are made quickly are tried first.
    state_dict, made = state_dict_of(model, optimizer, blank=True)
    opening.setdefault("model_config", config_of(model))
    where, catalog = ranks.from_first(lambda: watch.timed("open", lambda: _open(path, state_dict, opening)))
    state = catalog.training_state
    stepped = any(info.scalars or set(info.states) - {PARAM} for info in catalog.parameters.values())
    loaders = ranks.all_or_none(lambda: _check(where, state, lr_scheduler, dataloader))
    unread = tuple(allow_unused) if listed(optimizer) else ("*:*", *allow_unused)

    def fill(blank: bool) -> StateDictReport:
        if listed(optimizer) and not stepped:
            state_dict[OPTIMIZER]["state"].clear()
        unseen = {
            f"{OPTIMIZER}.state.{name}.{key}"
            for name in names_without_states(state_dict, optimizer)
            for key in state_dict[OPTIMIZER]["state"].get(name, ())
        }
        return load_into(state_dict, where, catalog, allow_missing, unread, verify, watch, unseen, blank)

    try:
        report = fill(blank=True)
    except Mismatch:
        if not listed(optimizer):
            raise
        state_dict, made = state_dict_of(model, optimizer)
        report = fill(blank=False)
    api.set_model_state_dict(model, state_dict[MODEL])
    if listed(optimizer):
        set_states(model, optimizer, state_dict[OPTIMIZER], made if stepped else None)
    _tell(report, metrics)
    if lr_scheduler is not None:
        lr_scheduler.load_state_dict(state.lr_scheduler)
    if dataloader is not None:
        dataloader.load_state_dict(loaders)
    if rng:
        _restore_generators(where, state)
    clip = state.clip_grad or None
    if clip is not None and listed(optimizer) and ranks.rank() == 0:
        log.warning(
            "%s: the run that saved it clipped gradients to a norm of %g; nothing here does it by itself: call "
            "torch.nn.utils.clip_grad_norm_ with the report's clip_grad before every step",
            where,
            clip,
        )
    return TrainingReport(state.global_steps, state.global_samples, state.client_state, report, clip)


def _kinds(model: torch.nn.Module, optimizer: Optimizers) -> dict[str, str]:
    """Which of the model's tensors are trained, frozen, and buffers."""
    updated = {id(p) for o in listed(optimizer) for group in o.param_groups for p in group["params"]}
    out = {bare(name): "buffer" for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, param in model.named_parameters(remove_duplicate=False):
        trained = id(param) in updated if updated else param.requires_grad
        out[bare(name)] = "parameter" if trained else "frozen"
    return out


def _check(where: str, state: TrainingState, lr_scheduler: Any, dataloader: Any) -> Any:
    """Raise Mismatch where scheduler or loader would stay unrestored; returns the loader's state for this rank."""
    if lr_scheduler is not None:
        live, saved = lr_scheduler.state_dict(), state.lr_scheduler
        if saved is None:
            raise Mismatch(f"{where}: nothing was loaded: it has no lr scheduler's state; pass lr_scheduler=None")
        if not isinstance(saved, Mapping) or set(saved) != set(live):
            found = sorted(saved) if isinstance(saved, Mapping) else type(saved).__name__
            raise Mismatch(
                f"{where}: nothing was loaded: its lr scheduler's state has {found}, and {type(lr_scheduler).__name__} "
                f"has {sorted(live)}; it is another scheduler's, so pass lr_scheduler=None"
            )
    elif state.lr_scheduler is not None and ranks.rank() == 0:
        log.warning("%s: the lr scheduler's state is not used: none was passed", where)
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


# --- writing ---------------------------------------------------------------------------------------------------------


def _write(source: Source, path: str | os.PathLike[str], timeout: float, metrics: bool) -> SaveReport:
    """Save what `make_source` made of a state dict. Collective."""
    folder, name = split_path(path)
    report = save_source(source, folder, name, latest=False, timeout=timeout)
    if ranks.rank() == 0:
        log.info("%s", report)
    if metrics:
        record_save(report, ranks.rank(), ranks.world_size())
    return report


@dataclass(eq=False)
class PendingSave:
    """A save that is under way in the background."""

    path: str
    _metrics: tuple[int, int] | None = None  # rank and world size, where timings are recorded
    _report: SaveReport | None = None

    def hold(self) -> None:
        """Return once the tensors may be changed. Needed after a lazy save only."""
        if self._report is None and _pending.get(self.path) is self:
            _saver().hold()

    def done(self) -> bool:
        """Whether it has been finished, well."""
        return self._report is not None

    def result(self) -> SaveReport:
        """Wait for it. Raises what went wrong with it; SaveFailed where that has been raised before."""
        if self._report is None:
            _saver().wait()
        if self._report is None:
            raise SaveFailed(f"{self.path}: was not saved; the error was raised before")
        return self._report


_background: Saver | None = None
_pending: dict[str, PendingSave] = {}


def _saver() -> Saver:
    global _background
    if _background is None:
        _background = Saver(_finished)
    return _background


def _finished(report: SaveReport) -> None:
    pending = _pending.pop(report.path, None)
    if pending is not None:
        pending._report = report
        if pending._metrics is not None:
            record_save(report, *pending._metrics)


def _write_in_background(
    source: Source, path: str | os.PathLike[str], *, lazy: bool = False, memory: int, timeout: float, metrics: bool
) -> PendingSave:
    """As `_write`, copying now (or at ``hold``, if lazy) and writing later. Collective."""
    folder, name = split_path(path)
    saver = _saver()
    ranks.all_or_none(saver.wait)
    saver.limit(memory)
    recorded = (ranks.rank(), ranks.world_size()) if metrics else None
    pending = PendingSave(os.path.join(os.path.abspath(folder), name), recorded)
    _pending.clear()
    _pending[pending.path] = pending
    saver.save(source, folder, name, latest=False, timeout=timeout)
    if not lazy:
        saver.hold()
    return pending


def split_path(path: str | os.PathLike[str]) -> tuple[str, str]:
    """The folder and the name of a checkpoint at this path. Raises BadArgument where it cannot be one."""
    folder, name = os.path.split(os.path.abspath(path))
    if not name:
        raise BadArgument(f"{os.fspath(path)}: cannot be a checkpoint; name a folder")
    return folder, name
