"""Where a model-parallel rank's parameters lie in the whole model's, in Megatron's older layout.

A rank's state dict has its module's own names: layers are counted from the stage's first, experts from the rank's
first, and nothing says along which axis a tensor is cut. That is told by the module's class, and so by its name
(megatron/core/tensor_parallel/layers.py, transformer/attention.py, transformer/mlp.py, transformer/moe/experts.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ucp.errors import Unsupported
from ucp.geometry import Blocks, Shape, row_major

# Along the first axis, along the second, and whole on every tensor-parallel rank.
_ROWS = re.compile(
    r".*(word_embeddings\.weight|output_layer\.(weight|bias)|linear_(qkv|fc1|q_proj|q_up_proj|kv_up_proj)\.(weight|bias))"
)
_COLUMNS = re.compile(r".*linear_(proj|fc2)\.weight")
_WHOLE = re.compile(
    r".*(norm\.(weight|bias)|layer_norm_(weight|bias)|linear_(proj|fc2)\.bias|position_embeddings\.weight"
    r"|router\.(weight|bias|expert_bias)|local_tokens_per_expert|gate_weight|inv_freq)"
)
_LAYER = re.compile(r"((?:decoder|encoder)\.layers)\.(\d+)\.(.+)")
_SEQUENTIAL = re.compile(r"(.+\.experts)\.local_experts\.(\d+)\.(.+)")
_GROUPED = re.compile(r"(.+\.experts)\.(linear_fc[12])\.(weight|bias)(\d+)")
_GROUPED_STATE = re.compile(r".+\.experts\.(?:linear_fc[12]\.)?_extra_state")
_STACKED = re.compile(r"(.+\.experts)\.weight([12])")


@dataclass(frozen=True)
class RankPlace:
    """A rank among the model-parallel ones. first_layer: the global number of its first layer. experts: how many it
    has; 0 for none. gated: whether fc1 is a gate and an up projection, one after the other. norms: as `norms` says."""

    tp: int
    tps: int
    ep: int
    first_layer: int
    experts: int
    gated: bool
    norms: Mapping[int, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PlacedPart:
    """A rank's part of a parameter. blocks: in the whole one, and where they lie in the rank's row-major tensor."""

    name: str
    shape: Shape
    blocks: Blocks


# Norms have the names of Transformer Engine's modules, which have them inside a linear layer; so do Megatron's newer
# files (megatron/core/models/gpt/gpt_layer_specs.py: ``sharded_state_dict_keys_map``).
_ATTENTION = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_LATENT = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
_DENSE = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def norms(names: Iterable[str]) -> dict[int, Mapping[str, str]]:
    """What norms are called, by a rank's own numbers of its layers: how names of theirs begin here -> and in the whole
    model. Before experts and before latent attention a norm is a module of its own."""
    sparse, latent, layers = set(), set(), set()
    for name in names:
        if (found := _LAYER.fullmatch(name)) is not None:
            layer, rest = int(found[2]), found[3]
            layers.add(layer)
            sparse |= {layer} if rest.startswith(("mlp.experts.", "mlp.router.")) else set()
            latent |= {layer} if rest.startswith("self_attention.linear_kv_down_proj.") else set()
    return {
        layer: {**(_LATENT if layer in latent else _ATTENTION), **({} if layer in sparse else _DENSE)}
        for layer in layers
    }


def logical_name(name: str, rank: RankPlace) -> str:
    """The name with the layer's global number."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return name
    layer, rest = int(found[2]), found[3]
    for own, fused in rank.norms.get(layer, {}).items():
        if rest.startswith(own):
            rest = fused + rest.removeprefix(own)
    return f"{found[1]}.{layer + rank.first_layer}.{rest}"


def state_name(name: str, rank: RankPlace) -> str | None:
    """The whole model's name of the state that a module keeps by itself; None for that of several experts in one."""
    if _GROUPED_STATE.fullmatch(name):
        return None
    name = logical_name(name, replace(rank, norms={}))
    found = _SEQUENTIAL.fullmatch(name)
    if found is None:
        return name
    return f"{found[1]}.local_experts.{int(found[2]) + rank.ep * rank.experts}.{found[3]}"


def local_experts(shapes: Mapping[str, Shape], given: int | None) -> int:
    """How many experts a rank has in a layer. given: as its arguments say, which stacked weights need."""
    found = {int(m[2]) for n in shapes if (m := _SEQUENTIAL.fullmatch(n))}
    found |= {int(m[4]) for n in shapes if (m := _GROUPED.fullmatch(n))}
    if found:
        return max(found) + 1
    if any(_STACKED.fullmatch(name) for name in shapes):
        if given is None:
            raise Unsupported(
                "its experts are stacked in 'experts.weight1', and its arguments don't say how many there are "
                "(num_experts)"
            )
        return given
    return 0


