"""What a key of a Megatron-Core checkpoint is about: which parameters, and which of their states.

The layers of a block that are all alike lie under one key without a number, along a first axis
(megatron/core/transformer/transformer_block.py: ``sharded_state_dict``), and so do a layer's experts, whatever
module holds them (transformer/moe/experts.py). Optimizer states have the key of their parameter behind a prefix
(dist_checkpointing/optimizer.py, optimizer/distrib_optimizer.py). Some tensors are saved in parts that ranks cut each
by itself: a gated MLP's gate and up where shards are single ones, and a Mamba mixer's projections.

A parameter's name here is that of one rank's whole model: ``decoder.layers.3.self_attention.linear_qkv.weight``,
``decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

WEIGHT = "weight"
"""The state of a key that has none: the module's own tensor, which a master may stand for."""

MODULE_STATE = "._extra_state"
"""What follows a module's name in the key of the state that it keeps by itself."""

# Other names of the same state: without the distributed optimizer masters are called so.
_STATES = {"fp32_param": "param"}
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)")
_LAYERS = re.compile(r"(?:^|\.)layers\.(?!\d+\.)")
_EXPERTS = re.compile(r"\.experts\.experts\.(?!\d+\.)")
_ONE_EXPERT = re.compile(r"\.experts\.experts\.(\d+)\.")
_OBJECT = re.compile(r"(.+)/shard_([\d.]+)_([\d.]+)")

# The parts of one tensor, in order along its first axis, by what their keys end with.
PARTS: tuple[tuple[str, ...], ...] = (
    ("_w", "_v"),
    (".z", ".x", ".B", ".C", ".dt"),
    (".x", ".B", ".C"),
)


@dataclass(frozen=True)
class Key:
    """A tensor's key. state: `WEIGHT` or an optimizer state; model: the key of the module's own tensor."""

    state: str
    model: str


@dataclass(frozen=True)
class Stack:
    """The parameters of one key.

    axes: what the tensor's first axes count: 'layers', 'experts' or both, in this order.
    template: the parameters' name, with a place for each axis.
    """

    axes: tuple[str, ...]
    template: str

    def name(self, *indices: int) -> str:
        return self.template.format(*indices)


def parse(key: str) -> Key:
    """What a tensor's key is about."""
    found = _OPTIMIZER.fullmatch(key)
    if found is None:
        return Key(WEIGHT, key)
    return Key(_STATES.get(found[1], found[1]), found[2])


def stack(model_key: str) -> Stack:
    """The parameters of a module's key; one without axes where it stands for itself."""
    text = model_key.replace("{", "{{").replace("}", "}}")
    axes = []
    layers = _LAYERS.search(text)
    if layers is not None:
        axes.append("layers")
        text = f"{text[: layers.end()]}{{}}.{text[layers.end() :]}"
    experts = _EXPERTS.search(text)
    if experts is not None:
        axes.append("experts")
        text = f"{text[: experts.start()]}.experts.local_experts.{{}}.{text[experts.end() :]}"
    else:
        text = _ONE_EXPERT.sub(r".experts.local_experts.\1.", text)
    return Stack(tuple(axes), text)


def without_prefix(keys: Iterable[str]) -> str:
    """What wrappers put before all of these keys of modules: '', 'module.', 'model.' or several of them."""
    keys = list(keys)
    prefix = ""
    while keys:
        longer = next((p for p in ("module.", "model.") if all(k.startswith(prefix + p) for k in keys)), None)
        if longer is None:
            break
        prefix += longer
    return prefix


def parts(model_keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The tensors that are saved in parts: the whole one's key -> those of its parts, in order."""
    keys = set(model_keys)
    out: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for endings in PARTS:
        for key in sorted(keys):
            if not key.endswith(endings[0]) or key in taken:
                continue
            stem = key[: -len(endings[0])]
            found = tuple(stem + ending for ending in endings)
            if keys.issuperset(found) and taken.isdisjoint(found):
                out[stem] = found
                taken.update(found)
    return out


def object_key(key: str) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
    """(key, its place, of how many) of an object that several ranks have one of each; None for any other key."""
    found = _OBJECT.fullmatch(key)
    if found is None:
        return None
    place, count = (tuple(map(int, part.split("."))) for part in (found[2], found[3]))
    return (found[1], place, count) if len(place) == len(count) else None


def module_state(key: str) -> str | None:
    """Whose state an object is, with `MODULE_STATE`, under the name that one rank's whole model has for the module:
    ``decoder.layers.3.mlp.linear_fc2._extra_state``, whatever the file's stacking. None for another object."""
    found = object_key(key)
    if found is None or not found[0].endswith(MODULE_STATE):
        return None
    name, place, _ = found
    several = stack(name)
    return several.name(*place) if several.axes == () or len(several.axes) == len(place) else None


def order(names: Iterable[str]) -> list[str]:
    """The names with each block's layers in their order, and blocks as they first come."""
    first: dict[str, int] = {}
    layered = []
    for at, name in enumerate(names):
        root, number = _root(name)
        first.setdefault(root, at)
        layered.append((first[root], number, at, name))
    return [name for *_, name in sorted(layered)]


_NUMBERED = re.compile(r"(.*?(?:^|\.)layers)\.(\d+)\.")


def _root(name: str) -> tuple[str, int]:
    found = _NUMBERED.match(name)
    return (name, 0) if found is None else (found[1], int(found[2]))


def layer(name: str) -> int | None:
    """The number of the layer in a name; None if there is none."""
    found = _NUMBERED.match(name)
    return None if found is None else int(found[2])


def layer_counts(names: Iterable[str]) -> Mapping[str, int]:
    """How many layers each block has: the number of the last, and one."""
    out: dict[str, int] = {}
    for name in names:
        found = _NUMBERED.match(name)
        if found is not None:
            out[found[1]] = max(out.get(found[1], 0), int(found[2]) + 1)
    return out
