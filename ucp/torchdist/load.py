"""Fill the state dict of a torch.distributed program from a checkpoint of any format and layout.

    import ucp
    ucp.load(state, "runs/step-1000")          # into its tensors, in place, whatever layout or framework saved

A load reads only the byte ranges that a rank's shards need. The layout may be any other one, and so may the framework:
parameters, optimizer states and hyperparameters are found by the names of ``torch.distributed.checkpoint.state_dict``
(nested or flattened), so a DeepSpeed checkpoint loads, too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.stateful import Stateful

from ucp.catalog import Catalog
from ucp.checkpoint import open as open_checkpoint
from ucp.formats.nouns import ModuleOrder
from ucp.formats.shared.roles import PARAM, assign
from ucp.job import ranks
from ucp.job.stopwatch import Stopwatch
from ucp.job.timings import record_load
from ucp.loading.exchange import ADAPTIVE
from ucp.loading.load import LoadReport
from ucp.loading.load import load as load_target
from ucp.loading.match import Wish
from ucp.loading.spec_names import under_spec
from ucp.printable import logger
from ucp.torchdist.state_dicts import flatten, unwrap
from ucp.torchdist.target import StateDictTarget

log = logger(__name__)


def load(
    state_dict: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    allow_missing: Sequence[str] = (),
    verify: bool = True,
    read_once: bool | str = ADAPTIVE,
    metrics: bool = False,
    prove: bool | str = True,
    **opening: Any,
) -> LoadReport:
    """Fill a state dict from a checkpoint of any supported format and layout. Collective.

    Tensors and DTensors are filled in place, each rank's shards with the bytes that they need; other values are
    replaced; Stateful objects are given their loaded state. What the state dict does not ask for is not read, and is
    told in the report. Hyperparameters that say how an optimizer is implemented (foreach, fused, ...) stay.

    Parameters
    ----------
    state_dict
        tensors, DTensors, Stateful objects and plain values, nested or flattened.
    path, opening
        as for `ucp.open` (tag, spec, model_config, ...); a spec's ``names:`` tell what a checkpoint of another
        framework calls the parameters.
    allow_missing
        patterns of what may stay as it is: flat names ("optim.*"), or parameters' names and ``name:state``.
    verify
        check digests, where the checkpoint has them, and the CRC-32s of torch's records that this rank reads whole.
    read_once
        have each byte that several ranks want (replicas, plain tensors) read by one of them and exchanged; 'adaptive':
        where that is measured to be faster.
    metrics
        as for `save`.
    prove
        afterwards compare what is live with the checkpoint's logical digests, on all ranks together: True: where it
        has them (much in host memory is sampled); 'full': never a sample; 'always': those of a checkpoint without them
        are computed from its files, too; False: never. The report says what was proved.

    Returns
    -------
    LoadReport
        what was restored, what stayed as it was, and what of the checkpoint was not asked for.

    Raises
    ------
    Mismatch
        on every rank, as all of these, with nothing changed: missing entries, other shapes, element types that would
        lose bits.
    NotACheckpoint, DamagedCheckpoint
        where there is none, or its bytes are not what was saved.
    ProofFailed
        with everything in place: what is live is not what was saved.
    """
    unwrapped = unwrap(state_dict)
    wish = Wish(allow_missing=tuple(allow_missing), partial=True)
    report = _fill(unwrapped, path, opening, wish, verify=verify, read_once=read_once, prove=prove)
    _put_back(unwrapped, state_dict)
    tell(report, metrics)
    return report


def _fill(
    state_dict: dict[str, Any], path: str | os.PathLike[str], opening: Mapping[str, Any], wish: Wish, **options: Any
) -> LoadReport:
    watch = Stopwatch()
    where, catalog = ranks.from_first(lambda: watch.timed("open", lambda: open_for(path, state_dict, opening)))
    values = flatten(state_dict)
    target = ranks.all_or_none(lambda: watch.timed("plan", lambda: StateDictTarget(where, values, catalog)))
    report = load_target(catalog, target, wish, path=where, watch=watch, **options)
    target.put_values(state_dict)
    return report


def _put_back(loaded: Mapping[str, Any], state_dict: dict[str, Any]) -> None:
    """Give the state dict its loaded values, and Stateful objects theirs."""
    for key, value in state_dict.items():
        if isinstance(value, Stateful):
            value.load_state_dict(loaded[key])
        else:
            state_dict[key] = loaded[key]


def tell(report: LoadReport, metrics: bool) -> None:
    """The line after every load, and its record. Collective."""
    if ranks.rank() == 0:
        for note in report.plan.notes:
            log.warning("%s: %s", report.path, note)
        log.info("%s", report)
    if metrics:
        record_load(report.path, report.bytes_read, report.seconds, report.overlapping)


def open_for(
    path: str | os.PathLike[str], state_dict: Mapping[str, Any], opening: Mapping[str, Any]
) -> tuple[str, Catalog]:
    """The checkpoint's folder and its catalog, whose training state has real tensors, by the state dict's names where
    a spec tells what they are in the checkpoint."""
    roles = assign(flatten(state_dict), complete=False)
    module = [name for name, state in roles.tensors.values() if state == PARAM]
    names = [ModuleOrder.of_group(group, module) for group in roles.groups.values()]
    with open_checkpoint(path, **{"param_names": names or None, **opening}) as checkpoint:
        catalog = replace(checkpoint.catalog, training_state=checkpoint.training_state)
    return str(checkpoint.path), under_spec(catalog, {name for name, _ in roles.tensors.values()}, opening)
