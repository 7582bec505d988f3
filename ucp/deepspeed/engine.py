"""A DeepSpeed engine whose ``load_checkpoint`` takes a checkpoint of any layout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import wraps
from types import MethodType
from typing import Any

import torch

from ucp.catalog import Catalog
from ucp.changes.changed import Changed
from ucp.checkpoint import open_before
from ucp.deepspeed.config import Config
from ucp.deepspeed.live import LiveEngine, partly, releases
from ucp.deepspeed.live.state import data_rank, data_world, samples_seen, times_counted, warn_of_clipping
from ucp.deepspeed.norms import GradientNorms
from ucp.deepspeed.notes import gradients_note, overridden, weights_notes
from ucp.deepspeed.saves import save_checkpoint
from ucp.deepspeed.snapshots import Snapshots
from ucp.deepspeed.supported import check_engine, check_features, warn_of_own_saves, warn_of_training
from ucp.elastic.layouts import Fitted
from ucp.errors import BadArgument, NotACheckpoint, PartlyLoaded, ProofFailed, Unsupported
from ucp.formats.nouns import ModuleOrder
from ucp.job import ranks, streams
from ucp.job.stopwatch import Stopwatch
from ucp.job.timings import record_load, record_save
from ucp.loading.load import load
from ucp.loading.nouns import Wish
from ucp.loading.read import reading_threads
from ucp.loading.report import LoadReport
from ucp.loading.spec_names import config_of, in_names_of, shapes_of
from ucp.logical.listing import Digests
from ucp.printable import logger
from ucp.progress import tell
from ucp.run_folder import LATEST, is_checkpoint
from ucp.saving.background import Saver
from ucp.saving.digest import digest_source
from ucp.saving.save import SaveReport
from ucp.storage import locations

log = logger(__name__)


class EngineUcp:
    """What a bound engine offers as ``engine.ucp``.

    Attributes
    ----------
    config
        The ``"ucp"`` section of the DeepSpeed config.
    last_load
        The `LoadReport` of the last load, or None before the first.
    last_save
        The `SaveReport` of the last finished save, or None before the first.
    fitted
        How an elastic run divides its batch on the ranks that there are (`ucp.elastic.Fitted`), or None.
    """

    def __init__(self, engine: Any, config: Config, fitted: Fitted | None = None) -> None:
        self._engine = engine
        self.fitted = fitted
        self._rank, self._world = ranks.rank(), ranks.world_size()
        self.config = config
        self.last_load: LoadReport | None = None
        self.last_save: SaveReport | None = None
        self.saver: Saver | None = None
        if config.save.format == "universal" and config.save.background:
            save, live = config.save, LiveEngine(engine)
            memory = save.memory if "memory" in save.model_fields_set else live.staging(save.memory)
            self.saver = Saver(self.saved, memory=memory, policy=save.policy, cache=save.cache)
            self.saver.reserve(live.nbytes_to_save, pinned=live.on_device)

        self._norms = None if config.save.gradient_norms is None else GradientNorms(engine, config.save.gradient_norms)
        self.memory: Snapshots | None = None
        if config.memory.enabled:
            self.memory = Snapshots(engine, config)

    def snapshot(self, client_state: Mapping[str, Any] | None = None) -> bool:
        """Have the keepers in memory take the training state as it is now. Collective.

        Parameters
        ----------
        client_state
            As for ``save_checkpoint``. The default is what ``engine.ucp.client_state`` returns.

        Returns
        -------
        bool
            Whether a snapshot was begun.

        Raises
        ------
        BadArgument
            If the config does not enable snapshots in memory.
        """
        partly.check(self._engine, "engine.ucp.snapshot()")
        if self.memory is None:
            raise BadArgument('nothing is kept in memory: the config needs "ucp": {"memory": {"enabled": true}}')
        return self.memory.take(self.client_state() if client_state is None else client_state)

    def client_state(self) -> Mapping[str, Any]:
        """The client state of the snapshots that are taken every so many steps. A program may replace this method by a
        function of its own, such as ``engine.ucp.client_state = lambda: {"data": order.state_dict()}``."""
        return {}

    def gradient_norms(self) -> dict[str, float]:
        """The norm of each layer's gradient as last measured, by the layer's name; {} before the first measurement.
        ``save_checkpoint`` keeps it in the client state if the config has ``"save": {"gradient_norms": N}``.
        Collective."""
        return {} if self._norms is None else self._norms.merged()

    def hold(self) -> None:
        """Return once the save under way has copied what it needs, so that weights and optimizer states may be changed.

        DeepSpeed's own ways to change them (a step, ``safe_set_*``, ``offload_states``, a load) call it themselves.
        """
        if self.saver is not None:
            self.saver.hold()
        if self.memory is not None:
            self.memory.tier.hold()

    def is_copying(self) -> bool:
        """Whether `hold` would wait, or have the device wait."""
        savers = (self.saver, None if self.memory is None else self.memory.tier.saver)
        return any(saver is not None and saver.is_copying() for saver in savers)

    def wait(self) -> None:
        """Return once this rank has no save under way in the background. Raises what went wrong with the last one."""
        if self.memory is not None:
            self.memory.tier.wait()
        if self.saver is not None:
            self.saver.wait()

    def saved(self, report: SaveReport) -> None:
        """Keep the report of a finished save, and record its timings if the config says so."""
        self.last_save = report
        if self.config.metrics:
            record_save(report, self._rank, self._world)

    def samples(self, numbers: Sequence[int]) -> AbstractContextManager[None]:
        """In this block of the program, forward passes use the random numbers of these samples, the same on any number
        of ranks (`ucp.job.streams`). The config's ``"elastic"`` section has ``"rng": "per_sample"`` and the seed.

        Parameters
        ----------
        numbers
            The samples' numbers in the global order, in the order of the micro-batch.

        Raises
        ------
        BadArgument
            If the config does not say so.
        """
        return streams.samples(self._seed(), self._engine.global_steps, numbers)

    def generator(self, sample: int, use: str = "") -> torch.Generator:
        """A generator on the CPU for one sample of this step, such as for its augmentation. use: what it is for. Raises
        BadArgument as `samples` does."""
        return streams.per_sample(self._seed(), self._engine.global_steps, sample, use)

    def _seed(self) -> int:
        said = self.config.elastic
        if said is None or said.rng != "per_sample":
            raise BadArgument(
                'random numbers belong to ranks here: the config needs "ucp": {"elastic": {"rng": "per_sample"}}'
            )
        return said.seed

    def digest(self) -> Digests:
        """Digest every tensor of the training state that a save would write now. Collective; nothing is gathered.

        Returns
        -------
        Digests
            ``tensors`` has a digest for each name and state, and ``all`` is one for them together. They are equal to
            those of a checkpoint of this state in any layout.

        Raises
        ------
        Mismatch
            If ranks hold different values of what should be the same.
        """
        live = ranks.all_or_none(lambda: LiveEngine(self._engine))
        live.place(self.config.choice(), to_save=True)
        return digest_source(ranks.all_or_none(lambda: live.source({})), threads=reading_threads())

    @property
    def data_rank(self) -> int:
        """This rank's number among the ranks that get different data. Ranks of tensor, pipeline and sequence
        parallelism that see the same samples have the same one."""
        return data_rank(self._engine)

    @property
    def data_world(self) -> int:
        """How many ranks get different data."""
        return data_world(self._engine)

    @property
    def samples_seen(self) -> int:
        """How many samples of the training data this run has consumed, over all layouts that it has had. Each counts
        once, while under AutoTP ``engine.global_samples`` counts it for every tensor-parallel rank that sees it."""
        return samples_seen(self._engine)


def bind(engine: Any, config: Config, fitted: Fitted | None = None) -> None:
    """Replace this one engine's ``load_checkpoint``, and its ``save_checkpoint`` if the config says so. No class and no
    other engine is changed. fitted: as in `EngineUcp`."""
    ranks.all_or_none(lambda: releases.require(engine))
    ranks.all_or_none(lambda: _check_dropout(engine, config))
    if config.save.format == "universal":
        advice = 'use "ucp": {"save": {"format": "deepspeed"}}, which saves as DeepSpeed does'
        ranks.all_or_none(lambda: check_features(engine, advice))
    warn_of_training(engine)
    if config.save.format != "universal":
        warn_of_own_saves(engine)
    engine.ucp = EngineUcp(engine, config, fitted)
    engine.load_checkpoint = MethodType(load_checkpoint, engine)
    if config.save.format == "universal":
        engine.save_checkpoint = MethodType(save_checkpoint, engine)
    if fitted is not None and fitted.is_uneven:
        _count_samples(engine, fitted)
    if engine.ucp.memory is not None:
        engine.ucp.memory.follow()


def _check_dropout(engine: Any, config: Config) -> None:
    """Refuse dropout whose masks belong to ranks where random numbers are to belong to samples."""
    if config.elastic is None or config.elastic.rng != "per_sample":
        return
    nn = torch.nn
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    for name, module in engine.module.named_modules():
        if isinstance(module, kinds) and module.p:
            raise BadArgument(
                f"'{name}' is a {type(module).__name__}, whose masks depend on the number of ranks, and the config has "
                '"rng": "per_sample"; use ucp.job.streams.SampleDropout in its place, or "per_rank"'
            )


def _count_samples(engine: Any, fitted: Fitted) -> None:
    """After each step correct the count of samples, to which DeepSpeed adds as if each micro-batch were full."""
    original = engine.step

    @wraps(original)
    def step(_: Any, *args: Any, **kwargs: Any) -> Any:
        before = engine.global_samples
        result = original(*args, **kwargs)
        if engine.global_samples != before:
            engine.global_samples = before + fitted.batch * times_counted(engine)
        return result

    engine.step = MethodType(step, engine)


def load_checkpoint(
    engine: Any,
    load_dir: str,
    tag: str | int | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Callable[..., Any] | None = None,
) -> tuple[str | None, dict[str, Any] | None]:
    """Restore the engine from a checkpoint of any supported format and layout, exactly, or refuse.

    The arguments are those of DeepSpeed's own method. Returns (path, client state), or (None, None) with a warning if
    ``tag`` is None and the folder holds no checkpoint and no ``latest``. Collective: every rank calls it. All of them
    refuse together, and then nothing has changed.

    Raises Mismatch if anything would stay unrestored or unused, Unsupported (by name), NotACheckpoint,
    DamagedCheckpoint and UnsafePickle. Raises PartlyLoaded if something fails when part of the state is in place, such
    as an I/O error: then the engine refuses to train and to save until a load succeeds. Raises ProofFailed after
    everything was put in place.
    """
    config: Config = engine.ucp.config
    ranks.all_or_none(engine.ucp.wait)
    watch = Stopwatch()
    ranks.all_or_none(lambda: _check(engine, custom_load_fn, config))
    scheduler = load_lr_scheduler_states and not load_module_only and config.load.lr_scheduler == "keep"
    states = load_optimizer_states and not load_module_only
    target = ranks.all_or_none(lambda: watch.timed("plan", lambda: _target(engine, states, scheduler)))
    place, tag = (load_dir, tag) if engine.ucp.memory is None else engine.ucp.memory.source(load_dir, tag)
    shapes = shapes_of(engine.module)
    local = [ModuleOrder.of_group(g.names, shapes) for g in target.groups]
    watch.timed("plan", lambda: target.place(config.choice()))
    # A pipeline stage's names are those of the whole model, so the names of all stages can be given, which say more.
    names = [g.names for g in target.groups] if target.layout.pp > 1 else local
    live = {*(m.name for s in target.slots for m in s.members), *target.elsewhere}
    asked = (place, tag, config, names, live, shapes, config_of(engine.module))
    found = ranks.from_first(lambda: watch.timed("open", lambda: _open(*asked)))
    if found is None:
        _tell_of_nothing(load_dir)
        return None, None
    path, catalog = found
    optimizer = load_optimizer_states and target.trains
    target.make_room(catalog, states and target.trains)
    changed = _as_changed(catalog, config, target, config_of(engine.module))
    wish = Wish(
        weights_only=load_module_only,
        optimizer=optimizer,
        strict=load_module_strict,
        allow_missing=config.load.allow_missing,
        allow_unused=config.load.allow_unused,
        grown=changed.grown,
    )
    how = {**config.load.options(), "changes": changed.lines}
    report = _loaded(engine, changed.catalog, target, wish, path=path, watch=watch, **how)
    if states and target.trains:
        report = report.noted(*gradients_note(engine, catalog))
    _tell_of(engine, report, path)
    if not load_module_only:
        warn_of_clipping(engine, catalog.training_state)
    return _returned_path(path), _client_state(catalog)


def _target(engine: Any, states: bool, scheduler: bool) -> LiveEngine:
    target = LiveEngine(engine, load_lr_scheduler=scheduler)
    if states:
        target.foresee_states()
    return target


def _as_changed(catalog: Catalog, config: Config, target: LiveEngine, model: Mapping[str, Any] | None) -> Changed:
    """The checkpoint as the model has it now, by what the config declares. Collective if it declares anything."""
    given = config.load.changes
    if given is None:
        return Changed(catalog)
    from ucp.changes import applied, of_all_ranks, outline_of  # late: most loads declare nothing
    from ucp.spec.changes import read

    outline = of_all_ranks(outline_of(target))
    return ranks.all_or_none(lambda: applied(catalog, read(given), outline, model))


def _loaded(engine: Any, *args: Any, **how: Any) -> LoadReport:
    """`ucp.loading.load.load`. If it fails half-way, the engine refuses to train and to save until one succeeds."""
    try:
        report = load(*args, **how)
    except PartlyLoaded as error:
        partly.refuse(engine, str(error))
        raise
    except ProofFailed:
        partly.allow(engine)  # everything is in place, and the error says that it is not to be trained on
        raise
    partly.allow(engine)
    return report


def _tell_of_nothing(load_dir: str) -> None:
    if ranks.rank() == 0:
        log.warning("%s: no checkpoint there; nothing was loaded (load_checkpoint returns None)", load_dir)


def _tell_of(engine: Any, report: LoadReport, path: str) -> None:
    """Keep a load's report, write its timings if the config wants them, and log it on the first rank."""
    if engine.ucp.memory is not None:
        engine.ucp.memory.loaded()
    own = overridden(engine)
    report = replace(report, changes=(*report.changes, *own))
    engine.ucp.last_load = report
    if engine.ucp.config.metrics:
        record_load(path, report.bytes_read, report.seconds, report.overlapping)
    if ranks.rank() == 0:
        for text in (*report.warnings, *weights_notes(report), *own):
            log.warning("%s", text)
        tell(log, str(report))


