"""A live Megatron-Core program: save its sharded state dict with our guarantees, fill it from any checkpoint.

    import ucp.megatron
    ucp.megatron.save_checkpoint(sharded_state_dict, "runs/step-1000")
    state_dict, report = ucp.megatron.load_checkpoint(sharded_state_dict, "runs/step-1000")

The calls stand where ``megatron.core.dist_checkpointing.save`` and ``load`` do, and take the same state dicts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ucp.lazy import names_of

if TYPE_CHECKING:
    from ucp.megatron.load import load_checkpoint
    from ucp.megatron.save import async_save_checkpoint, save_checkpoint

__all__ = ["save_checkpoint", "async_save_checkpoint", "load_checkpoint"]

if not TYPE_CHECKING:  # else any name would be there for a type checker, of any type
    __getattr__ = names_of(
        "ucp.megatron",
        {
            "save_checkpoint": "ucp.megatron.save",
            "async_save_checkpoint": "ucp.megatron.save",
            "load_checkpoint": "ucp.megatron.load",
        },
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
