"""Merge checkpoints of any formats and layouts into one of any format and layout (`ucp.merge`)."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ucp import formats
from ucp.catalog import Catalog
from ucp.checkpoint import open as open_checkpoint
from ucp.errors import BadArgument
from ucp.formats.nouns import WriteRequest
from ucp.logical.listing import TensorDigest, combined
from ucp.merging.assignment import AssignedSource, Assignment, assigned
from ucp.merging.computed import scratch_bytes
from ucp.merging.language import MergeFile
from ucp.merging.methods import MethodOptions
from ucp.merging.metrics import recorded
from ucp.merging.operations import Combination
from ucp.merging.plan import MergeRules, MergeSource, merged_catalog
from ucp.merging.vocabulary import CUT, check_choice, with_cut_vocabularies
from ucp.merging.words import told
from ucp.parallel.mesh import Layout, parse_layout
from ucp.settings import check_layout, check_replaced, divide_settings
from ucp.spec.select import choose
from ucp.storage.dtypes import FLOAT_SPELLINGS
from ucp.storage.locations import is_remote, locate, tagged
from ucp.transfer.destination import Running, carry_out
from ucp.transfer.targets import TargetFile, WritePlan
from ucp.transfer.windows import LEAST_BYTES, budget, check_files
from ucp.units import bytes_text, counted, took
from ucp.version import version

RECORD = "merge.json"
TAG = "merged"


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, or would do (``dry_run``).

    Attributes
    ----------
    sources
        As they were given.
    destination, to, layout, tag
        The destination's path or URL, format, layout and tag. layout and tag may be None.
    method
        Its name, or the merge file.
    weights
        Those of a linear method, normalised; else None.
    lines
        Description of each operation -> how many parameters it is used for.
    parameters, tensors, files, bytes_written
        How many the destination has. A tensor is one state of one parameter.
    optimizer
        How optimizer states were merged, as in `MergeSettings`.
    seconds
        The time from opening the sources to the end.
    dry_run
        Whether nothing was written.
    """

    sources: tuple[str, ...]
    destination: str
    method: str
    weights: tuple[float, ...] | None
    lines: Mapping[str, int]
    to: str
    layout: str | None
    tag: str | None
    parameters: int
    tensors: int
    files: int
    bytes_written: int
    optimizer: str
    seconds: float
    dry_run: bool

    def __str__(self) -> str:
        did = "would write" if self.dry_run else "wrote"
        weights = "" if self.weights is None else f" ({', '.join(f'{w:.6g}' for w in self.weights)})"
        states = "weights alone" if self.optimizer == "none" else f"optimizer states: {self.optimizer}"
        what = f"{counted(self.parameters, 'parameter')} of {counted(len(self.sources), 'checkpoint')}"
        return (
            f"{did} {self.destination}: {what} by "
            f"{self.method}{weights}, {states}, {bytes_text(self.bytes_written)}{took(self.seconds, self.dry_run)}"
        )


@dataclass(frozen=True)
class MergeSettings:
    """What a merge does with everything that is not plainly a weight of a source.

    - only: patterns of the parameters that are merged. The others are taken from the base, or else the first source.
    - optimizer: 'none' for weights alone. 'average' averages states as the weights are. A number k, from 0, takes the
      states, counters and scheduler of that source.
    - step: 'max' takes the largest step count where averaged ones differ. None refuses those.
    - buffers: the number, from 0, of the source whose integer tensors count where they differ. None refuses those.
    - dtype: the element type of the weights: 'bf16', 'fp16', 'fp32'. The default is the widest among the sources.
    - allow_nonfinite: merge NaN and infinity instead of refusing them.
    - vocab: 'cut' cuts embeddings of different widths to the rows of the smallest one. None refuses them.
    """

    only: Sequence[str] = ()
    optimizer: str | int = "none"
    step: str | None = None
    buffers: int | None = None
    dtype: str | None = None
    allow_nonfinite: bool = False
    vocab: str | None = None


