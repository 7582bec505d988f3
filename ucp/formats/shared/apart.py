"""Optimizer states of other shapes than their parameter's, such as the factors of Adafactor: tensors by themselves.

Such a state is kept whole, under the flat name that it has in a state dict of `ucp.save_training`. So it comes back
under DeepSpeed what was saved by a plain program, and the other way round.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from ucp.geometry import Shape

_ROOT = "optim.state."

# Values that an optimizer computes from the weights in every step before it uses them (transformers' Adafactor), so
# that ranks which have other parts of a weight may have other ones, and the first rank's is as good as any.
COMPUTED_ANEW = frozenset(("RMS",))


def name_apart(parameter: str, state: str) -> str:
    """The name of a state that is a tensor by itself."""
    return f"{_ROOT}{parameter}.{state}"


def is_apart(name: str) -> bool:
    """Whether the name is that of a state that is a tensor by itself."""
    return name.startswith(_ROOT)


def states_apart(names: Iterable[str], parameters: Collection[str]) -> dict[str, tuple[str, str]]:
    """Those of the names that are states of these parameters -> (parameter, state). The longest parameter counts."""
    out = {}
    for name in names:
        if not name.startswith(_ROOT):
            continue
        owner, _, state = name.removeprefix(_ROOT).rpartition(".")
        while owner and owner not in parameters:
            owner, _, before = owner.rpartition(".")
            state = f"{before}.{state}"
        if owner:
            out[name] = (owner, state)
    return out


def entries(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """An optimizer's states of a parameter by flat name, those in lists numbered (SOAP's ``Q.0``)."""
    for key, value in state.items():
        if isinstance(value, (list, tuple)) and not is_plain(value):
            yield from ((f"{key}.{i}", one) for i, one in enumerate(value))
        else:
            yield key, value


def is_plain(value: Any) -> bool:
    """Whether a state is a number, or a list of such (SOAP keeps ``[[]]`` for a vector)."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return isinstance(value, (bool, int, float))


def put_entry(state: dict[str, Any], key: str, value: Any) -> None:
    """Set a state by its flat name. Lists grow by it, in the order of their numbers."""
    name, _, number = key.partition(".")
    if not number:
        state[key] = value
        return
    held = list(state.get(name, ()))
    index = int(number)
    held[index : index + 1] = [value]
    state[name] = held


def belongs_to(shape: Shape, weight: Shape) -> bool:
    """Whether a state of this shape may be one of such a weight: each of its axes is one of the weight's, or 1."""
    return all(size == 1 or size in weight for size in shape)
