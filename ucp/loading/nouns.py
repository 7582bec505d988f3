"""What a caller asks of a load, and what the load will do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ucp.catalog import LogicalTensor
from ucp.transfer.gather import Want

Entry = tuple[int, str, str]
"""Slot key, state, element type to read: of one tensor that a load brings."""


@dataclass(frozen=True)
class Wish:
    """What the caller of a load asked for.

    allow_missing, allow_unused: glob patterns of names, or of ``name:state`` for optimizer states. What is missing
    stays as it is. strict: refuse missing and unused parameters and buffers. partial: what the target does not ask for
    may stay unread. grown: names of the checkpoint's parameters of whose weights it has only the first rows, or none,
    as is declared (`ucp.changes`); the others stay as they are.
    """

    weights_only: bool = False
    optimizer: bool = True
    strict: bool = True
    allow_missing: tuple[str, ...] = ()
    allow_unused: tuple[str, ...] = ()
    partial: bool = False
    grown: frozenset[str] = frozenset()

    @property
    def states(self) -> bool:
        """Whether optimizer states and hyperparameters are restored."""
        return self.optimizer and not self.weights_only


@dataclass(frozen=True)
class LoadPlan:
    """Everything that a load will do on this rank.

    wants: entry -> what to gather. scalars: slots whose optimizer state will be set -> its single values. options:
    param group -> hyperparameters. sources: param group -> index of the checkpoint's group. left, unused: what stays as
    it is and what is not read, since the caller allows it (names, and ``name:state``). rounded: frozen weights and
    buffers that the live model keeps in fewer bits. notes: what to log. tied: pairs of the checkpoint's tensors that
    are one parameter here, and so have to be equal; the second one is read. named: name -> value. kept_in: entries of
    which some elements are not read and stay as they are.
    """

    wants: Mapping[Entry, list[Want]]
    scalars: Mapping[int, Mapping[str, Any]]
    options: Mapping[int, Mapping[str, Any]]
    sources: Mapping[int, int]
    left: tuple[str, ...]
    unused: tuple[str, ...]
    rounded: tuple[str, ...]
    notes: tuple[str, ...]
    tied: tuple[tuple[LogicalTensor, LogicalTensor], ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)
    kept_in: frozenset[Entry] = frozenset()
