"""An lr scheduler's state where param groups come in another order, or only some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Entries of torch.optim.lr_scheduler state dicts that have one element per param group.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs")


def entries_by_group(saved: Mapping[str, Any], count: int) -> list[str]:
    """The entries of a scheduler's state that have one value for each of so many param groups."""
    return [k for k in _PER_GROUP if isinstance(saved.get(k), (list, tuple)) and len(saved[k]) == count]


def of_groups(saved: Any, count: int, order: Sequence[int]) -> Any:
    """The state for these of ``count`` param groups, in this order. Other forms of state than mappings stay."""
    if not isinstance(saved, Mapping):
        return saved
    lists = entries_by_group(saved, count)
    return {k: [v[i] for i in order] if k in lists else v for k, v in saved.items()}
