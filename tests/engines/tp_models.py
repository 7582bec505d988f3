"""Models for tensor parallelism: a Llama that DeepSpeed's AutoTP cuts, and a GPT that cuts itself, as Megatron does.

The GPT draws its whole weights from a seeded generator and takes its shard of them, so that they do not depend on the
number of tensor-parallel ranks. Its names are Megatron-DeepSpeed's. It knows sequence parallelism, too (Ulysses): each
rank has a part of every sequence, and while it attends, all of it for a part of the heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engines.tensor_parallel import Copy, Sum

VOCABULARY = 29  # of the GPT; padded to a multiple of 3 x tp
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, POSITIONS, LAYERS = 8, 8, 4, 3, 12, 5, 2
PER_GROUP = HEADS // KV_HEADS + 2  # a group's query heads, its key head and its value head

# The GPT's arguments, as Megatron saves them with a checkpoint.
ARGS = {
    "model_type": "megatron_gpt_plain",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "kv_channels": HEAD_DIM,
    "ffn_hidden_size": FFN,
    "max_position_embeddings": POSITIONS,
    "vocab_size": VOCABULARY,
    "swiglu": True,
}

# What a Megatron-DeepSpeed model says of itself: every list that DeepSpeed's converter knows and this model needs.
INFO = {
    "universal_checkpoint_version": 0.3,
    "original_vocab_size": VOCABULARY,
    "vocabulary_parameter_patterns": [r".*word_embeddings.weight"],
    "tp_replicated_parameter_patterns": [
        r".*layernorm\.(weight|bias)$",
        r".*position_embeddings.weight",
        r".*dense\.bias",
        r".*dense_4h_to_h\.bias",
    ],
    "parameter_with_row_parallelism_patterns": [r".*self_attention\.dense\.weight", r".*dense_4h_to_h\.weight"],
    "parameter_with_2_sub_params_cat_dim_0": [r".*dense_h_to_4h\.(weight|bias)"],
}


class Slices:
    """The part of an ``mpu`` that tells of tensor parallelism, under both names that DeepSpeed asks by."""

    tp_group: Any

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.tp_group)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.tp_group)

    def get_model_parallel_group(self) -> Any:
        return self.tp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


class Mesh(Slices):
    """An ``mpu``, as Megatron's: tensor-parallel ranks are neighbours."""

    def __init__(self, tp: int) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        for first in range(0, world, tp):
            group = dist.new_group(list(range(first, first + tp)))
            if first <= rank < first + tp:
                self.tp_group = group
        for first in range(tp):
            group = dist.new_group(list(range(first, world, tp)))
            if rank % tp == first:
                self.dp_group = group

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.dp_group)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.dp_group)

    def get_data_parallel_group(self) -> Any:
        return self.dp_group


class _Join(torch.autograd.Function):
    """The ranks' parts of the last dimension side by side; backward takes this rank's part."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.rank, ctx.width = dist.get_rank(group), value.shape[-1]
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, value.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][..., ctx.rank * ctx.width : (ctx.rank + 1) * ctx.width].contiguous(), None


class _Parallel:
    """A tensor-parallel group, or none; and a sequence-parallel one."""

    def __init__(self, group: Any, sequence: Any = None) -> None:
        self.group = group
        self.sequence = sequence
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)

    def __deepcopy__(self, memo: Any) -> _Parallel:
        return self

    def rows(self, whole: Tensor, segments: int = 1) -> nn.Parameter:
        """This rank's rows of each of the equal segments."""
        return self.own(torch.cat([s.chunk(self.size)[self.rank] for s in whole.chunk(segments)]))

    def columns(self, whole: Tensor) -> nn.Parameter:
        return self.own(whole.chunk(self.size, dim=1)[self.rank])

    def own(self, part: Tensor) -> nn.Parameter:
        parameter = nn.Parameter(part.clone())
        if self.size > 1:
            parameter.model_parallel = True  # type: ignore[attr-defined]
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        return parameter

    def copy(self, value: Tensor) -> Tensor:
        return value if self.group is None else Copy.apply(value, self.group)

    def sum(self, value: Tensor) -> Tensor:
        return value if self.group is None else Sum.apply(value, self.group)

    def join(self, value: Tensor) -> Tensor:
        return value if self.group is None else _Join.apply(value, self.group)


