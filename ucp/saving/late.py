"""Numbers that a device has not computed yet when a save begins, such as an optimizer's step counts.

To ask for one would wait for all that the device has to do before, and training would stand still meanwhile. So they
are copied like the tensors, and read when the device has come that far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Key = tuple[str, str]
"""A parameter's name and the number's."""


class LateNumbers:
    """The numbers in single-element tensors as they are now, on the current stream. The tensors may change then."""

    def __init__(self, tensors: Mapping[Key, torch.Tensor]) -> None:
        import torch

        alike: dict[tuple[torch.device, torch.dtype], list[Key]] = {}
        for key, tensor in tensors.items():
            alike.setdefault((tensor.device, tensor.dtype), []).append(key)
        self._copied: list[tuple[Sequence[Key], torch.Tensor, torch.cuda.Event | None]] = []
        for (device, dtype), keys in alike.items():
            together = torch.stack([tensors[key].detach().reshape(()) for key in keys])
            if device.type != "cuda":
                self._copied.append((keys, together, None))
                continue
            host = torch.empty(len(keys), dtype=dtype, pin_memory=True)
            host.copy_(together, non_blocking=True)
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(device))
            self._copied.append((keys, host, event))

    def read(self) -> dict[Key, Any]:
        """The numbers, once the device has computed them."""
        found: dict[Key, Any] = {}
        for keys, host, event in self._copied:
            if event is not None:
                event.synchronize()
            found.update(zip(keys, host.tolist(), strict=True))
        return found
