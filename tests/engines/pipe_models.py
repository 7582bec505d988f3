"""One small model as pipeline layers, as tensor-parallel pipeline layers, and as a plain module; weights are the same.

Every layer draws its whole weights from a generator seeded with (seed, its index), and takes its shard of them, so that
they depend on neither the split into stages nor the tensor-parallel degree.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engines.tensor_parallel import Copy, Sum

HIDDEN = 8
INNER = 12
VOCABULARY = 29
BLOCKS = 4
FIRST_BLOCK = 2  # layer 0 is the embedding, layer 1 a function
LAYERS = FIRST_BLOCK + BLOCKS + 2  # then the last norm and the head

# How tensor parallelism cuts the blocks, and what a plain module calls the pipeline's layers.
SPEC = """\
ucp: 1
model: pipe
sizes:
  hidden: 8
  inner: 12
  vocabulary: 29
parameters:
  tied_modules.embed.weight: vocabulary hidden
  "{n}.norm.*": hidden
  "{n}.gate_up.weight": "(inner/tp | inner/tp) hidden"
  "{n}.gate_up.bias": "(inner/tp | inner/tp)"
  "{n}.down.weight": hidden inner/tp
  "{n}.down.bias": hidden
  "{n}.gain": {axes: hidden, optional: true}
  "6.*": hidden
names:
  plain:
    embed.weight: tied_modules.embed.weight
    blocks.{i}.norm.weight: "{i+2}.norm.weight"
    blocks.{i}.norm.bias: "{i+2}.norm.bias"
    blocks.{i}.gate_up.weight: "{i+2}.gate_up.weight"
    blocks.{i}.gate_up.bias: "{i+2}.gate_up.bias"
    blocks.{i}.down.weight: "{i+2}.down.weight"
    blocks.{i}.down.bias: "{i+2}.down.bias"
    blocks.{i}.gain: "{i+2}.gain"
    blocks.{i}.mean: "{i+2}.mean"
    norm.weight: "6.weight"
    norm.bias: "6.bias"
"""


def pipeline_name(plain: str) -> str:
    """What the pipeline calls a parameter of the plain module; by hand, not by the spec."""
    first, _, rest = plain.partition(".")
    if first == "embed":
        return f"tied_modules.{plain}"
    if first == "norm":
        return f"{FIRST_BLOCK + BLOCKS}.{rest}"
    index, _, rest = rest.partition(".")
    return f"{int(index) + FIRST_BLOCK}.{rest}"


def _weights(seed: int, index: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + index)
    return [torch.randn(shape, generator=generator) * 0.3 for shape in shapes]


class Embed(nn.Module):
    """The token embedding; given hidden states, the head that shares its weight.

    shift: with a parameter that only the embedding uses, as Megatron's positions, so that the head's stage has an idle
    copy of it, which goes its own way.
    """

    def __init__(self, seed: int, shift: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(_weights(seed, 0, (VOCABULARY, HIDDEN))[0])
        if shift:
            self.shift = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point():
            return nn.functional.linear(tokens, self.weight)
        hidden = nn.functional.embedding(tokens, self.weight)
        return hidden + self.shift if hasattr(self, "shift") else hidden


def head(embed: Embed, hidden: Tensor) -> Tensor:
    """The head as a function, of which DeepSpeed writes no layer file."""
    return nn.functional.linear(hidden, embed.weight)


def double(hidden: Tensor) -> Tensor:
    """A layer without parameters."""
    return hidden * 2


class Block(nn.Module):
    """A gated feed-forward block, cut over a tensor-parallel group if there is one.

    ``mean`` is a buffer that every forward pass changes; ``gain`` a frozen parameter, in every other block.
    """

    mean: Tensor

    def __init__(self, seed: int, index: int, frozen: bool, group: Any = None) -> None:
        super().__init__()
        self.group = group
        rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        inner = INNER // size
        up, up_bias, down, down_bias = _weights(
            seed, index, (2 * INNER, HIDDEN), (2 * INNER,), (HIDDEN, INNER), (HIDDEN,)
        )
        mine = slice(rank * inner, (rank + 1) * inner)
        rows = torch.cat([torch.arange(2 * INNER)[k * INNER : (k + 1) * INNER][mine] for k in range(2)])
        self.norm = nn.LayerNorm(HIDDEN)
        self.gate_up = nn.Linear(HIDDEN, 2 * inner)
        self.down = nn.Linear(inner, HIDDEN)
        self.gate_up.weight.data.copy_(up[rows])
        self.gate_up.bias.data.copy_(up_bias[rows])
        self.down.weight.data.copy_(down[:, mine])
        self.down.bias.data.copy_(down_bias)
        if frozen and index % 2:
            self.gain = nn.Parameter(torch.full((HIDDEN,), 1.0 + 0.1 * index), requires_grad=False)
        self.register_buffer("mean", torch.zeros(2))
        if size > 1:
            for parameter in (self.gate_up.weight, self.gate_up.bias, self.down.weight):
                parameter.model_parallel = True  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.5).add_(1)
        inner = self.norm(hidden)
        if self.group is not None:
            inner = Copy.apply(inner, self.group)
        gate, up = self.gate_up(inner).chunk(2, dim=-1)
        out = nn.functional.linear(nn.functional.silu(gate) * up, self.down.weight)
        if self.group is not None:
            out = Sum.apply(out, self.group)
        out = (out + self.down.bias) * (0.9 + 0.01 * self.mean[0].to(out.dtype))
        return hidden + (out * self.gain if hasattr(self, "gain") else out)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def layers(
    seed: int, *, frozen: bool, head_module: bool, shift: bool = False, group: Any = None, blocks: int = BLOCKS
) -> list[Any]:
    """The pipeline's layers. head_module: the head is the tied module itself, so that its stage writes it as well."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    end = FIRST_BLOCK + blocks
    return [
        TiedLayerSpec("embed", Embed, seed, shift),
        double,
        *(LayerSpec(Block, seed, index, frozen, group) for index in range(FIRST_BLOCK, end)),
        LayerSpec(nn.LayerNorm, HIDDEN),
        TiedLayerSpec("embed", Embed, seed, shift, forward_fn=None if head_module else head),
    ]


class Plain(nn.Module):
    """The same model as one module that returns the loss."""

    def __init__(self, seed: int, frozen: bool, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.embed = Embed(seed)
        self.blocks = nn.ModuleList(Block(seed, FIRST_BLOCK + i, frozen) for i in range(blocks))
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = double(self.embed(tokens))
        for block in self.blocks:
            hidden = block(hidden)
        return loss(self.embed(self.norm(hidden)), labels)
