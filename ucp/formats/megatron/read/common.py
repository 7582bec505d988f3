"""What all ranks have in common: iteration, arguments, scheduler, param groups; as a training state.

Megatron's param groups do not name their parameters: each is told by what its parameters have in common, which is a
rule of Megatron's (megatron/core/optimizer/__init__.py: ``_get_param_groups``). Biases and parameters of one dimension
have no weight decay, experts that are spread over ranks have groups of their own, and the embedding and the output
layer may have a learning rate of theirs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucp.catalog import ParamGroup, TrainingState
from ucp.errors import DamagedCheckpoint
from ucp.storage.torch_pt.values import Standin, TensorRef

EXTRA = "megatron"
"""Under this name everything else of a Megatron run lies in the training state's extra entries."""
RUN = "run"
"""Under this name, what the folder tells of the run besides its layout: cp, vp, optimizer_sharding."""
_OUTER = ("embedding.word_embeddings.", "output_layer.")
# What is told apart by its own field of a training state, or by the groups.
_TAKEN = ("iteration", "opt_param_scheduler", "optimizer")


@dataclass(frozen=True)
class UnnamedGroup:
    """A param group as it is saved, without names. expert: whether its parameters are spread over expert ranks."""

    options: Mapping[str, Any]
    expert: bool

    def has(self, name: str, ndim: int, apart: bool) -> bool:
        """Whether a parameter may be in it. apart: whether there are groups for experts."""
        if apart and self.expert != (".experts." in name):
            return False
        outer = name.startswith(_OUTER)
        if bool(self.options.get("is_decoupled_lr")) and not outer:
            return False
        decay = self.options.get("wd_mult", self.options.get("pre_wd_mult", 1.0))
        return decay is None or (decay == 0.0) == (ndim == 1 or name.endswith(".bias"))


def arguments(common: Mapping[str, Any]) -> Mapping[str, Any]:
    """Megatron's arguments, as its training program saves them; {} where there are none."""
    args = common.get("args")
    if isinstance(args, argparse.Namespace):
        return vars(args)
    if isinstance(args, Standin):
        return args.state
    return args if isinstance(args, Mapping) else {}


def optimizers(common: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The optimizers' own states: one, or several where experts have one of their own."""
    found = common.get("optimizer")
    if not isinstance(found, Mapping):
        return []
    if found and all(isinstance(key, int) for key in found):
        return [found[key] for key in sorted(found) if isinstance(found[key], Mapping)]
    return [found]


def groups(saved: Sequence[Mapping[str, Any]]) -> list[UnnamedGroup]:
    """All optimizers' param groups. saved: as `optimizers` gives them, or the objects that hold the same."""
    out = []
    for one in saved:
        inner = one.get("optimizer", one)
        for group in inner.get("param_groups", ()) if isinstance(inner, Mapping) else ():
            options = {key: value for key, value in group.items() if key != "params"}
            out.append(UnnamedGroup(options, bool(options.get("is_expert_parallel"))))
    return out


def named(found: Sequence[UnnamedGroup], parameters: Mapping[str, int]) -> tuple[tuple[ParamGroup, ...], str]:
    """The groups with their parameters' names, and a sentence where these can't be told.

    parameters: of those that the optimizer updates, the dimensions.
    """
    apart = any(group.expert for group in found)
    names: list[list[str]] = [[] for _ in found]
    # The files' own order is that in which ranks' plans came together, another one for every save.
    for name, ndim in sorted(parameters.items(), key=lambda item: _in_order(item[0])):
        may = [k for k, group in enumerate(found) if group.has(name, ndim, apart)]
        decoupled = [k for k in may if found[k].options.get("is_decoupled_lr")]
        may = decoupled or may
        if len(may) > 1 and all(found[k].options == found[may[0]].options for k in may):
            may = may[:1]
        if len(may) != 1:
            why = "none of them" if not may else f"{len(may)} of them"
            return (), f"which of {len(found)} param groups has which parameter is not said, and '{name}' fits {why}"
        names[may[0]].append(name)
    return tuple(ParamGroup(tuple(n), g.options) for n, g in zip(names, found, strict=True)), ""


def step(path: object, common: Mapping[str, Any], found: Sequence[UnnamedGroup]) -> int | float | None:
    """How often the optimizer stepped: with each group, or once for all (``common_step``). Raises DamagedCheckpoint
    where groups differ."""
    said = [group.options["step"] for group in found if group.options.get("step") is not None]
    for one in optimizers(common):
        inner = one.get("optimizer", one)
        state = inner.get("state") if isinstance(inner, Mapping) else None
        if isinstance(state, Mapping) and "common_step" in state:
            said.append(state["common_step"])
    numbers = [value for value in said if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(set(numbers)) > 1:
        raise DamagedCheckpoint(f"{path}: its param groups have made {sorted(set(numbers))} steps; they should agree")
    return numbers[0] if numbers else None


def tensors_in(value: Any) -> Iterator[TensorRef]:
    """The tensors in a state's groups and steps, which are single values."""
    if isinstance(value, TensorRef):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def training_state(
    common: Mapping[str, Any], objects: Mapping[str, Any], param_groups: tuple[ParamGroup, ...], dp: int
) -> TrainingState:
    """The training state. objects: those that single ranks have, by their keys."""
    args = arguments(common)
    scalers = [one["grad_scaler"] for one in optimizers(common) if isinstance(one.get("grad_scaler"), Mapping)]
    rest = {key: value for key, value in common.items() if key not in _TAKEN}
    if objects:
        rest["objects"] = dict(objects)
    return TrainingState(
        param_groups=param_groups,
        lr_scheduler=common.get("opt_param_scheduler"),
        loss_scaler=_loss_scaler(scalers[0]) if scalers else None,
        clip_grad=_number(args.get("clip_grad")),
        global_steps=_whole(common.get("iteration")),
        global_samples=_whole(args.get("consumed_train_samples")),
        dp_world_size=dp,
        global_batch_size=_whole(args.get("global_batch_size")),
        extra={EXTRA: rest} if rest else {},
    )


def _loss_scaler(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """In DeepSpeed's attribute names, with Megatron's own beside them (megatron/core/optimizer/grad_scaler.py)."""
    return {"dynamic": "growth_tracker" in saved, "cur_scale": saved.get("scale"), **saved}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _in_order(name: str) -> list[tuple[int, str]]:
    """A key for sorting names by which layers come by their numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