class _Linear(nn.Module):
    """A weight and a bias, given."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias


class _Attention(nn.Module):
    def __init__(self, tp: _Parallel, draw: Any) -> None:
        super().__init__()
        self.tp = tp
        rows = KV_HEADS * PER_GROUP * HEAD_DIM
        self.query_key_value = _Linear(tp.rows(draw(rows, HIDDEN)), tp.rows(draw(rows)))
        self.dense = _Linear(tp.columns(draw(HIDDEN, HEADS * HEAD_DIM)), nn.Parameter(draw(HIDDEN)))

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of tensors (batch, length, heads, dim)."""
        scores = torch.einsum("bthd,bshd->bhts", query, key) / HEAD_DIM**0.5
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return torch.einsum("bhts,bshd->bthd", scores.masked_fill(mask, float("-inf")).softmax(-1), value)

    def forward(self, hidden: Tensor) -> Tensor:
        fused = nn.functional.linear(self.tp.copy(hidden), self.query_key_value.weight, self.query_key_value.bias)
        batch, length, _ = fused.shape
        groups = fused.reshape(batch, length, KV_HEADS // self.tp.size, PER_GROUP, HEAD_DIM)
        query, key, value = groups.split([PER_GROUP - 2, 1, 1], dim=3)
        heads = [t.expand_as(query).flatten(2, 3).contiguous() for t in (query, key, value)]
        if self.tp.sequence is None:
            out = self.attend(*heads)
        else:
            from deepspeed.sequence.layer import DistributedAttention

            out = DistributedAttention(self.attend, self.tp.sequence, 2, 1)(*heads, 0)
        out = out.reshape(batch, length, -1)
        return self.tp.sum(nn.functional.linear(out, self.dense.weight)) + self.dense.bias


class _Mlp(nn.Module):
    """SwiGLU: a rank's first weight is its gate rows, then its up rows."""

    def __init__(self, tp: _Parallel, draw: Any) -> None:
        super().__init__()
        self.tp = tp
        self.dense_h_to_4h = _Linear(tp.rows(draw(2 * FFN, HIDDEN), 2), tp.rows(draw(2 * FFN), 2))
        self.dense_4h_to_h = _Linear(tp.columns(draw(HIDDEN, FFN)), nn.Parameter(draw(HIDDEN)))

    def forward(self, hidden: Tensor) -> Tensor:
        up = nn.functional.linear(self.tp.copy(hidden), self.dense_h_to_4h.weight, self.dense_h_to_4h.bias)
        gate, up = up.chunk(2, dim=-1)
        return self.tp.sum(nn.functional.linear(nn.functional.silu(gate) * up, self.dense_4h_to_h.weight)) + (
            self.dense_4h_to_h.bias
        )


class _Layer(nn.Module):
    def __init__(self, tp: _Parallel, draw: Any) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN)
        self.self_attention = _Attention(tp, draw)
        self.post_attention_layernorm = nn.LayerNorm(HIDDEN)
        self.mlp = _Mlp(tp, draw)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attention(self.input_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _Embedding(nn.Module):
    """Rows of the vocabulary by rank, the last rank's with random padding; the head shares the weight."""

    def __init__(self, tp: _Parallel, draw: Any) -> None:
        super().__init__()
        self.tp = tp
        weight, positions = draw(VOCABULARY, HIDDEN), draw(POSITIONS, HIDDEN)
        padding = draw(-VOCABULARY % (3 * tp.size), HIDDEN)
        self.word_embeddings = nn.Embedding(1, 1)
        self.word_embeddings.weight = tp.rows(torch.cat([weight, padding]))
        self.position_embeddings = nn.Embedding(POSITIONS, HIDDEN)
        self.position_embeddings.weight = nn.Parameter(positions)

    def forward(self, tokens: Tensor) -> Tensor:
        weight = self.word_embeddings.weight
        local = tokens - self.tp.rank * len(weight)
        mine = (local >= 0) & (local < len(weight))
        words = nn.functional.embedding(local.where(mine, 0), weight) * mine[..., None]
        first = 0 if self.tp.sequence is None else dist.get_rank(self.tp.sequence) * tokens.shape[1]
        return self.tp.sum(words) + self.position_embeddings.weight[first : first + tokens.shape[1]]

    def logits(self, hidden: Tensor) -> Tensor:
        local = nn.functional.linear(self.tp.copy(hidden), self.word_embeddings.weight)
        return self.tp.join(local)[..., :VOCABULARY]


class _Encoder(nn.Module):
    def __init__(self, tp: _Parallel, draw: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(tp, draw) for _ in range(LAYERS))
        self.final_layernorm = nn.LayerNorm(HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return self.final_layernorm(hidden)


class _Language(nn.Module):
    def __init__(self, embedding: _Embedding, encoder: _Encoder) -> None:
        super().__init__()
        self.embedding = embedding
        self.encoder = encoder


class Gpt(nn.Module):
    """A tensor-parallel GPT over a group, or the whole one without it. Returns the loss, or without labels logits; over
    a sequence-parallel group this rank's part of the loss."""

    def __init__(self, seed: int, group: Any = None, says_info: bool = False, sequence: Any = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1000 * seed + 7)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) * 0.3

        tp = _Parallel(group, sequence)
        self.share = 1.0 if sequence is None else 1 / dist.get_world_size(sequence)
        encoder = _Encoder(tp, draw)
        self.language_model = _Language(_Embedding(tp, draw), encoder)  # drawn last: its padding depends on tp
        self.config = dict(ARGS)
        if says_info:
            self.universal_checkpoint_info = INFO

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        embedding = self.language_model.embedding
        logits = embedding.logits(self.language_model.encoder(embedding(tokens))).float()
        if labels is None:
            return logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) * self.share


def llama(seed: int, kv_heads: int, tied: bool = False) -> nn.Module:
    """A tiny Llama of odd sizes: 4 query heads for each key head, of 6 each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=23,
        num_hidden_layers=2,
        num_attention_heads=4 * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=6,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        attn_implementation="eager",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)
