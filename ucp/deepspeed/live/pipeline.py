"""What is particular to a PipelineModule: modules that several stages hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def untied_parameters(module: Any) -> Iterator[str]:
    """The trained parameters of tied modules that are not tied themselves (``tied_weight_attr`` does not name them).

    Every stage trains a copy of its own of such a one, under the same name (``runtime/pipe/module.py:
    allreduce_tied_weight_gradients``).
    """
    for key, tie in getattr(module, "tied_comms", {}).items():
        if len(tie["ranks"]) < 2:
            continue
        for name, parameter in tie["module"].named_parameters():
            if parameter.requires_grad and name not in tie["weight_attr"]:
                yield f"tied_modules.{key}.{name}"
