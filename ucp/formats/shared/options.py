"""Options that several formats take."""

from __future__ import annotations

from ucp.formats.base import FLAG, NAMES, SHAPES, Option

TRUST_PATHS = Option("trust_paths", FLAG, "follow a virtual SOURCE to files outside the folder it names", default=False)
"""Read files that a virtual checkpoint points at wherever they lie."""

TRUST_CLIENT_STATE = Option("trust_client_state", FLAG, "run code that SOURCE's client state asks for", default=False)
"""Unpickle classes outside the allow-list, which runs their code."""

SKIP_UNKNOWN_OBJECTS = Option(
    "skip_unknown_objects",
    FLAG,
    "leave out of SOURCE's client state what is of no known class, but for the tensors and plain data in it",
    default=False,
)
"""Neither refuse nor run classes outside the allow-list."""

PARAM_NAMES = Option(
    "param_names",
    NAMES,
    "JSON: a list of names for each param group, in its order, where the optimizer only numbers them",
    "FILE",
)
"""What a checkpoint leaves open that knows an optimizer's parameters by numbers."""

PARAM_SHAPES = Option(
    "param_shapes",
    SHAPES,
    "JSON: the shape of each of the module's parameters by name, in its order, for what FSDP1 saved flat",
    "FILE",
)
"""What a checkpoint leaves open that has FSDP1's flat parameters."""
