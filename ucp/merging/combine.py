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
from ucp.parallel.mesh import Layout, parse_layout
from ucp.settings import check_layout, check_replaced, divide_settings
from ucp.spec.select import choose
from ucp.storage.dtypes import FLOAT_SPELLINGS
from ucp.storage.locations import exists, is_remote, locate
from ucp.transfer.destination import Running, carry_out
from ucp.transfer.targets import TargetFile, WritePlan
from ucp.transfer.windows import LEAST_BYTES, budget, check_files
from ucp.version import version

RECORD = "merge.json"
TAG = "merged"


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, or would do (``dry_run``).

    sources: as they were given. method: its name, or the merge file. weights: of a linear method, normalised; else
    None. lines: for every operation how many parameters it is for, by its description. layout, tag: of the destination.
    bytes_written: of the destination; seconds: from opening the sources to the end.
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
        return (
            f"{did} {self.destination}: {self.parameters} parameters of {len(self.sources)} checkpoints by "
            f"{self.method}{weights}, {states}, {self.bytes_written / 1e9:.3f} GB in {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class MergeSettings:
    """What a merge does with all that is not plainly a weight of a source.

    only: patterns of the parameters that are merged; the others are the base's, or the first source's.
    optimizer: 'none': weights alone. 'average': states are averaged as the weights are. A number k, from 0: states,
    counters and scheduler of that source. step: 'max' where averaged step counts differ.
    buffers: the source, from 0, whose integer tensors count where they differ.
    dtype: of the weights: 'bf16', 'fp16', 'fp32'; default is the widest among the sources.
    allow_nonfinite: merge NaN and infinity instead of refusing them.
    vocab: 'cut' embeddings of different widths to the smallest one's rows; None refuses them.
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
    """Merge checkpoints; each tensor is computed in float64, in the order of the sources, and rounded once.

    Parameters
    ----------
    sources
        Checkpoints that `ucp.open` reads, of any formats and layouts, ``path@tag`` for one of a folder of several. With
        a recipe, which names its sources itself: none.
    dest, to, layout, spec
        As for `ucp.convert`.
    method
        One of `ucp.merging.methods.METHODS`.
    base
        The checkpoint that all sources began from, for task, ties and dare. masks: checkpoints with the tensors that
        the differences are multiplied by, one for each source (task).
    recipe
        A merge file, in place of a method.
    settings
        The method's options (fields of `MethodOptions`), the fields of `MergeSettings`, and what `ucp.convert` takes:
        of the run (workers, max_memory, overwrite, resume, dry_run, team, progress), of opening the sources, and the
        target's own.

    Raises
    ------
    UcpError
        BadArgument, SpecError, Mismatch, Unsupported as each says; the destination is untouched then.
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
    """Those of the settings that are fields of a class; they are taken out."""
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
    """Plan the merge and write it. settings: of opening, of the run, and the target's own."""
    target = formats.target(to)
    shape = parse_layout(layout) if isinstance(layout, str) else layout
    check_layout(target, shape)
    opening, running, own = divide_settings(target, settings)
    running = _within(running, len(work.sources))
    states = _source_of_states(treated.optimizer, work)
    counted = None if treated.buffers is None else work.first + treated.buffers
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
    """The element type that weights are wanted in. Raises BadArgument."""
    if spelling not in FLOAT_SPELLINGS:
        raise BadArgument(
            f"merged weights are of a floating type, found '{spelling}'; known are {', '.join(FLOAT_SPELLINGS)}"
        )
    return FLOAT_SPELLINGS[spelling]


def _within(running: Running, sources: int) -> Running:
    """How the merge is written, with the memory for its sources taken off the limit, and as few threads as that needs.

    Raises BadArgument for a limit that is too little for one thread.
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
    """The rule for optimizer states, with the source's number among all that are opened. Raises BadArgument."""
    if isinstance(optimizer, int) and 0 <= optimizer < work.count:
        return work.first + optimizer
    if optimizer in ("none", "average"):
        return optimizer
    raise BadArgument(
        f"optimizer is 'none', 'average' or the number of a source, 0 to {work.count - 1}, found {optimizer!r}"
    )


def _opened(
    one: AssignedSource, spec: str | os.PathLike[str] | None, opening: Mapping[str, Any], stack: ExitStack
) -> MergeSource:
    path, tag = _tagged(one.path)
    checkpoint = stack.enter_context(open_checkpoint(path, spec, **({**opening, "tag": tag} if tag else opening)))
    return MergeSource(one.name, checkpoint, one.is_mask)


def _tagged(text: str) -> tuple[str, str | None]:
    """A path and a tag: of ``path@tag`` where no such path is."""
    path, at, tag = text.rpartition("@")
    return (path, tag) if at and not exists(locate(text)) else (text, None)


def _metric(source: str | os.PathLike[str], form: str) -> float:
    path, tag = _tagged(os.fspath(source))
    with open_checkpoint(path, tag=tag) as checkpoint:
        return recorded(checkpoint, form)


def _lines(catalog: Catalog, operation: Callable[[str], Combination]) -> dict[str, int]:
    """Each operation as people read it, with the number of parameters that it is for."""
    out: dict[str, int] = {}
    for name in catalog.parameters:
        text = repr(operation(name))
        out[text] = out.get(text, 0) + 1
    return out


def _record(
    work: Assignment, opened: Sequence[MergeSource], lines: Mapping[str, int], options: Mapping[str, Any]
) -> bytes:
    """What ``merge.json`` says: by which sources and how the checkpoint came about."""
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
    """The logical digest of all of a checkpoint's tensors, the same in any layout, as ``ucp digest`` tells it; None
    where it has not recorded those of all."""
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
