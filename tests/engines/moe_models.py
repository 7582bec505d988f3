"""A small model with DeepSpeed's own mixture-of-experts layers, its experts all different whatever rank holds them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.engines.models import VOCABULARY

EXPERTS = 4
HIDDEN = 6


class Expert(nn.Module):
    """One expert. ``share`` is a persistent buffer, another one in every expert."""

    share: Tensor

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 11)
        self.down = nn.Linear(11, HIDDEN)
        self.shift = nn.Parameter(torch.zeros(HIDDEN), requires_grad=not frozen)
        self.register_buffer("share", torch.ones(1))

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.gelu(self.up(hidden))) + self.shift
        return (out * self.share).to(hidden.dtype)


class Mixture(nn.Module):
    """Two mixture layers between dense ones: the first routes every token to one expert, the second, of
    ``later`` experts over ``later_ep`` ranks, to two, beside a dense expert of its own (``use_residual``).

    No token is dropped and no auxiliary loss is used, so that the loss is the same however the batch is split.
    """

    def __init__(self, ep: int, later_ep: int, frozen: bool = False, experts: int = EXPERTS) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        plain = {"drop_tokens": False, "min_capacity": 0, "use_rts": False}
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.first = MoE(HIDDEN, Expert(frozen), num_experts=experts, ep_size=ep, k=1, **plain)
        self.dense = nn.Linear(HIDDEN, HIDDEN)
        self.second = MoE(
            HIDDEN,
            Expert(frozen),
            num_experts=experts,
            ep_size=later_ep,
            k=2,
            use_residual=True,
            top2_2nd_expert_sampling=False,
            **plain,
        )
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.register_buffer("scale", torch.full((3,), 0.5))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.first(hidden)[0]
        hidden = hidden + torch.tanh(self.dense(hidden))
        hidden = hidden + self.second(hidden)[0]
        logits = self.head(self.norm(hidden)).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def first_expert(layer: nn.Module, dp_rank: int, dp: int, data_first: bool) -> int:
    """The global number of the layer's first expert on a rank. data_first: ``use_data_before_expert_parallelism``."""
    ep, count = int(layer.ep_size), int(layer.num_local_experts)  # type: ignore[arg-type]
    return (dp_rank // (dp // ep) if data_first else dp_rank % ep) * count


def build(
    *,
    seed: int,
    ep: int,
    later_ep: int,
    dp_rank: int,
    dp: int,
    data_first: bool = False,
    frozen: bool = False,
    experts: int = EXPERTS,
) -> Mixture:
    """The model of one rank; every expert's weights depend on the seed, its layer and its global number alone."""
    torch.manual_seed(seed)
    model = Mixture(ep, later_ep, frozen, experts)
    for index, layer in enumerate((model.first, model.second)):
        start = first_expert(layer, dp_rank, dp, data_first)
        for local, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            generator = torch.Generator().manual_seed(1 + 1000 * seed + 100 * index + start + local)
            for parameter in expert.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
            expert.share.fill_(0.5 + 0.1 * (start + local) + index)
    return model