def _client_state(catalog: Catalog) -> dict[str, Any]:
    """What this rank gave to the save, if as many ranks resume as saved; else what the first rank gave."""
    own = catalog.training_state.extra.get("ranks", ())
    if len(own) == ranks.world_size() and "client_state" in own[ranks.rank()]:
        return dict(own[ranks.rank()]["client_state"])
    return dict(catalog.training_state.client_state)


def _check(engine: Any, custom_load_fn: Callable[..., Any] | None, config: Config) -> None:
    override = config.load.override
    groups = getattr(engine.optimizer, "param_groups", ())  # what only computes has none
    odd = [name for name in override if not groups or not all(name in group for group in groups)]
    if odd:
        raise BadArgument(
            f'"ucp": {{"load": {{"override"}}}} has \'{odd[0]}\', which the param groups here do not have'
        )
    if "lr" in override and engine.lr_scheduler is not None:
        raise BadArgument(
            '"ucp": {"load": {"override": {"lr"}}} would last until the lr scheduler\'s next step; give the scheduler '
            'another rate and "lr_scheduler": "reset"'
        )
    if custom_load_fn is not None:
        raise Unsupported("custom_load_fn is not supported: weights are restored by name, never through a function")
    check_engine(engine)


def _open(
    load_dir: str,
    tag: str | int | None,
    config: Config,
    names: Sequence[Sequence[str]],
    live: Collection[str],
    shapes: Mapping[str, Sequence[int]],
    model: Mapping[str, Any] | None,
) -> tuple[str, Catalog] | None:
    """The checkpoint's folder and its catalog, whose training state has real tensors. None if there is no checkpoint.

    names: rank 0's own in each group. live: all names of the model, for a spec. shapes: of rank 0's parameters.
    """
    try:
        with open_before(
            config.load.changes,
            model,
            load_dir,
            config.spec,
            tag,
            sizes=config.sizes,
            trust_client_state=config.trust_client_state,
            trust_paths=config.load.trust_paths,
            allow_approximate=config.load.allow_approximate,
            param_names=names,
            param_shapes=shapes,
            options=config.load.reading,
        ) as checkpoint:
            catalog = replace(checkpoint.catalog, training_state=checkpoint.training_state)
            if config.spec is not None:
                catalog = in_names_of(catalog, live, config.choice().bound(model))
            return str(checkpoint.path), catalog
    except NotACheckpoint:
        place = locations.locate(load_dir)
        if tag is not None or locations.exists(place / LATEST) or is_checkpoint(place):
            raise
        return None


def _returned_path(path: str) -> str:
    """The path to return: for DeepSpeed's own checkpoints the model file, as DeepSpeed does; for others the folder."""
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if locations.is_file(locations.locate(path) / name):
            return str(locations.locate(path) / name)
    return path
