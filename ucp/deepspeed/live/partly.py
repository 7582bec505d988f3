"""An engine that a failed load has left with old values and new ones: it refuses to train and to save.

From the instant at which a load begins to change an engine until the load has succeeded, whatever computes with the
weights, changes them or writes them raises PartlyLoaded. So a program that goes on after an error cannot train on a
mixture. Methods of this engine are replaced, as attributes of the engine, and its modules get hooks, so that
``engine.module(...)`` and ``engine.module.state_dict()`` refuse, too. No class and no other engine is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from ucp.errors import PartlyLoaded

REFUSED = (
    "forward",
    "backward",
    "step",
    "train_batch",
    "eval_batch",
    "inference_batch",
    "save_checkpoint",
    "save_16bit_model",
    "save_fp16_model",
)
ANEW = "load a checkpoint again (load_checkpoint), or make the engine anew (initialize)"
UNDER_WAY = f"a load has begun to change the engine and has not finished; {ANEW}"
_KEPT = "_ucp_methods_before_a_load"
_HOOKS = "_ucp_hooks_of_a_load"
_WHY = "_ucp_why_refused"


def refuse(engine: Any, why: str = UNDER_WAY) -> None:
    """Have the engine refuse from now on. why: the sentence to say; a later one takes the place of the one before."""
    own = vars(engine)
    own[_WHY] = why
    if _KEPT in own:
        return
    own[_KEPT] = {name: own.get(name) for name in REFUSED if hasattr(engine, name)}
    for name in own[_KEPT]:
        own[name] = MethodType(_refusal(name), engine)
    own[_HOOKS] = list(_hooks(engine))


def _hooks(engine: Any) -> Iterator[Any]:
    def forward(module: Any, args: Any) -> None:
        raise _refused(engine, "engine.module()")

    def state_dict(module: Any, prefix: str, keep_vars: bool) -> None:
        raise _refused(engine, "engine.module.state_dict()")

    for module in engine.module.modules():
        yield module.register_forward_pre_hook(forward, prepend=True)
    yield engine.module.register_state_dict_pre_hook(state_dict)


def allow(engine: Any) -> None:
    """Give the engine its methods back: a load has succeeded."""
    own = vars(engine)
    for hook in own.pop(_HOOKS, ()):
        hook.remove()
    for name, before in own.pop(_KEPT, {}).items():
        if before is None:
            del own[name]
        else:
            own[name] = before
    own.pop(_WHY, None)


def check(engine: Any, what: str) -> None:
    """Raise PartlyLoaded if the engine refuses. what: what was asked of it."""
    if _WHY in vars(engine):
        raise _refused(engine, what)


def _refused(engine: Any, what: str) -> PartlyLoaded:
    return PartlyLoaded(f"{what} is refused: {vars(engine)[_WHY]}")


def _refusal(name: str) -> Callable[..., Any]:
    def refused(engine: Any, *args: Any, **kwargs: Any) -> Any:
        raise _refused(engine, f"engine.{name}()")

    return refused
