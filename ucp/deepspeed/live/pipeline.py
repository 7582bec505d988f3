"""What is particular to a PipelineModule: modules that several stages hold."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from ucp.formats.deepspeed.read.replicated import is_declared


def declared_info(module: Any) -> Any:
    """What the model says about itself for universal checkpoints. Megatron-DeepSpeed's models have a method for it."""
    info = getattr(module, "universal_checkpoint_info", None)
    return info() if callable(info) else info


def untied_parameters(module: Any) -> Iterator[str]:
    """The trained parameters of tied modules that are not tied themselves, since ``tied_weight_attr`` does not name
    them. Those for which the model declares that the first stage's copy counts are left out.

    Every stage trains its own copy of such a parameter, under the same name (``runtime/pipe/module.py:
    allreduce_tied_weight_gradients``).
    """
    for key, tie in getattr(module, "tied_comms", {}).items():
        if len(tie["ranks"]) < 2:
            continue
        tied = {id(attrgetter(attribute)(tie["module"])) for attribute in tie["weight_attr"]}
        for local, parameter in tie["module"].named_parameters():
            name = f"tied_modules.{key}.{local}"
            untied = parameter.requires_grad and id(parameter) not in tied
            if untied and not is_declared(declared_info(module), name):
                yield name
