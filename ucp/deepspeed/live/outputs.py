"""What a module returns, and what some releases make of that in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, is_grad_enabled

from ucp.deepspeed.live import releases
from ucp.deepspeed.live.state import warn


def warn_of_outputs(engine: Any) -> None:
    """At the engine's first forward pass that trains, warn if the release divides gradients more than once.

    Stage 3 returns other tensors than the module has computed with, so that each is divided once there; of pipelines
    `ucp.deepspeed.live.gradients` tells.
    """
    partitions = engine.zero_optimization_partition_weights()
    if partitions or releases.PIPELINE.has(engine) or releases.divides_gradients_once():
        return

    def look(_: Any, __: Any, outputs: Any) -> None:
        steps = engine.gradient_accumulation_steps()
        if not is_grad_enabled() or steps == 1:
            return
        handle.remove()
        if divided_again(outputs):
            warn(
                f"DeepSpeed {releases.installed()} divides by the {steps} micro steps in each tensor that the module "
                "returns, and this module has computed one of them from another, as transformers' models compute the "
                "loss from the logits: gradients of this run are smaller than the mean, each parameter's by another "
                "factor, without a word. Stage 3, one micro step and a module that returns the loss alone are right, "
                "and so is engine.backward of releases since 0.19.6"
            )

    handle = engine.register_forward_hook(look)


def divided_again(outputs: Any) -> bool:
    """Whether gradients flow through more than one of the tensors that a module has returned: one of them was computed
    from another, or is there twice."""
    tensors = list(_tensors(outputs))
    found = {tensor.grad_fn for tensor in tensors}
    seen: set[Any] = set()
    left = [before for node in found for before, _ in node.next_functions]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if node in found:
            return True
        seen.add(node)
        left += [before for before, _ in node.next_functions]
    return len({id(tensor) for tensor in tensors}) < len(tensors)


def _tensors(outputs: Any) -> Iterator[Any]:
    """Those that DeepSpeed looks for."""
    if isinstance(outputs, Tensor):
        if outputs.grad_fn is not None:
            yield outputs
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from _tensors(value)
    elif isinstance(outputs, Mapping):
        yield from _tensors(list(outputs.values()))
