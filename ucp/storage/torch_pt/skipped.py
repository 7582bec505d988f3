"""A graph without objects of unknown classes. The tensors and plain data that they held stay."""

from __future__ import annotations

from collections import deque
from typing import Any

from ucp.storage.torch_pt.named import Global
from ucp.storage.torch_pt.values import Standin

Skipped = set[tuple[str, str]]
"""Classes that were left out, each its module and its name."""


def without(graph: Any, classes: Skipped) -> Any:
    """The graph with every object of these classes replaced by a plain mapping of its attributes, and every class or
    function by itself replaced by None. What lies in several places of the graph also does so in the result."""
    made: dict[int, tuple[Any, Any]] = {}

    def convert(value: Any) -> Any:
        if id(value) not in made:
            made[id(value)] = (value, value)  # for a value that contains itself
            made[id(value)] = (value, converted(value))
        return made[id(value)][1]

    def converted(value: Any) -> Any:
        if isinstance(value, Global):
            return None
        if isinstance(value, Standin):
            state = {key: convert(item) for key, item in value.state.items()}
            if (value.class_module, value.class_name) in classes:
                return state
            return Standin(value.class_module, value.class_name, convert(value.class_args), state)
        if isinstance(value, dict):
            for key in value:
                value[key] = convert(value[key])
        elif type(value) in (list, deque):
            for index, item in enumerate(value):
                value[index] = convert(item)
        elif type(value) is tuple:
            return tuple(convert(item) for item in value)
        return value

    return convert(graph)
