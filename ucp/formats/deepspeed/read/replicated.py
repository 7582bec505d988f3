"""Parameters that several pipeline stages hold and for which, as the model says, the first stage's copy counts.

``universal_checkpoint_info`` may list their patterns (``pipeline_replicated_parameter_patterns``). Megatron-DeepSpeed
does so for its tied embedding module: the last stage has all of it but trains only the word embeddings, so its other
copies do not matter. DeepSpeed's own converter skips them as well (``checkpoint/ds_to_universal.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ucp.formats.deepspeed.read.mp_rank import LocalModel
from ucp.parallel.mesh import Coordinate


def is_declared(info: Any, name: str) -> bool:
    """Whether the model's ``universal_checkpoint_info`` says that the first stage's copy of this parameter counts."""
    found = info.get("pipeline_replicated_parameter_patterns") if isinstance(info, Mapping) else None
    return any(re.match(pattern, name) for pattern in found or ())


def first_copies(parts: Mapping[Coordinate, LocalModel]) -> dict[Coordinate, LocalModel]:
    """The parts without what the model declares to be a copy of an earlier stage's parameter."""
    seen: dict[tuple[int, int], set[str]] = {}
    out: dict[Coordinate, LocalModel] = {}
    for at in sorted(parts, key=lambda at: at.pp):
        part, earlier = parts[at], seen.setdefault((at.tp, at.ep), set())
        info = part.model.raw.get("universal_checkpoint_info")
        again = {name for name in part.parameters if name in earlier and is_declared(info, name)}
        earlier.update(part.parameters)
        out[at] = _without(part, again) if again else part
    return {at: out[at] for at in parts}


def _without(part: LocalModel, names: set[str]) -> LocalModel:
    state = part.training_state
    groups = (replace(group, names=tuple(n for n in group.names if n not in names)) for group in state.param_groups)
    return replace(
        part,
        parameters={name: info for name, info in part.parameters.items() if name not in names},
        tensors={key: tensor for key, tensor in part.tensors.items() if key[0] not in names},
        training_state=replace(state, param_groups=tuple(groups)),
    )


def is_autotp(config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's AutoTP has cut the model, by the config that was saved with it."""
    sliced = config.get("tensor_parallel")
    return isinstance(sliced, Mapping) and sliced.get("autotp_size", 0) != 0


def cuts_said(info: Any, config: Mapping[str, Any]) -> Any:
    """What a checkpoint says about how tensor parallelism cuts its model, or None if that cannot be all of it.

    AutoTP of 0.18 names what it cuts by rows alone. By the rule of these patterns all else is cut by columns, also
    norms and embeddings, of which every rank has all; since 0.19 it says of each parameter how it is cut.
    """
    if not (is_autotp(config) and isinstance(info, Mapping)) or "affine_map" in info:
        return info
    return info if info.get("tp_replicated_parameter_patterns") else None
