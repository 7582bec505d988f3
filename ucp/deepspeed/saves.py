"""An engine's ``save_checkpoint`` in the universal format's fragmented form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ucp.deepspeed.config import Config
from ucp.deepspeed.live import LiveEngine
from ucp.deepspeed.live.hold import hold_updates, let_forward_go
from ucp.deepspeed.supported import check_features
from ucp.job import ranks
from ucp.printable import logger
from ucp.repair.refill import NORMS
from ucp.saving.retention import Keep
from ucp.saving.save import save

log = logger(__name__)


def save_checkpoint(
    engine: Any,
    save_dir: str | os.PathLike[str],
    tag: str | int | None = None,
    client_state: Mapping[str, Any] = {},  # as DeepSpeed's own signature has it; never changed
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> bool:
    """Save the engine's whole training state as ``save_dir/tag``. It can be resumed on any layout. Collective.

    The arguments are those of DeepSpeed's own method. The default tag is ``global_step{N}``. All ranks have to give the
    same tag. client_state: plain data and tensors; every rank's own is kept.

    It returns at once. The next optimizer step waits until the tensors are copied to host memory. What goes wrong later
    is raised at the next save or load, at ``engine.ucp.wait()`` or at exit. With ``"async": false`` in the config it
    returns once the checkpoint is on disk. What was there before stays as it was until the new checkpoint is whole.

    Returns True, or False if ``"policy": "skip"`` in the config made it skip this save. Raises on every rank:
    DestinationError (no space, not writable), Unsupported (by name), SaveFailed (a rank failed).
    """
    if not save_dir:
        raise ValueError(f"save_dir must name a folder, found {save_dir!r}")
    config: Config = engine.ucp.config
    name = f"global_step{engine.global_steps}" if tag is None else str(tag)
    engine._checkpoint_tag_validation(name)
    if norms := engine.ucp.gradient_norms():
        client_state = {**client_state, NORMS: norms}
    live = ranks.all_or_none(lambda: _live(engine))
    live.place(config.choice(), to_save=True)
    frozen, late = not exclude_frozen_parameters, engine.ucp.saver is not None
    source = ranks.all_or_none(lambda: live.source(client_state, frozen=frozen, late=late))
    if engine.ucp.memory is not None:
        engine.ucp.memory.name_after(save_dir)
    keep = None if config.save.keep_last is None else Keep(config.save.keep_last, config.save.keep_every)
    if engine.ucp.saver is not None:
        hold_updates(engine, engine.ucp.hold)
        let_forward_go(engine, engine.ucp.is_copying)
        begun: bool = engine.ucp.saver.save(
            source, save_dir, name, latest=save_latest, timeout=config.save.timeout, keep=keep
        )
        return begun
    report = save(source, save_dir, name, latest=save_latest, timeout=config.save.timeout, keep=keep)
    engine.ucp.saved(report)
    if ranks.rank() == 0:
        log.info("%s", report)
    return True


def _live(engine: Any) -> LiveEngine:
    check_features(engine, 'nothing was saved; "ucp": {"save": {"format": "deepspeed"}} saves as DeepSpeed does')
    steps = engine.gradient_accumulation_steps()
    if engine.micro_steps % steps and ranks.rank() == 0:
        log.warning(
            "save_checkpoint was called in the middle of gradient accumulation (%d of %d micro-steps done): the "
            "gradients so far are not part of a checkpoint, and it can be loaded after a step only",
            engine.micro_steps % steps,
            steps,
        )
    return LiveEngine(engine)
