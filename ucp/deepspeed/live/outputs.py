"""What a module returns, and what some releases make of that in training."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, is_grad_enabled

from ucp.deepspeed.live import releases
from ucp.deepspeed.live.state import warn

# An attribute of engines of which it was seen that their gradients are divided in what their module returns.
_SEEN = "ucp_divides_outputs"


def are_divided(engine: Any) -> bool:
    """Whether gradients of this engine were seen to be divided more than once, of which it was warned then."""
    return bool(getattr(engine, _SEEN, False))


def warn_of_outputs(engine: Any) -> None:
    """Warn if the release divides gradients more than once, from the engine's first forward pass that trains on.

    Some releases do so in each tensor that the module returns, whichever way the program goes back; others only where
    it calls backward of a loss itself, which is seen in that backward. Stage 3 returns other tensors than the module
    has computed with, so that each is divided once there; of pipelines `ucp.deepspeed.live.gradients` tells.
    """
    if engine.zero_optimization_partition_weights() or releases.PIPELINE.has(engine):
        return
    always = not releases.divides_gradients_once()
    if not always and not releases.divides_in_own_backward():
        return
    places: dict[int, list[int]] = {}  # by how many tensors are returned
    told = False

    def look(_: Any, __: Any, outputs: Any) -> None:
        steps = engine.gradient_accumulation_steps()
        if not is_grad_enabled() or steps == 1:
            return
        tensors = list(_tensors(outputs))
        if len(tensors) not in places:  # looked through once: the graph of a large model takes a while
            places[len(tensors)] = divided_again(outputs)
        again = places[len(tensors)]
        if always:
            handle.remove()
            if again:
                setattr(engine, _SEEN, True)
                warn(_text(steps, "", "and so is engine.backward of releases since 0.19.6"))
            return
        for place in again:
            tensors[place].register_hook(flows)

    def flows(_: Any) -> None:
        nonlocal told
        if not told and releases.divides_now(engine):
            told = True
            setattr(engine, _SEEN, True)
            handle.remove()
            where = " where a program calls backward of its own loss, as this one does,"
            warn(_text(engine.gradient_accumulation_steps(), where, "and so is engine.backward(loss)"))

    handle = engine.register_forward_hook(look)


def _text(steps: int, where: str, better: str) -> str:
    return (
        f"DeepSpeed {releases.installed()} divides by the {steps} micro steps in each tensor that the module returns"
        f"{where or ','} and this module has computed one of them from another, as transformers' models compute the "
        "loss from the logits: gradients of this run are smaller than the mean, each parameter's by another factor, "
        f"without a word. Stage 3, one micro step and a module that returns the loss alone are right, {better}"
    )


def divided_again(outputs: Any) -> list[int]:
    """Places of those of the tensors that a module has returned from which gradients flow through another of them: it
    was computed from that, or is there twice."""
    tensors = list(_tensors(outputs))
    nodes = [tensor.grad_fn for tensor in tensors]
    known = {node: place for place, node in enumerate(nodes)}
    return [place for place, node in enumerate(nodes) if known[node] != place or _leads_to(node, known.keys())]


def _leads_to(node: Any, others: Collection[Any]) -> bool:
    """Whether a graph reaches one of these nodes behind its first."""
    seen: set[Any] = set()
    left = [before for before, _ in node.next_functions]
    while left:
        before = left.pop()
        if before is None or before in seen:
            continue
        if before in others:
            return True
        seen.add(before)
        left += [earlier for earlier, _ in before.next_functions]
    return False


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
