"""Small models with nasty sizes, and the same global batch whatever the number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

GLOBAL_BATCH = 12  # samples of a micro step; 1, 2, 3 and 4 ranks all divide it
VOCABULARY = 29  # of the odd model
LLAMA_VOCABULARY = 101
SEQUENCE = 5


class Odd(nn.Module):
    """About 3,000 elements in prime-sized, one-element, three-dimensional and tied parameters, with buffers.

    ``frozen`` adds parameters that don't require gradients; ``tied`` makes the head's weight the embedding's.
    Every parameter that requires a gradient gets one. Buffers: ``running`` (float) and ``seen`` (0-d int64) change in
    every forward pass, equally on all ranks; ``positions`` is not persistent.
    """

    running: Tensor
    seen: Tensor
    positions: Tensor

    def __init__(self, frozen: bool = False, tied: bool = False, buffers: bool = True, cube: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 7)
        self.gain = nn.Parameter(torch.ones(1))
        self.up = nn.Linear(7, 53)
        self.middle = nn.Linear(53, 37)
        self.norm = nn.LayerNorm(37)
        self.cube = nn.Parameter(torch.randn(2, 3, 5) * 0.1) if cube else None
        self.down = nn.Linear(37, 7)
        self.shift = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(7, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.adapter: nn.Module | None = None
        if frozen:
            self.adapter = nn.Linear(7, 11)
            self.adapter_gain = nn.Parameter(torch.full((1,), 0.3), requires_grad=False)
            self.adapter.requires_grad_(False)
        self.has_buffers = buffers
        if buffers:
            self.register_buffer("running", torch.zeros(7))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
            self.register_buffer("positions", torch.arange(SEQUENCE, dtype=torch.float32) / SEQUENCE, persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        if self.has_buffers:
            if self.training:
                self.seen += 1
                self.running.mul_(0.9).add_((self.seen % 5).to(self.running.dtype))
            # DeepSpeed leaves fp32 buffers as they are when it casts the parameters.
            hidden = (hidden + self.positions[:, None] + 0.01 * self.running).to(hidden.dtype)
        inner = self.norm(self.middle(nn.functional.gelu(self.up(hidden))))
        if self.cube is not None:
            inner = torch.cat([inner[..., :5] * self.cube.sum(dim=(0, 1)), inner[..., 5:]], dim=-1)
        hidden = hidden + self.down(inner) * self.gain
        if self.adapter is not None:
            hidden = hidden + self.adapter(hidden)[..., :7] * self.adapter_gain
        hidden = torch.cat([hidden[..., :3] + self.shift, hidden[..., 3:]], dim=-1)
        logits = self.head(hidden).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Wrapped(nn.Module):
    """Gives every name the prefix ``_orig_mod.``, as ``torch.compile`` does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._orig_mod(*args, **kwargs)


def llama(tied: bool = False) -> nn.Module:
    """A tiny transformers Llama: hidden 64, 2 layers, 4 heads, 2 key-value heads, vocabulary 101."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=LLAMA_VOCABULARY,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def build(
    kind: str, *, seed: int = 0, frozen: bool = False, tied: bool = False, buffers: bool = True, cube: bool = True
) -> nn.Module:
    """Build the model ``kind`` ("odd" or "llama") with weights that depend on ``seed`` alone."""
    torch.manual_seed(seed)
    if kind == "llama":
        model = llama(tied)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (frozen and "k_proj" in name))
        return model
    if kind == "odd":
        return Odd(frozen=frozen, tied=tied, buffers=buffers, cube=cube)
    raise ValueError(f"unknown model kind {kind!r}; known: odd, llama")


def batch(kind: str, micro_step: int, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """This rank's share of the global batch of ``micro_step``: tokens and labels, each (12 / world_size, 5)."""
    vocabulary = LLAMA_VOCABULARY if kind == "llama" else VOCABULARY
    generator = torch.Generator().manual_seed(7919 + micro_step)
    tokens = torch.randint(vocabulary, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
    share = GLOBAL_BATCH // world_size
    mine = tokens[rank * share : (rank + 1) * share]
    return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()


def loss(kind: str, model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """The mean loss over this rank's share, in fp32."""
    if kind == "llama":
        logits = model(input_ids=tokens, use_cache=False).logits.float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return model(tokens, labels)
