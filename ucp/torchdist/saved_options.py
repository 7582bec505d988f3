"""Options of param groups that only a checkpoint has."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

from ucp.catalog import Catalog
from ucp.loading.name_match import match
from ucp.loading.options import OWN_OPTIONS
from ucp.torchdist.optimizers import OPTIMIZER


def with_saved_options(state_dict: dict[str, Any], catalog: Catalog) -> Sequence[Collection[str]]:
    """Add to each param group the options that only the checkpoint's groups of its parameters have, such as what an
    optimizer keeps there only from a real step on. torch's own load_state_dict takes them, too. Returns the options
    added, by group.

    Options of DeepSpeed's optimizers are left out, since they may mean nothing to one of torch's.
    """
    groups = state_dict[OPTIMIZER]["param_groups"]
    added: list[set[str]] = [set() for _ in groups]
    if catalog.training_state.config:
        return added
    saved = {name: group.options or {} for group in catalog.training_state.param_groups for name in group.names}
    names = match(catalog, [name for group in groups for name in group["params"]], copies=True)
    for group, more in zip(groups, added, strict=True):
        for name in group["params"]:
            for option, value in saved.get(names.get(name, ""), {}).items():
                head, nested, _ = option.partition(".")  # a dot: an entry of a list or mapping, which the plan refuses
                if head not in OWN_OPTIONS and (head not in group or group[head] == {}):
                    group[head] = None if nested else copy.deepcopy(value)
                    more.add(head)
    return added
