"""Make one engine's updates wait for a save's copy: everything in DeepSpeed that changes weights or optimizer states.

Nothing else waits. In particular its throughput timer, which would wait for the whole device before every forward
(utils/timer.py), does not. Methods of this engine, its optimizer, its parameters and its timer are wrapped, as
attributes of these objects. No class and no other engine is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

# engine.step() reaches the weights only through the optimizer's step. `safe_set_*` reaches them through a method of the
# optimizer (stage 3) or of the parameter (stages 1, 2: utils/mixed_precision_linkage.py).
_ENGINE = ("load_module_state_dict", "offload_states", "reload_states")
_OPTIMIZER = ("step", "load_state_dict", "refresh_fp32_params", "set_full_hp_param", "set_local_hp_param")
_PARAMETER = ("set_full_hp_param",)
_TIMER = ("start", "stop")


def hold_updates(engine: Any, hold: Callable[[], None]) -> None:
    """Have ``hold`` called before every update. Call this before every save, since DeepSpeed may bind methods anew."""

    def held(original: Any) -> Any:
        def update(_: Any, *args: Any, **kwargs: Any) -> Any:
            hold()
            return original(*args, **kwargs)

        return update

    _wrap(engine, _ENGINE, held)
    if engine.optimizer is not None:
        _wrap(engine.optimizer, _OPTIMIZER, held)
    for param in engine.module.parameters():
        _wrap(param, _PARAMETER, held)


def let_forward_go(engine: Any, copying: Callable[[], bool]) -> None:
    """While ``copying``, have the throughput timer read the clock without waiting for the device."""

    def unsynchronized(original: Any) -> Any:
        def read(timer: Any, *args: Any, **kwargs: Any) -> Any:
            if not (timer.config.synchronized and copying()):
                return original(*args, **kwargs)
            timer.config.synchronized = False
            try:
                return original(*args, **kwargs)
            finally:
                timer.config.synchronized = True

        return read

    _wrap(engine.tput_timer, _TIMER, unsynchronized)


def _wrap(owner: Any, names: tuple[str, ...], around: Callable[[Any], Any]) -> None:
    """Replace methods by what ``around`` makes of them. A method is wrapped only once."""
    for name in names:
        original = getattr(owner, name, None)
        if original is not None and not hasattr(original, "holds_for_saves"):
            made: Any = functools.wraps(original)(around(original))
            made.holds_for_saves = True
            # It has to be a bound method: torch's schedulers expect this of an optimizer's step.
            setattr(owner, name, MethodType(made, owner))
