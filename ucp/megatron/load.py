"""Fill a Megatron-Core program's sharded state dict from a checkpoint of any format and layout.

    state = {"model": model.sharded_state_dict(), "optimizer": optimizer.sharded_state_dict(..., is_loading=True)}
    state_dict, report = ucp.megatron.load_checkpoint(state, "runs/step-1000")
    model.load_state_dict(state_dict["model"]); optimizer.load_state_dict(state_dict["optimizer"])

It stands where ``megatron.core.dist_checkpointing.load`` does. Every rank reads the byte ranges that its parts need,
whatever layout wrote them, so that no cut has to divide another.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ucp import limits
from ucp.catalog import Catalog
from ucp.checkpoint import open as open_checkpoint
from ucp.formats.megatron.read.common import groups, optimizers
from ucp.formats.megatron.write.common import state as common_state
from ucp.job import ranks
from ucp.job.stopwatch import Stopwatch
from ucp.loading.exchange import ADAPTIVE
from ucp.loading.load import load as load_target
from ucp.loading.nouns import Wish
from ucp.loading.report import LoadReport
from ucp.loading.spec_names import in_names_of
from ucp.megatron import objects, parts
from ucp.megatron.parts import Taken, take_apart
from ucp.megatron.source import Told, tell
from ucp.megatron.target import ShardedTarget
from ucp.megatron.vocabulary import without_padding
from ucp.spec.select import choose
from ucp.storage import configs
from ucp.torchdist.load import tell as say


def load_checkpoint(
    sharded_state_dict: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
    vocab_size: int | None = None,
    verify: bool = True,
    read_once: bool | str = ADAPTIVE,
    metrics: bool = False,
    prove: bool | str = True,
    memory: int = limits.LOAD_MEMORY_BYTES,
    **opening: Any,
) -> tuple[dict[str, Any], LoadReport]:
    """Fill a sharded state dict from a checkpoint of any supported format and layout. Collective.

    ShardedTensors are filled in place; if a rank fails, all ranks raise, and nothing is changed. What comes back is
    what ``megatron.core.dist_checkpointing.load`` gives, with the checkpoint's common state in Megatron's form.

    Parameters
    ----------
    sharded_state_dict
        As for `save_checkpoint`, the optimizer's made with ``is_loading=True``. Without an optimizer in it only weights
        are loaded.
    path, opening
        As for `ucp.open` (tag, spec, model_config, ...). The spec's ``names: megatron:`` say what a checkpoint of
        another framework calls the parameters.
    allow_missing, allow_unused
        Patterns of what may stay as it is here, and of what of the checkpoint may stay unread: parameters' names, or
        ``name:state``.
    vocab_size
        How many rows of the embedding and the output layer are real, in rows. Further ones in the checkpoint are
        padding, and are dropped where this run pads to another number. Rows that only this run has stay as they are.
    verify, read_once, metrics, prove, memory
        As for `ucp.load`. memory: in bytes.

    Returns
    -------
    (dict, LoadReport)
        The state dict; what was restored, what stayed as it was, and what was not used.

    Raises
    ------
    Mismatch
        Tensors are missing or unused, shapes differ, or an element type would lose bits.
    NotACheckpoint, DamagedCheckpoint, ProofFailed
        As for `ucp.load`.
    BadArgument, Unsupported
        The state dict is none, or holds parts whose place is not said.
    """
    wish = Wish(allow_missing=tuple(allow_missing), allow_unused=tuple(allow_unused))
    how = {"verify": verify, "read_once": read_once, "prove": prove, "memory": memory}
    state_dict, report = _filled(sharded_state_dict, path, opening, vocab_size, wish, how)
    say(report, metrics)
    return state_dict, report


def _filled(
    sharded_state_dict: dict[str, Any],
    path: str | os.PathLike[str],
    opening: Mapping[str, Any],
    vocab_size: int | None,
    wish: Wish,
    how: Mapping[str, Any],
) -> tuple[dict[str, Any], LoadReport]:
    watch = Stopwatch()
    taken = ranks.all_or_none(lambda: take_apart(sharded_state_dict))
    told = tell(taken)
    where, catalog = ranks.from_first(lambda: watch.timed("open", lambda: _opened(path, told, opening)))
    if vocab_size is not None:
        catalog = without_padding(catalog, told, vocab_size)
    common = ranks.from_first(lambda: _common(catalog, taken))
    made: list[ShardedTarget] = []

    def target() -> ShardedTarget:
        made.append(ShardedTarget(catalog, taken, told))
        return made[0]

    wish = replace(wish, optimizer="optimizer" in sharded_state_dict)
    report = load_target(catalog, target, wish, path=where, watch=watch, **how)
    state_dict, kept = _merged(taken, common, catalog)
    return state_dict, _with_notes(report, made[0], kept)


def _opened(path: str | os.PathLike[str], told: Told, opening: Mapping[str, Any]) -> tuple[str, Catalog]:
    """The checkpoint's folder and its catalog under Megatron's names, whose training state has real tensors."""
    with open_checkpoint(path, **opening) as checkpoint:
        catalog = replace(checkpoint.catalog, training_state=checkpoint.training_state)
        folder = Path(checkpoint.path)
    if not opening.get("trust_client_state"):
        objects.check(folder, catalog)
    if not told.states.keys() & catalog.parameters.keys():
        choice = choose(opening.get("spec"), opening.get("model_config"), opening.get("sizes"))
        catalog = in_names_of(catalog, told.states, choice.bound(configs.of_model(folder)))
    return str(folder), catalog


def _common(catalog: Catalog, taken: Taken) -> dict[str, Any]:
    """The common state in Megatron's form."""
    trained = {
        name: len(info.shape)
        for name, info in catalog.parameters.items()
        if info.kind == "parameter" and set(info.states) - {"param"}
    }
    ndims = trained if "optimizer" in taken.common else {}
    kind = parts.optimizer_kind(taken)
    found = common_state(catalog, parts.layout(taken), stacked=taken.stacked, kind=kind, ndims=ndims)
    if "opt_param_scheduler" not in found:
        _with_own_rates(found, taken.common)
    return found


