"""Optimizer states that the live optimizer quantises again, in its own blocks, where a checkpoint's blocks do not fit.

The states are read as float32, which is exact, and quantised by torchao's own way (``copy_`` into its tensors). What
that changes is measured and said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ucp.catalog import Catalog
from ucp.errors import BadArgument, Unsupported
from ucp.formats.shared.roles import PARAM
from ucp.job import ranks
from ucp.loading.report import LoadReport
from ucp.storage.dtypes import from_torch
from ucp.torchdist.dtensors import local_tensor
from ucp.torchdist.optimizers import OPTIMIZER
from ucp.torchdist.state_dicts import is_in_parts, parts_of


@dataclass
class Requantised:
    """The quantised states of a state dict, and float32 tensors that are filled in their place.

    error: the largest change of an element so far. part: the largest one as a part of its block's largest element.
    needed: False once it is known that the checkpoint's blocks are those here.
    """

    _held: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _states: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    error: float = 0.0
    part: float = 0.0
    needed: bool = True

    def take(self, state_dict: Mapping[str, Any]) -> None:
        """Put float32 tensors in the place of quantised states."""
        self._held.clear()
        self._states = state_dict[OPTIMIZER]["state"]
        for name, states in self._states.items():
            for key, value in states.items():
                if isinstance(value, torch.Tensor) and is_in_parts(value):
                    states[key] = plain = _in_float(value)
                    self._held[name, key] = value, plain

    def if_needed(self, catalog: Catalog) -> Requantised | None:
        """This, if the checkpoint's blocks are not those here. If they are, the state dict gets its quantised states
        back, nothing is lost, and it is None. Collective.

        Raises BadArgument if no optimizer here quantises its states.
        """
        said, _ = ranks.distinct((bool(self._held), self._fit(catalog)))
        if not any(holds for holds, _ in said):
            raise BadArgument(
                "states: 'requantised' is for an optimizer that quantises its states, and none here does; "
                "'dequantised' gives it float32 states"
            )
        if not all(fit for _, fit in said):
            return self
        for (name, key), (value, _) in self._held.items():
            self._states[name][key] = value
        self._held.clear()
        self.needed = False
        return None

    def _fit(self, catalog: Catalog) -> bool:
        try:
            parts = [
                (f"{OPTIMIZER}.state.{name}.{key}.{part}", tensor)
                for (name, key), (value, _) in self._held.items()
                for part, tensor in parts_of(key, value).items()
            ]
        except Unsupported:
            return False
        saved = [(catalog.tensors.get((entry, PARAM)), tensor) for entry, tensor in parts]
        return all(
            there is not None and (there.shape, there.dtype) == (tuple(here.shape), from_torch(here.dtype))
            for there, here in saved
        )

    def plain(self, name: str, state: str) -> torch.Tensor | None:
        """What is filled in the place of a state."""
        return self._held[name, state][1] if (name, state) in self._held else None

    @torch.no_grad()
    def give(self) -> None:
        """Quantise what was filled, and put the states back into the state dict."""
        for (name, key), (value, plain) in self._held.items():
            own: Any = local_tensor(value)
            filled = local_tensor(plain)
            own.copy_(filled)
            change = (own.dequantize().float() - filled).abs().view(-1, own.block_size)
            most = filled.abs().view(-1, own.block_size).amax(1, keepdim=True)
            self.error = max(self.error, float(change.max()))
            self.part = max(self.part, float((change / most.clamp_min(1e-38)).max()))
            self._states[name][key] = value

    def told(self, report: LoadReport) -> LoadReport:
        """The report, with what was done. Collective."""
        every, _ = ranks.distinct((self.error, self.part))
        error, part = (max(values) for values in zip(*every, strict=True))
        line = (
            f"states: quantised again in this layout's blocks: no element changed by more than {error:.3g}, nor by "
            f"more than {part:.2g} of the largest one of its block"
        )
        return replace(report, changes=(*report.changes, line))


def _in_float(value: torch.Tensor) -> torch.Tensor:
    local = local_tensor(value)
    plain = torch.zeros(tuple(local.shape), dtype=torch.float32, device=local.device)
    if not isinstance(value, DTensor):
        return plain
    return DTensor.from_local(
        plain, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
