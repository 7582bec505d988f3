"""Optimizer states in buckets (``dp_reshardable``), told apart by parameter.

The distributed optimizer keeps the parameters of a model-parallel rank in flat buffers: in the reverse of the module's
order, each beginning at a multiple of 64 elements, the buffers cut into buckets between parameters
(megatron/core/distributed/param_and_grad_buffer.py). A bucket is saved as one tensor of one dimension for each state,
in a chunk for each parameter, or each part of one where data-parallel ranks cut it
(optimizer/distrib_optimizer.py: ``sharded_param_state_dp_reshardable``).

Nothing names the parameters. Their order within a layer depends on the module's classes, so all known orders are tried.
An order fits if every parameter begins and ends where chunks do, and if the masters in it, rounded, are the weights. If
none fits, or if two fit that differ, the checkpoint is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ucp.catalog import Catalog, LogicalTensor
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.megatron import keys
from ucp.formats.megatron.read.layout import RunLayout
from ucp.geometry import Blocks, Shape, compose, concat, flat_ranges, numel, row_major

_BUCKET = re.compile(
    r"(?:chained_(?P<chain>\d+)\.)?optimizer\.distributed\.dp_group_idx_(?P<group>\d+)\.gbuf_idx_(?P<buffer>\d+)"
    r"\.dtype_\((?P<dtype>[^,]+),[^)]*\)\.bucket_idx_(?P<bucket>\d+)\.(?P<state>[^.]+)"
)
_ALIGNMENT = 64

# The orders of a layer's modules: of Megatron's own classes, and of those with a norm inside a linear layer.
_OWN = (
    r"self_attention\.linear_qkv\.layer_norm_|input_layernorm\.",
    r"self_attention\.linear_proj\.",
    r"self_attention\.linear_qkv\.|self_attention\.linear_q_proj\.",
    r"self_attention\.linear_q_down_proj\.",
    r"self_attention\.linear_q_up_proj\.",
    r"self_attention\.linear_kv_down_proj\.",
    r"self_attention\.linear_kv_up_proj\.",
    r"self_attention\.q_layernorm\.",
    r"self_attention\.k(v)?_layernorm\.",
    r"mlp\.linear_fc1\.layer_norm_|pre_mlp_layernorm\.",
    r"mlp\.router\.",
    r"mlp\.experts\.",
    r"mlp\.shared_experts\.",
    r"mlp\.linear_fc1\.",
    r"mlp\.linear_fc2\.",
)
_FUSED = (_OWN[1], _OWN[0], *_OWN[2:9], _OWN[9], *_OWN[10:])
_ENDINGS = ("layer_norm_weight", "layer_norm_bias", "weight", "bias")
_FIRST, _LAST = ("embedding.",), ("decoder.final_layernorm.", "output_layer.")


@dataclass(frozen=True)
class Bucket:
    """A bucket's states. dtype: of the weights in its buffer, as torch calls it."""

    dtype: str
    states: Mapping[str, LogicalTensor]

    @property
    def size(self) -> int:
        return next(iter(self.states.values())).shape[0]


def is_bucket(key: str) -> bool:
    return _BUCKET.fullmatch(key) is not None


def read(
    folder: object, stored: Mapping[str, LogicalTensor], weights: Mapping[str, LogicalTensor], where: RunLayout
) -> Iterator[tuple[dict[tuple[str, str], LogicalTensor], list[LogicalTensor]]]:
    """What the buckets hold by each order that fits: tensors by parameter and state, and copies of them.

    stored: all of the folder's tensors by their keys. weights: the modules' own that are trained, by name.
    Raises Unsupported where no order fits, DamagedCheckpoint for buckets that can't be.
    """
    buffers = _buffers(stored)
    fitted, reason = False, ""
    for order in _orders(weights):
        try:
            found = _by_order(buffers, order, weights, where)
        except _NoFit as error:
            reason = str(error)
            continue
        fitted = True
        yield found
    if not fitted:
        raise Unsupported(
            f"{folder}: its optimizer is saved in buckets, and the order of the parameters in them is none that is "
            f"known ({reason}); load it with Megatron and save it with --dist-ckpt-optim-fully-reshardable"
        )


