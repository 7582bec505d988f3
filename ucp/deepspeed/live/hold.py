"""The updates of one engine wait for a save's copy: everything in DeepSpeed that changes weights or optimizer states.

Wrapped are methods of this engine, of its optimizer and of its parameters, as attributes of these objects; no class
and no other engine is touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

# engine.step() reaches the weights through its optimizer's only; `safe_set_*` through the optimizer's (stage 3) or the
# parameter's own method (stages 1, 2: utils/mixed_precision_linkage.py).
_ENGINE = ("load_module_state_dict", "offload_states", "reload_states")
_OPTIMIZER = ("step", "load_state_dict", "refresh_fp32_params", "set_full_hp_param", "set_local_hp_param")
_PARAMETER = ("set_full_hp_param",)


def hold_updates(engine: Any, hold: Callable[[], None]) -> None:
    """Call ``hold`` before every update. To be called before every save, since DeepSpeed may bind methods anew."""
    _wrap(engine, _ENGINE, hold)
    if engine.optimizer is not None:
        _wrap(engine.optimizer, _OPTIMIZER, hold)
    for param in engine.module.parameters():
        _wrap(param, _PARAMETER, hold)


def _wrap(owner: Any, names: tuple[str, ...], hold: Callable[[], None]) -> None:
    for name in names:
        original = getattr(owner, name, None)
        if original is not None and not hasattr(original, "holds_for_saves"):
            # A bound method, as torch's schedulers expect an optimizer's step to be.
            setattr(owner, name, MethodType(_held(original, hold), owner))


def _held(original: Any, hold: Callable[[], None]) -> Any:
    @functools.wraps(original)
    def held(_: Any, *args: Any, **kwargs: Any) -> Any:
        hold()
        return original(*args, **kwargs)

    held.holds_for_saves = True  # type: ignore[attr-defined]
    return held
