"""Tensors that are shared out over several ranks, of which a pickle holds one rank's part: DTensors and ShardedTensors.

Each becomes a `Standin` with the attributes of the original: a DTensor's ``_local_tensor`` and ``_spec``, and a
ShardedTensor's ``_local_shards`` and ``_metadata`` (torch distributed/_shard/sharded_tensor/api.py: __getstate__).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ucp.errors import Unsupported
from ucp.storage.torch_pt.named import Global
from ucp.storage.torch_pt.values import Standin

DTENSOR = ("torch.distributed.tensor", "DTensor")
SHARDED = ("torch.distributed._shard.sharded_tensor.api", "ShardedTensor")
_DTENSORS = {DTENSOR, ("torch.distributed._tensor.api", "DTensor"), ("torch.distributed.tensor._api", "DTensor")}
CLASSES = frozenset({*_DTENSORS, SHARDED})
# A class inside ShardedTensor, which pickles as ``getattr(ShardedTensor, "ProcessGroupState")``.
INNER = {(*SHARDED, "ProcessGroupState"): Global(SHARDED[0], "ShardedTensor.ProcessGroupState")}

REFUSED = "it holds a tensor subclass (torch._utils._rebuild_wrapper_subclass), which is not supported"


def rebuilt(tensor_class: Any, state: Any, attributes: Callable[[Any], Mapping[str, Any]]) -> Standin:
    """What stands for a tensor of such a class. Raises Unsupported for any other class, TypeError for a state that the
    class does not pickle."""
    key = (tensor_class.module, tensor_class.name) if type(tensor_class) is Global else ("", "")
    if key in _DTENSORS:
        return Standin(*DTENSOR, (), dict(attributes(state)))
    if key != SHARDED:
        raise Unsupported(REFUSED)
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[0], list):
        raise TypeError("a ShardedTensor's state is its shards and four more")
    return Standin(*SHARDED, (), {"_local_shards": state[0], "_metadata": state[1]})


def is_part(value: Any) -> bool:
    """Whether it stands for one rank's part of a tensor."""
    return type(value) is Standin and (value.class_module, value.class_name) in (DTENSOR, SHARDED)