def is_gated(shapes: Mapping[str, Shape]) -> bool:
    """Whether fc1 has two rows for each column of fc2."""
    for name, shape in shapes.items():
        if name.endswith("linear_fc1.weight") or re.search(r"linear_fc1\.weight\d+$", name):
            other = shapes.get(name.replace("linear_fc1", "linear_fc2"))
            if other is not None and len(other) == 2:
                return shape[0] == 2 * other[1]
        if name.endswith("experts.weight1") and (other := shapes.get(name[:-1] + "2")):
            return shape[1] == 2 * other[0]
    return False


def places(name: str, shape: Shape, rank: RankPlace) -> Iterator[PlacedPart]:
    """The parts of parameters that a rank's tensor holds. Raises Unsupported for a name that no rule is about, where
    there are several tensor-parallel ranks."""
    name = logical_name(name, rank)
    first = rank.ep * rank.experts
    stacked = _STACKED.fullmatch(name)
    if stacked is not None:
        yield from _stacked(stacked, shape, rank)
        return
    if (found := _SEQUENTIAL.fullmatch(name)) is not None:
        name = f"{found[1]}.local_experts.{int(found[2]) + first}.{found[3]}"
    elif (found := _GROUPED.fullmatch(name)) is not None:
        name = f"{found[1]}.local_experts.{int(found[4]) + first}.{found[2]}.{found[3]}"
    yield _cut(name, shape, row_major(shape), 0, rank)


def _stacked(found: re.Match[str], shape: Shape, rank: RankPlace) -> Iterator[PlacedPart]:
    """GroupedMLP's weights: one matrix for all experts, each transposed in it (transformer/moe/experts.py)."""
    count = rank.experts
    wide = found[2] == "1"
    hidden, ffn = (shape[0], shape[1] // count) if wide else (shape[1], shape[0] // count)
    for expert in range(count):
        name = f"{found[1]}.local_experts.{rank.ep * count + expert}.linear_fc{found[2]}.weight"
        start = expert * hidden * ffn
        if wide:  # (experts, hidden, ffn) in memory, and the parameter is (ffn, hidden)
            yield _cut(name, (ffn, hidden), (1, ffn), start, rank)
        else:
            yield _cut(name, (hidden, ffn), (1, hidden), start, rank)


def _cut(name: str, shape: Shape, strides: Shape, start: int, rank: RankPlace) -> PlacedPart:
    """A rank's tensor of this shape as a part of the whole one."""
    axis = _axis(name, shape, rank.tps)
    if axis is None or rank.tps == 1:
        return PlacedPart(name, shape, _blocks([((0,) * len(shape), shape, start)], strides))
    segments = 2 if axis == 0 and rank.gated and re.search(r"\.linear_fc1\.(weight|bias)$", name) else 1
    each = shape[axis] // segments
    whole = tuple(n * rank.tps if k == axis else n for k, n in enumerate(shape))
    boxes = []
    for segment in range(segments):
        offsets = tuple((segment * rank.tps + rank.tp) * each if k == axis else 0 for k in range(len(shape)))
        sizes = tuple(each if k == axis else n for k, n in enumerate(shape))
        boxes.append((offsets, sizes, start + segment * each * strides[axis]))
    return PlacedPart(name, whole, _blocks(boxes, strides))


def _axis(name: str, shape: Shape, tps: int) -> int | None:
    if _ROWS.fullmatch(name):
        return 0
    if _COLUMNS.fullmatch(name):
        return 1
    if tps > 1 and not _WHOLE.fullmatch(name):
        raise Unsupported(
            f"'{name}' {list(shape)} is of a module of which it is not known how tensor-parallel ranks cut it; load "
            "the checkpoint with Megatron and save it with --ckpt-format torch_dist"
        )
    return None


def _blocks(boxes: list[tuple[Shape, Shape, int]], strides: Shape) -> Blocks:
    ndim = len(strides)
    return Blocks(
        np.array([offsets for offsets, _, _ in boxes], np.int64).reshape(len(boxes), ndim),
        np.array([sizes for _, sizes, _ in boxes], np.int64).reshape(len(boxes), ndim),
        np.array([start for _, _, start in boxes], np.int64),
        np.tile(np.array(strides, np.int64).reshape(1, ndim), (len(boxes), 1)),
        np.zeros(len(boxes), np.int64),
    )