def _with_own_rates(found: Mapping[str, Any], live: Mapping[str, Any]) -> None:
    """Give the param groups this run's bounds of the learning rate, where the checkpoint has no schedule for them."""
    own = [group.options for group in groups(optimizers(live))]
    for one in optimizers(found):
        for group in one.get("optimizer", one).get("param_groups", ()):
            alike = [o for o in own if all(o.get(key) == group.get(key) for key in ("wd_mult", "is_expert_parallel"))]
            for key in ("max_lr", "min_lr") if alike else ():
                if key in alike[0]:
                    group[key] = alike[0][key]


def _merged(taken: Taken, common: dict[str, Any], catalog: Catalog) -> tuple[dict[str, Any], list[str]]:
    """The loaded state dict, and the objects that the checkpoint does not have, which stay as they are here."""
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, merge
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges

    saved = objects.SavedObjects.of(catalog)
    kept: list[str] = []

    def value(item: Any) -> Any:
        if isinstance(item, ShardedTensor):
            return item.data
        if item.unique_key not in saved and item.data is not None:
            kept.append(item.unique_key)
        return saved.get(item.unique_key, item.data)

    for key, mine in taken.common.items():
        if key not in common and key != "optimizer":
            common[key] = mine
            kept.append(key)
    merge(common, taken.own)
    merge(common, dict_list_map_outplace(value, taken.sharded))
    return apply_factory_merges(common, taken.factories), kept


def _with_notes(report: LoadReport, target: ShardedTarget, kept: Sequence[str]) -> LoadReport:
    notes = list(report.plan.notes)
    if target.wider:
        named = ", ".join(f"'{name}'" for name in sorted(target.wider))
        notes.append(
            f"rows beyond the checkpoint's of {named} are padding: "
            "weights stay as they are, and their optimizer states are 0"
        )
    if kept:
        notes.append(
            f"the checkpoint has none of {', '.join(kept[:8])}{', …' if kept[8:] else ''}, which stay as they are"
        )
    plan = replace(report.plan, notes=tuple(notes), left=(*report.plan.left, *kept))
    return replace(report, plan=plan)
