"""Whether ranks of tensor parallelism have equal values of the states that they hold in common.

A weight that they share is kept alike by the model. A state that has only some of its parameter's axes, such as
Adafactor's factors, each rank computes of its own part, and an optimizer that knows nothing of the other parts makes
another one on each rank. A save takes the first rank's, so they are compared before.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import xxhash

from ucp.errors import Unsupported
from ucp.formats.shared.apart import states_apart
from ucp.job import ranks
from ucp.loading.target import Slot


def check_alike(held: Iterable[tuple[Slot, torch.Tensor]], parameters: Iterable[str]) -> None:
    """Raise Unsupported on every rank if any of these differs from what another rank has of the same elements.

    held: the states as slots of the whole model's tensors, and where they live. parameters: names of those that they
    may be states of. Collective.
    """
    known = {*parameters}
    own: dict[tuple[str, bytes], int] = {}
    for slot, tensor in held:
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for member in slot.members:
            where = member.blocks.offsets.tobytes() + member.blocks.sizes.tobytes()
            own[member.name, where] = xxhash.xxh3_64_intdigest(raw)
    seen: dict[tuple[str, bytes], int] = {}
    for found in ranks.gather(own):
        for key, digest in found.items():
            if seen.setdefault(key, digest) != digest:
                owner, state = states_apart([key[0]], known).get(key[0], (key[0], ""))
                raise Unsupported(
                    f"optimizer state '{state}' of '{owner}': each tensor-parallel rank keeps it of its own part of "
                    'the parameter, and they differ; nothing was saved; "ucp": {"save": {"format": "deepspeed"}} keeps '
                    'each, and a spec may say to average them: {axes: "...", states: {'
                    f'{state}: "average(..., tp)"}}}}'
                )