def chosen(folder: object, fitting: Sequence[tuple[Catalog, Sequence[str]]]) -> Catalog:
    """The one catalog whose masters are the weights, of those that fit: each with the names of which they aren't.

    Raises Unsupported where that is none or several.
    """
    right = [catalog for catalog, odd in fitting if not odd]
    if len(right) == 1:
        return right[0]
    if right:
        why = f"{len(right)} orders of its parameters fit"
    else:
        why = f"by the one order that fits, the masters of '{fitting[0][1][0]}' and others are not its weights, rounded"
    raise Unsupported(
        f"{folder}: its optimizer is saved in buckets, and {why}; load it with Megatron and save it with "
        "--dist-ckpt-optim-fully-reshardable"
    )


class _NoFit(Exception):
    """An order does not fit, and where."""


Buffers = Mapping[tuple[int, int], Mapping[int, Sequence[Bucket]]]


def _buffers(stored: Mapping[str, LogicalTensor]) -> Buffers:
    """(chain, data-parallel group) -> number of a buffer -> its buckets in order."""
    found: dict[tuple[int, int], dict[int, dict[int, tuple[str, dict[str, LogicalTensor]]]]] = {}
    for key, tensor in stored.items():
        m = _BUCKET.fullmatch(key)
        if m is None:
            continue
        if len(tensor.shape) != 1:
            raise DamagedCheckpoint(f"'{key}' has {len(tensor.shape)} dimensions, and a bucket has one")
        at = found.setdefault((int(m["chain"] or 0), int(m["group"])), {}).setdefault(int(m["buffer"]), {})
        at.setdefault(int(m["bucket"]), (m["dtype"], {}))[1][m["state"]] = tensor
    out: dict[tuple[int, int], dict[int, list[Bucket]]] = {}
    for group, several in sorted(found.items()):
        for number, buckets in sorted(several.items()):
            if sorted(buckets) != list(range(len(buckets))):
                raise DamagedCheckpoint(
                    f"the buckets of data-parallel group {group[1]} are {sorted(buckets)}; some are missing"
                )
            listed = [Bucket(dtype.removeprefix("torch."), states) for _, (dtype, states) in sorted(buckets.items())]
            for bucket in listed:
                if len({t.shape for t in bucket.states.values()}) > 1 or "param" not in bucket.states:
                    raise DamagedCheckpoint(f"a bucket of data-parallel group {group[1]} has states of several sizes")
            out.setdefault(group, {})[number] = listed
    return out


def _orders(weights: Mapping[str, LogicalTensor]) -> Iterator[list[str]]:
    """The orders of all parameters that there may be, each once."""
    seen = set()
    for modules in (_OWN, _FUSED):
        for by_expert in (True, False):
            names = sorted(weights, key=lambda name: _place(name, modules, by_expert))
            if tuple(names) not in seen:
                seen.add(tuple(names))
                yield names
    as_stored = keys.order(weights)
    if tuple(as_stored) not in seen:
        yield as_stored


def _place(name: str, modules: Sequence[str], by_expert: bool) -> tuple[int, ...]:
    if name.startswith(_FIRST):
        return (0, *([0] * 6), "position" in name)
    last = next((k for k, start in enumerate(_LAST) if name.startswith(start)), None)
    if last is not None:
        return (2, last, 0, 0, 0, 0, 0, name.endswith("bias"))
    layer = keys.layer(name)
    rest = name if layer is None else name.split(f".{layer}.", 1)[1]
    module = next((k for k, pattern in enumerate(modules) if re.match(pattern, rest)), len(modules))
    ending = next((k for k, e in enumerate(_ENDINGS) if rest.endswith(e)), len(_ENDINGS))
    expert = re.search(r"local_experts\.(\d+)\.linear_fc(\d)", rest)
    number, fc = (int(expert[1]), int(expert[2])) if expert else (0, int("linear_fc2" in rest))
    inner = (number, fc, ending) if by_expert or not expert else (fc, ending, number)
    return (1, -1 if layer is None else layer, module, *inner, 0, 0)


