"""Fill the state dict of a torch.distributed program from a checkpoint of any format and layout.

    import ucp
    ucp.load(state, "runs/step-1000")          # into its tensors, in place, whatever layout or framework saved

A load reads only the byte ranges that a rank's shards need. The checkpoint may come from another layout and another
framework. Parameters, optimizer states and hyperparameters are found by the names of
``torch.distributed.checkpoint.state_dict`` (nested or flattened), so a DeepSpeed checkpoint loads, too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ucp import limits
from ucp.catalog import Catalog
from ucp.checkpoint import open_before
from ucp.formats import beside
from ucp.formats.nouns import ModuleOrder
from ucp.formats.shared.roles import PARAM, Roles, StateEntry, assign
from ucp.interpreter import no_collections
from ucp.job import ranks
from ucp.job.stopwatch import Stopwatch
from ucp.job.timings import record_load
from ucp.loading.exchange import ADAPTIVE
from ucp.loading.load import load as load_target
from ucp.loading.nouns import Wish
from ucp.loading.report import LoadReport
from ucp.loading.spec_names import under_spec
from ucp.printable import logger
from ucp.torchdist.changes import DECLARE, Given, as_changed
from ucp.torchdist.state_dicts import flatten, is_stateful, unwrap
from ucp.torchdist.target import StateDictTarget
from ucp.torchdist.words import StateDictWords

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
    changes: Given = None,
    memory: int = limits.LOAD_MEMORY_BYTES,
    **opening: Any,
) -> LoadReport:
    """Fill a state dict from a checkpoint of any supported format and layout. Collective.

    Tensors and DTensors are filled in place: each rank reads the bytes that its shards need. Other values are replaced,
    and Stateful objects given their state. What the state dict does not ask for is not read, and the report lists it.
    An optimizer's ways of working (foreach, ...) stay. If a rank fails, all raise, and nothing is changed.

    Parameters
    ----------
    state_dict
        Tensors, DTensors, Stateful objects and plain values, nested or flattened.
    path, opening
        As for `ucp.open` (tag, spec, ...). A spec's ``names:`` say what another framework calls the parameters.
    allow_missing
        Patterns of what may stay as it is: flat names ("optim.*"), parameters' names, or ``name:state``.
    verify
        Check digests, if the checkpoint has them, and the CRC-32s of torch's records that this rank reads whole.
    read_once
        If several ranks want the same bytes, have one rank read them and pass them on. 'adaptive': where it is faster.
    metrics
        As for `save`.
    prove
        After the load, compare what is live with the checkpoint's logical digests. True: if it has them, with a sample
        of much in host memory. 'full': never a sample. 'always': compute them if it has none. False: never.
    changes
        What of the model was changed on purpose since the save: a mapping or a file (`ucp.changes`).
    memory
        How many bytes of host memory a rank may take beyond the tensors, at least 64 MiB.

    Returns
    -------
    LoadReport
        What was restored, what stayed as it was, and what of the checkpoint was not asked for.

    Raises
    ------
    Mismatch
        Entries are missing, shapes differ, or an element type would lose bits.
    NotACheckpoint, DamagedCheckpoint
        There is none, or its bytes are not what was saved.
    PartlyLoaded
        Something failed when some tensors were filled. They are old and new until a load succeeds.
    ProofFailed
        Everything is in place, and not what was saved.
    """
    how: dict[str, Any] = {"verify": verify, "read_once": read_once, "prove": prove, "memory": memory}
    return _fill(state_dict, path, opening, allow_missing, changes, metrics, **how)


@no_collections()  # objects are made, and no garbage
def _fill(
    given: dict[str, Any],
    path: str | os.PathLike[str],
    opening: Mapping[str, Any],
    allow_missing: Sequence[str],
    changes: Given,
    metrics: bool,
    **options: Any,
) -> LoadReport:
    state_dict = unwrap(given)
    watch = Stopwatch()
    values, roles = ranks.all_or_none(lambda: watch.timed("open", lambda: entries_of(state_dict)))
    where, catalog = ranks.from_first(lambda: watch.timed("open", lambda: open_for(path, roles, opening, changes)))
    changed = as_changed(catalog, changes, lambda: values, opening)
    catalog = changed.catalog
    wish = Wish(allow_missing=tuple(allow_missing), partial=True, grown=changed.grown)
    made: list[StateDictTarget] = []

    def target() -> StateDictTarget:
        made.append(StateDictTarget(where, values, catalog, roles=roles, words=StateDictWords(declare=DECLARE)))
        return made[0]

    report = load_target(catalog, target, wish, path=where, watch=watch, changes=changed.lines, **options)
    made[0].put_values(state_dict)
    _put_back(state_dict, given)
    tell(report, metrics)
    return report


def _put_back(loaded: Mapping[str, Any], state_dict: dict[str, Any]) -> None:
    """Give the state dict its loaded values, and Stateful objects theirs."""
    for key, value in state_dict.items():
        if is_stateful(value):
            value.load_state_dict(loaded[key])
        else:
            state_dict[key] = loaded[key]


def tell(report: LoadReport, metrics: bool) -> None:
    """The line after every load, and its record. Collective."""
    if ranks.rank() == 0:
        for note in report.warnings:
            log.warning("%s: %s", report.path, note)
        log.info("%s", report)
    if metrics:
        record_load(report.path, report.bytes_read, report.seconds, report.overlapping)


def entries_of(state_dict: Mapping[str, Any]) -> tuple[dict[str, StateEntry], Roles]:
    """A state dict's entries, and what each of them is. Raises what `flatten` and `assign` raise."""
    entries = flatten(state_dict)
    return entries, assign(entries, complete=False)


def open_for(
    path: str | os.PathLike[str],
    roles: Roles,
    opening: Mapping[str, Any],
    changes: Given,
    live: Mapping[str, Any] | None = None,
) -> tuple[str, Catalog]:
    """The checkpoint's folder and its catalog, whose training state has real tensors. If a spec says what the names
    of a state dict with these roles are in the checkpoint, the catalog has the state dict's names. live: the model's
    own config, as for `ucp.spec.select.choose_before`."""
    module = [name for name, state in roles.tensors.values() if state == PARAM]
    names = [ModuleOrder.of_group(group, module) for group in roles.groups.values()]
    with open_before(changes, live, path, **{"param_names": names or None, **opening}) as checkpoint:
        catalog = replace(checkpoint.catalog, training_state=checkpoint.training_state)
    if left := beside.around(checkpoint.path, checkpoint.format):
        log.warning("%s: %s", checkpoint.path, beside.sentence(left, "beside it"))
    known = {"model_config": live, **opening}
    return str(checkpoint.path), under_spec(catalog, {name for name, _ in roles.tensors.values()}, known)