def merge(
    sources: Sequence[str | os.PathLike[str]],
    dest: str | os.PathLike[str],
    method: str = "linear",
    to: str = formats.DEFAULT_TARGET,
    layout: str | Layout | None = None,
    spec: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    masks: Sequence[str | os.PathLike[str]] = (),
    recipe: str | os.PathLike[str] | MergeFile | None = None,
    **settings: Any,
) -> MergeReport:
    """Merge checkpoints. Each tensor is computed in float64, in the order of the sources, and rounded once.

    Parameters
    ----------
    sources
        Checkpoints of any formats and layouts that `ucp.open` reads. ``path@tag`` is one in a folder of several. Give
        none with a recipe, which names its sources itself.
    dest, to, layout, spec
        As for `ucp.convert`.
    method
        One of `ucp.merging.methods.METHODS`: linear, lerp, slerp, task, ties, dare, ema, lawa or mwa.
    base
        For task, ties and dare: the checkpoint that all sources began from.
    masks
        For task: checkpoints with tensors that the differences are multiplied by, one for each source.
    recipe
        A merge file, in place of a method.
    settings
        The method's options (fields of `MethodOptions`), the fields of `MergeSettings`, and settings of `ucp.convert`:
        those of the run (workers, max_memory, overwrite, resume, dry_run, team, progress), those for opening the
        sources, and the target's own.

    Returns
    -------
    MergeReport

    Raises
    ------
    BadArgument, SpecError, Mismatch, Unsupported
        If an argument or a merge file is wrong, or the sources do not fit. The destination is as it was before.
    """
    started = time.monotonic()
    options = _taken(MethodOptions, settings)
    treated = MergeSettings(**_taken(MergeSettings, settings))
    check_choice(treated.vocab)
    if method == "mwa" and options.get("metrics") is None:
        form = options.get("form") or "loss"
        options["metrics"] = tuple(_metric(source, form) for source in sources)
    work = assigned(sources, method, MethodOptions(**options), base, masks, recipe)
    report = _carried_out(work, str(locate(dest)), to, layout, spec, treated, settings, options)
    return dataclasses.replace(report, seconds=time.monotonic() - started)


def _taken(kind: type[MethodOptions | MergeSettings], settings: dict[str, Any]) -> dict[str, Any]:
    """Remove the settings that are fields of a class, and return them."""
    return {f.name: settings.pop(f.name) for f in dataclasses.fields(kind) if f.name in settings}


def _carried_out(
    work: Assignment,
    destination: str,
    to: str,
    layout: str | Layout | None,
    spec: str | os.PathLike[str] | None,
    treated: MergeSettings,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
) -> MergeReport:
    """Plan the merge and write it. settings: those for opening, those of the run, and the target's own."""
    target = formats.target(to)
    shape = parse_layout(layout) if isinstance(layout, str) else layout
    check_layout(target, shape)
    opening, running, own = divide_settings(target, settings)
    running = _within(running, len(work.sources))
    states = _source_of_states(treated.optimizer, work)
    counted = None if treated.buffers is None else work.first + _numbered(treated.buffers, work)
    dtype = None if treated.dtype is None else _float(treated.dtype)
    with ExitStack() as stack:
        opened = [_opened(one, spec, opening, stack) for one in work.sources]
        opened = with_cut_vocabularies(opened) if treated.vocab == CUT else opened
        operation = work.operation_for(treated.only, opened[0].catalog.parameters)
        rules = MergeRules(operation, dtype, states, treated.step, counted, not treated.allow_nonfinite)
        catalog = merged_catalog(opened, rules)
        where = opened[0].checkpoint.path
        choice = choose(spec, opening.get("model_config"), opening.get("sizes"))
        request = WriteRequest(where, "merge", destination, TAG, shape, choice, own, running.workers)
        lines = _lines(catalog, operation)
        plan = _with_record(target.plan(catalog, request), _record(work, opened, lines, options))
        if running.overwrite and not is_remote(destination):
            check_replaced(Path(destination), plan.source)
        check_files(plan.files)
        written = carry_out(plan, destination, running)
    return MergeReport(
        tuple(one.path for one in work.sources),
        destination,
        work.method,
        work.weights,
        lines,
        to,
        None if plan.layout is None else str(plan.layout),
        plan.tag,
        len(catalog.parameters),
        len(catalog.tensors),
        written.files,
        written.nbytes,
        str(treated.optimizer),
        0.0,
        running.dry_run,
    )