def _by_order(
    buffers: Buffers, order: Sequence[str], weights: Mapping[str, LogicalTensor], where: RunLayout
) -> tuple[dict[tuple[str, str], LogicalTensor], list[LogicalTensor]]:
    """Raises _NoFit where the order does not fit some buffer."""
    parts: dict[tuple[str, str], list[LogicalTensor]] = {}
    copies: list[LogicalTensor] = []
    experts_apart = any(chain for chain, _ in buffers)
    held: dict[tuple[str, bytes], bool] = {}
    for (chain, group), several in buffers.items():
        names = [n for n in order if not experts_apart or (chain > 0) == (".experts." in n)]
        own = _own_of_group(names, weights, where, group, expert=chain > 0)
        alike = Counter(buckets[0].dtype for buckets in several.values())
        before: Counter[str] = Counter()
        for buckets in several.values():
            kind = buckets[0].dtype
            chunks = virtual_stages([name for name, _ in own], alike[kind])
            mine = [(n, o) for n, o in own if weights[n].dtype == kind and chunks[n] == before[kind]]
            before[kind] += 1
            for name, outer, tensors in _walk(mine, weights, buckets):
                first = held.setdefault((name, outer.offsets.tobytes()), True)
                held[name, outer.offsets.tobytes()] = False
                for tensor in tensors:
                    if first:
                        parts.setdefault((name, tensor.state), []).append(tensor)
                    else:
                        copies.append(tensor)
    return {key: _together(several) for key, several in parts.items()}, copies


def virtual_stages(names: Sequence[str], count: int) -> Mapping[str, int]:
    """Which of a rank's virtual stages each parameter is in; each has a buffer of its own. A stage's layers follow one
    another, and between two of a rank's lie those of the other ranks. Raises _NoFit where they can't be told apart."""
    layers = sorted({layer for name in names if (layer := keys.layer(name)) is not None})
    apart = np.cumsum([0, *(np.diff(layers) > 1)]).tolist() if count > 1 else [0] * len(layers)
    if layers and max(apart) + 1 != count:
        raise _NoFit(f"a rank has {count} buffers of one type, and {max(apart) + 1} rows of layers that follow another")
    stage = dict(zip(layers, apart, strict=False))
    ends = {name: count - 1 if name.startswith(_LAST) else 0 for name in names}
    return {name: ends[name] if (layer := keys.layer(name)) is None else stage[layer] for name in names}


def _own_of_group(
    names: Sequence[str], weights: Mapping[str, LogicalTensor], where: RunLayout, group: int, expert: bool
) -> list[tuple[str, Blocks]]:
    """The parameters of a data-parallel group in its buffers' order, each with its shard's boxes in the whole one."""
    layout = where.layout
    experts = {int(m[1]) for n in weights if (m := re.search(r"\.local_experts\.(\d+)\.", n))}
    if expert:
        tp = max((_cuts(weights[n])[1] for n in names if n.endswith("linear_fc2.weight")), default=1)
        slice_, rest = group % tp, group // tp
        part, stage = rest % layout.ep, rest // layout.ep
    else:
        tp = layout.tp
        slice_, stage, part = group % tp, group // tp, 0
    tied = "output_layer.weight" not in weights and layout.pp > 1
    out = []
    for name in names:
        found = re.search(r"\.local_experts\.(\d+)\.", name)
        if expert and found is not None and int(found[1]) // max(len(experts) // layout.ep, 1) != part:
            continue
        if _stage(name, where) == stage:
            out.append((name, _shard(name, weights[name], tp, slice_)))
    if tied and stage == layout.pp - 1 and not expert:
        name = "embedding.word_embeddings.weight"
        out.append((name, _shard(name, weights[name], tp, slice_)))
    return out[::-1]


def _stage(name: str, where: RunLayout) -> int:
    layer = keys.layer(name)
    if layer is not None:
        return where.stages.get(layer, 0)
    return where.layout.pp - 1 if name.startswith(_LAST) else 0


def _cuts(weight: LogicalTensor) -> tuple[int, int]:
    """(axis, into how many) a weight's chunks are; (0, 1) for one in one piece."""
    for axis in range(len(weight.shape)):
        count = len(np.unique(weight.blocks.offsets[:, axis]))
        if count > 1:
            return axis, count
    return 0, 1


