"""Hyperparameters of param groups, and values that a checkpoint keeps by name, for a live training state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from ucp.catalog import Catalog, ParamGroup
from ucp.formats.shared.roles import VALUES
from ucp.job import ranks
from ucp.loading.refusals import VALUE, Findings, Item
from ucp.loading.target import Group, Target
from ucp.storage.dtypes import from_torch, to_torch

# Options of a param group's implementation or identity rather than of the training. They are always the target's.
OWN_OPTIONS = frozenset(
    ("params", "param_names", "foreach", "fused", "capturable", "differentiable", "name", "moe", "use_muon")
)


def match_options(
    catalog: Catalog, target: Target, names: Mapping[str, str], found: Findings, *, partial: bool = False
) -> tuple[dict[int, Mapping[str, Any]], dict[int, int]]:
    """Each live group's hyperparameters, from the checkpoint's groups with the same parameters. The second result is
    the index of that group, for each live group with only one.

    names: live name -> the checkpoint's. partial: write no notes about what is not asked for.
    """
    saved = catalog.training_state.param_groups
    owner = {name: index for index, group in enumerate(saved) for name in group.names}
    options: dict[int, Mapping[str, Any]] = {}
    sources: dict[int, int] = {}
    for index, group in enumerate(target.groups):
        # A group may name parameters that are not asked for otherwise. They have the same names in the checkpoint.
        known = (names.get(name, name) for name in group.names)
        origins = sorted({owner[name] for name in known if name in owner})
        taken = _of_origins(saved, origins, index, group, found)
        if taken is not None:
            options[index] = taken
            unused = sorted({*(saved[origins[0]].options or ())} - {*taken, *group.options} - OWN_OPTIONS)
            if unused and not partial:
                shown = ", ".join(f"'{name}'" for name in unused)
                found.notes.append(f"param group {index}: the optimizer here has no {shown}, so that stays unused")
            if len(origins) == 1:
                sources[index] = origins[0]
    return options, sources


def _of_origins(
    saved: Sequence[ParamGroup], origins: Sequence[int], index: int, group: Group, found: Findings
) -> dict[str, Any] | None:
    """What a live group takes from the checkpoint's groups, which have to agree. None if it keeps its own."""
    kept = [options for i in origins if (options := saved[i].options) is not None]
    takes = {option for options in kept for option in options} if group.takes is None else group.takes
    wanted = sorted({*group.options, *takes} - OWN_OPTIONS)
    if not origins or len(kept) < len(origins):
        why = "this checkpoint (an elastic one) recorded none" if origins else "the checkpoint has none for it"
        if group.names:
            _keeps(index, wanted, group, why, found)
        return None
    out: dict[str, Any] = {}
    for option in wanted:
        values = [options.get(option) for options in kept]
        first = next((k for k, value in enumerate(values) if not _same(value, values[0])), None)
        if first is not None:
            shown = [origins[0], origins[first]]
            found.wrong.append(found.words.other_options(index, option, shown, [values[0], values[first]]))
        elif option in kept[0]:
            value = kept[0][option]
            if option not in group.options and group.takes is None:
                out[option] = copy.deepcopy(value)
            else:
                out[option] = _fitting(index, option, group.options.get(option), value, found)
    _same_forms(index, wanted, {*kept[0]} - OWN_OPTIONS, found)
    _keeps(index, [option for option in wanted if option not in kept[0]], group, "", found)
    return out


def _same_forms(index: int, wanted: Sequence[str], saved: Collection[str], found: Findings) -> None:
    """Refuse lists and mappings with other entries than in the checkpoint. A list or mapping of tensors is one option
    for each entry ('h.0')."""
    for head in dict.fromkeys(option.partition(".")[0] for option in wanted):
        here, there = (
            sorted(o for o in options if o == head or o.startswith(f"{head}.")) for options in (wanted, saved)
        )
        if there and here != there:
            found.wrong.append(
                f"{found.words.option_of(index, here[0])} is a list or mapping with other entries: {', '.join(there)} "
                f"in the checkpoint and {', '.join(here)} here; give it the checkpoint's before the load"
            )


def _keeps(index: int, options: Sequence[str], group: Group, why: str, found: Findings) -> None:
    """Note that a group's hyperparameters stay as they are. why: the reason, if it is one for all of them."""
    labels = [label for o in options if o in group.options and (label := found.words.option(index, o)) is not None]
    found.left.extend(labels)
    if why and not labels:
        found.notes.append(f"param group {index} keeps its own hyperparameters: {why}")


def _fitting(index: int, option: str, live: Any, value: Any, found: Findings) -> Any:
    """The value in the form of the live one."""
    number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    if isinstance(live, torch.Tensor):
        dtype = from_torch(live.dtype)
        if live.numel() != 1 or not holds(dtype, number):
            found.wrong.append(found.words.not_held(found.words.option_of(index, option), number, dtype))
        return number
    return tuple(number) if isinstance(live, tuple) and isinstance(number, list) else number


def holds(dtype: str, value: Any) -> bool:
    """Whether a tensor of this element type can have exactly this value."""
    if not isinstance(value, (bool, int, float)):
        return False
    return value != value or torch.tensor(value, dtype=torch.float64).to(to_torch(dtype)).item() == value


def stays_at(groups: Iterable[Mapping[str, Any]]) -> str:
    """For the end of a sentence: the learning rates that these groups keep. Empty if they have none."""
    rates = [f"{float(rate):g}" for group in groups if isinstance(rate := group.get("lr"), int | float | torch.Tensor)]
    found = list(dict.fromkeys(rates))
    return f", so the learning rate stays at {' and '.join(found[:4])}" if found else ""


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.shape == b.shape and bool((a == b).all())
    return bool(a == b)


def own_values(catalog: Catalog) -> Mapping[str, Any]:
    """The values that this rank had for itself, if as many ranks saved as load now."""
    saved = [own.get(VALUES, {}) for own in catalog.training_state.extra.get("ranks", ())]
    return saved[ranks.rank()] if len(saved) == ranks.world_size() else {}


def shared_values(catalog: Catalog) -> Mapping[str, Any]:
    """The values that were the same on all ranks, besides the tensors."""
    found: Mapping[str, Any] = catalog.training_state.extra.get(VALUES, {})
    return found


def match_named(
    catalog: Catalog,
    target: Target,
    found: Findings,
    may_miss: Callable[[str], bool],
    may_leave: Callable[[str], bool],
) -> dict[str, Any]:
    """The values that the target asks for by name. This rank's own are preferred to those of all ranks."""
    own, shared = own_values(catalog), shared_values(catalog)
    asked = target.named
    if asked is None:
        found.spared.extend(shared)
        return {}
    out: dict[str, Any] = {}
    for key, live in asked.items():
        if key in own:
            out[key] = own[key]
            _check_own(key, live, own[key], found)
        elif key in shared:
            out[key] = shared[key]
        else:
            found.lacks(Item("value", key, (), VALUE), may_miss(key))
    for key in shared:
        if key not in out:
            found.leaves(Item("value", key, (), VALUE), may_leave(key))
    return out


def _check_own(key: str, live: Any, value: Any, found: Findings) -> None:
    """A tensor of this rank alone is filled in place, so shape and element type have to be the same."""
    if not isinstance(live, torch.Tensor) or not isinstance(value, torch.Tensor):
        return
    if (value.shape, value.dtype) != (live.shape, live.dtype):
        there, here = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (value, live))
        found.wrong.append(f"'{key}' is {there} in the checkpoint and {here} here")