def _float(spelling: str) -> str:
    """The element type that is wanted for weights. Raises BadArgument."""
    if spelling not in FLOAT_SPELLINGS:
        raise BadArgument(
            f"merged weights are of a floating type, found '{spelling}'; known are {', '.join(FLOAT_SPELLINGS)}"
        )
    return FLOAT_SPELLINGS[spelling]


def _within(running: Running, sources: int) -> Running:
    """How the merge is written: the memory for reading its sources is subtracted from the limit, and there are no more
    threads than fit.

    Raises BadArgument for a limit that is too small for one thread.
    """
    if running.max_memory is None:
        return running
    scratch = scratch_bytes(sources)
    workers, _ = budget(running.workers, running.max_memory)
    least = LEAST_BYTES + scratch
    if running.max_memory < least:
        raise BadArgument(
            f"a memory limit of {running.max_memory} bytes is too little to merge {sources} checkpoints in; at least "
            f"{least} are needed"
        )
    workers = max(min(workers, running.max_memory // least), 1)
    return dataclasses.replace(running, workers=workers, max_memory=running.max_memory - workers * scratch)


def _source_of_states(optimizer: str | int, work: Assignment) -> str | int:
    """The rule for optimizer states. A source's number becomes its number among all opened ones. Raises BadArgument."""
    if isinstance(optimizer, int) and 0 <= optimizer < work.count:
        return work.first + optimizer
    if optimizer in ("none", "average"):
        return optimizer
    raise BadArgument(
        f"optimizer is 'none', 'average' or the number of a source, 0 to {work.count - 1}, found {optimizer!r}"
    )


def _numbered(buffers: int, work: Assignment) -> int:
    """The number of a source. Raises BadArgument for one that there is not."""
    if not 0 <= buffers < work.count:
        raise BadArgument(f"buffers is the number of a source, 0 to {work.count - 1}, found {buffers!r}")
    return buffers


def _opened(
    one: AssignedSource, spec: str | os.PathLike[str] | None, opening: Mapping[str, Any], stack: ExitStack
) -> MergeSource:
    path, tag = tagged(one.path)
    checkpoint = stack.enter_context(open_checkpoint(path, spec, **({**opening, "tag": tag} if tag else opening)))
    return MergeSource(one.name, checkpoint, one.is_mask)


def _metric(source: str | os.PathLike[str], form: str) -> float:
    path, tag = tagged(os.fspath(source))
    with open_checkpoint(path, tag=tag) as checkpoint:
        return recorded(checkpoint, form)


def _lines(catalog: Catalog, operation: Callable[[str], Combination]) -> dict[str, int]:
    """Description of each operation -> how many parameters it is used for."""
    out: dict[str, int] = {}
    for name in catalog.parameters:
        text = told(operation(name))
        out[text] = out.get(text, 0) + 1
    return out


def _record(
    work: Assignment, opened: Sequence[MergeSource], lines: Mapping[str, int], options: Mapping[str, Any]
) -> bytes:
    """The contents of ``merge.json``: from which sources, and how, the checkpoint was made."""
    said = {
        "merge": 1,
        "version": version(),
        "method": work.method,
        "options": options,
        "weights": work.weights,
        "sources": [
            {
                "name": one.name,
                "path": str(one.checkpoint.path),
                "format": one.checkpoint.format,
                "layout": str(one.checkpoint.layout),
                "step": one.catalog.training_state.global_steps,
                "digest": digest_of(one.catalog),
            }
            for one in opened
        ],
        "operations": lines,
    }
    return (json.dumps(said, indent=2, sort_keys=False) + "\n").encode()


def digest_of(catalog: Catalog) -> str | None:
    """The logical digest of all of a checkpoint's tensors, as ``ucp digest`` prints it. It is the same in any layout.
    None if the checkpoint has not recorded the digests of all tensors."""
    found = [
        TensorDigest(t.name, t.state, t.dtype, t.shape, t.digest.whole)
        for t in catalog.tensors.values()
        if t.digest is not None
    ]
    return combined(found) if len(found) == len(catalog.tensors) else None


def _with_record(plan: WritePlan, record: bytes) -> WritePlan:
    """The plan with ``merge.json`` among its files."""
    name = RECORD if plan.tag is None else f"{plan.tag}/{RECORD}"
    return dataclasses.replace(plan, files=(TargetFile(name, len(record), ((0, record),), ()), *plan.files))
