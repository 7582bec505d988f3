"""Live values in another floating-point type. The bits of NaNs are kept, as far as there is room."""

from __future__ import annotations

import torch

# Floating-point types: the integers of their width, and the bits of their fraction.
_FLOATS = {
    torch.float16: (torch.int16, 10),
    torch.bfloat16: (torch.int16, 7),
    torch.float32: (torch.int32, 23),
    torch.float64: (torch.int64, 52),
}


def converted(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values in another type. NaNs keep their sign and their payload, as far as there is room, as in
    `ucp.transfer.exact.widen`. torch's own conversion does so only on some devices."""
    if values.dtype == torch.bfloat16 and dtype == torch.float32:
        return (values.view(torch.int16).to(torch.int32) << 16).view(torch.float32)
    out = values.to(dtype)
    if values.dtype == dtype or values.dtype not in _FLOATS or dtype not in _FLOATS:
        return out
    odd = values.isnan()
    if values.device.type == "cpu" and not bool(odd.any()):
        return out
    return torch.where(odd, _nans(values, dtype), out)


def _nans(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values in another type, where all are taken for NaNs."""
    (here, fraction), (there, wanted) = _FLOATS[values.dtype], _FLOATS[dtype]
    wide = max(here, there, key=lambda kind: kind.itemsize)
    bits = values.view(here).to(wide)
    payload = bits & ((1 << fraction) - 1)
    payload = payload << wanted - fraction if wanted >= fraction else payload >> fraction - wanted
    infinite = (1 << 8 * there.itemsize - 1) - (1 << wanted)
    sign = (bits < 0).to(wide) << 8 * there.itemsize - 1
    return (sign | infinite | payload).to(there).view(dtype)
