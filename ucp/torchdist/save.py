"""Save the state dict of a torch.distributed program (FSDP2, HSDP, tensor parallelism, DDP, one process).

    import ucp
    state = {"model": model_state_dict, "optim": optimizer_state_dict, "epoch": epoch}
    ucp.save(state, "runs/step-1000")          # as torch.distributed.checkpoint.save

Every rank writes its own fragments. Parameters, optimizer states and hyperparameters are kept by the names of
``torch.distributed.checkpoint.state_dict`` (nested or flattened), so what is saved here resumes under DeepSpeed, too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ucp import limits
from ucp.errors import BadArgument, SaveFailed
from ucp.job import ranks
from ucp.job.timings import record_save
from ucp.printable import logger
from ucp.saving.background import Saver
from ucp.saving.save import SaveReport
from ucp.saving.save import save as save_source
from ucp.saving.source import Source
from ucp.torchdist.source import make_source
from ucp.torchdist.state_dicts import unwrap

log = logger(__name__)


def save(
    state_dict: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    timeout: float = limits.SAVE_TIMEOUT_SECONDS,
    metrics: bool = False,
) -> SaveReport:
    """Save a state dict as the checkpoint ``path``. Collective over all ranks; without a process group, one process.

    A checkpoint at ``path`` is replaced in one rename once the new one is whole. Until then, and after any failure, it
    stays as it was.

    Parameters
    ----------
    state_dict
        Tensors, DTensors, Stateful objects and plain Python values, nested in any way. If each rank has a value of its
        own under one name (a tensor that is no DTensor, such as a random number generator's state), every rank's value
        is kept. These come back if the same number of ranks load.
    path
        The checkpoint's folder.
    timeout
        How many seconds the first rank waits for the others.
    metrics
        Add every rank's timings to ``ucp-metrics.jsonl`` beside the checkpoint.

    Returns
    -------
    SaveReport

    Raises
    ------
    Unsupported
        An entry, which the message names, cannot be kept exactly.
    DestinationError
        The folder cannot be written.
    SaveFailed
        A rank failed, or the ranks contradict each other.

    Every rank raises the same error.
    """
    return write(make_source(unwrap(state_dict)), path, timeout, metrics)


def async_save(
    state_dict: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    lazy: bool = False,
    memory: int = limits.STAGING_BYTES,
    timeout: float = limits.SAVE_TIMEOUT_SECONDS,
    metrics: bool = False,
) -> PendingSave:
    """Save as `save` does, but return once everything is copied to host memory. Another process writes it. Collective.

    Only one save is under way at a time. The next one waits for it, and raises what went wrong with it. The program's
    exit waits for it, too.

    Parameters
    ----------
    state_dict, path, timeout, metrics
        As for `save`.
    lazy
        Return before everything is copied, so that it is copied during forward and backward. Call ``hold()`` on what is
        returned before anything changes the tensors.
    memory
        How many bytes of host memory a rank's copies may take. The memory is kept for the next save. If a rank has more
        to save, it copies and writes in turns, and the call or ``hold()`` waits for most of that.

    Returns
    -------
    PendingSave
        Its ``result()`` waits for the report.

    Raises
    ------
    Unsupported, DestinationError, SaveFailed
        As for `save`, as far as the call itself finds them. The rest is raised by ``result()`` or by the next save.
    """
    source = make_source(unwrap(state_dict))
    return write_in_background(source, path, lazy=lazy, memory=memory, timeout=timeout, metrics=metrics)


def write(source: Source, path: str | os.PathLike[str], timeout: float, metrics: bool) -> SaveReport:
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
        """Return once the tensors may be changed. Only a lazy save needs it."""
        if self._report is None and _pending.get(self.path) is self:
            background_saver().hold()

    def done(self) -> bool:
        """Whether it has finished successfully."""
        return self._report is not None

    def result(self) -> SaveReport:
        """Wait for the save.

        Returns
        -------
        SaveReport

        Raises
        ------
        SaveFailed
            The save failed, and its error was already raised elsewhere.
        UcpError
            What went wrong with the save.
        """
        if self._report is None:
            background_saver().wait()
        if self._report is None:
            raise SaveFailed(f"{self.path}: was not saved; the error was raised before")
        return self._report


_background: Saver | None = None
_pending: dict[str, PendingSave] = {}


def background_saver() -> Saver:
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


def write_in_background(
    source: Source, path: str | os.PathLike[str], *, lazy: bool = False, memory: int, timeout: float, metrics: bool
) -> PendingSave:
    """As `write`, but copy now (or at ``hold``, if lazy) and write later. Collective."""
    folder, name = split_path(path)
    saver = background_saver()
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
    """The folder and the name of a checkpoint at this path. Raises BadArgument if the path cannot be a checkpoint's."""
    folder, name = os.path.split(os.path.abspath(path))
    if not name:
        raise BadArgument(f"{os.fspath(path)}: cannot be a checkpoint; name a folder")
    return folder, name