def _shard(name: str, weight: LogicalTensor, tp: int, slice_: int) -> Blocks:
    """The boxes that a tensor-parallel rank has of a parameter, at their places in its shard's row-major order: one, or
    one of each segment where the segments are cut each by itself."""
    axis, count = _cuts(weight)
    if count == 1:
        offsets, sizes = np.zeros((1, len(weight.shape)), np.int64), np.array([weight.shape], np.int64)
    else:
        if count % tp:
            raise _NoFit(f"'{name}' lies in {count} chunks, and there are {tp} tensor-parallel ranks")
        ordered = np.argsort(weight.blocks.offsets[:, axis], kind="stable")[slice_::tp]
        offsets, sizes = weight.blocks.offsets[ordered], weight.blocks.sizes[ordered]
    shape = _shard_shape(sizes, axis)
    starts = np.concatenate([[0], np.cumsum(sizes[:-1, axis])]) * (row_major(shape)[axis] if shape else 1)
    strides = np.tile(np.array(row_major(shape), np.int64).reshape(1, -1), (len(sizes), 1))
    return Blocks(offsets, sizes, starts.astype(np.int64), strides, np.zeros(len(sizes), np.int64))


def _shard_shape(sizes: np.ndarray, axis: int) -> Shape:
    shape = [int(n) for n in sizes[0]]
    if shape:
        shape[axis] = int(sizes[:, axis].sum())
    return tuple(shape)


def _walk(
    own: Sequence[tuple[str, Blocks]], weights: Mapping[str, LogicalTensor], buckets: Sequence[Bucket]
) -> Iterator[tuple[str, Blocks, list[LogicalTensor]]]:
    """Each parameter of a buffer with its states."""
    bucket, at = 0, 0
    for name, outer in own:
        if bucket == len(buckets):
            raise _NoFit(f"there is no bucket for '{name}'")
        now = buckets[bucket]
        start = -(-at // _ALIGNMENT) * _ALIGNMENT
        axis = _cuts(weights[name])[0]
        shape = _shard_shape(outer.sizes, axis)
        end = start + numel(shape)
        chunks = now.states["param"].blocks
        starts, ends = chunks.offsets[:, 0], chunks.offsets[:, 0] + chunks.sizes[:, 0]
        if end > now.size or not np.any(starts == start) or not np.any(ends == end):
            raise _NoFit(f"'{name}' would be elements {start} to {end} of a bucket of {now.size}, which no chunks are")
        yield (
            name,
            outer,
            [_cut_out(name, s, t, start, shape, outer, weights[name].shape) for s, t in now.states.items()],
        )
        at = end
        if end == now.size:
            bucket, at = bucket + 1, 0
    if bucket != len(buckets):
        raise _NoFit(f"{len(buckets) - bucket} buckets are left")


def _cut_out(
    name: str, state: str, bucket: LogicalTensor, start: int, shape: Shape, outer: Blocks, whole: Shape
) -> LogicalTensor:
    """One state of a parameter's shard, as boxes of the whole parameter where they lie in the bucket's files."""
    b = bucket.blocks
    first = np.maximum(b.offsets[:, 0], start)
    last = np.minimum(b.offsets[:, 0] + b.sizes[:, 0], start + numel(shape))
    kept = np.flatnonzero(first < last)
    begins = b.starts[kept] + (first[kept] - b.offsets[kept, 0])
    inner = flat_ranges(shape, first[kept] - start, last[kept] - start, begins, kept)
    placed, index = compose(inner, outer, shape, whole)
    chunk = inner.buffers[index]
    return LogicalTensor(
        name, state, whole, bucket.dtype, replace(placed, buffers=b.buffers[chunk]), bucket.bases[chunk]
    )


def _together(parts: Sequence[LogicalTensor]) -> LogicalTensor:
    blocks = concat([part.blocks for part in parts], len(parts[0].shape))
    return replace(parts[0], blocks=blocks, bases=np.concatenate([part.bases for part in parts]))
