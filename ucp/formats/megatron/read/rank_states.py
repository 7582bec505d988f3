"""A model-parallel rank's optimizer states in Megatron's older layout, by its parameters.

Nothing names them. A plain optimizer numbers its parameters group by group, each in the module's order, and which
parameters a group has is a rule (`ucp.formats.megatron.read.common`). The distributed optimizer's buffers hold them in
the reverse of the module's order, each at a multiple of 64 elements from its bucket's start; where a bucket ends is not
said, so both places are tried, and the masters there, rounded, have to be the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ucp import limits
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.megatron.read import common
from ucp.formats.megatron.read.rank_places import PlacedPart
from ucp.formats.shared.builder import Builder
from ucp.geometry import numel
from ucp.storage.dtypes import itemsize
from ucp.storage.rounding import rounds_to
from ucp.storage.torch_pt.values import DtypeName, TensorRef

_ALIGNMENT = 64
_NO_PARAMETERS = ("expert_bias", "local_tokens_per_expert", "inv_freq")
_WAY_ON = "load it with Megatron and save it with --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable"


@dataclass(frozen=True)
class OwnTensor:
    """A rank's tensor: its module's name, its weight, and the parts of parameters that it holds."""

    name: str
    weight: TensorRef
    parts: tuple[PlacedPart, ...]

    @property
    def trained(self) -> bool:
        return "float" in self.weight.dtype and not self.name.endswith(_NO_PARAMETERS)


@dataclass(frozen=True)
class FoundState:
    """A state of a part of a parameter: a flat buffer, and the element from which the rank's tensor lies there."""

    placed: PlacedPart
    state: str
    ref: TensorRef
    start: int


def optimizer_states(
    file: Path, saved: Any, distributed: Any, own: Sequence[OwnTensor], builder: Builder
) -> Iterator[FoundState]:
    """saved: the entry 'optimizer' of the rank's file; None where it was not saved. distributed: what the other file
    holds. Raises Unsupported where states can't be told apart, DamagedCheckpoint where they don't fit."""
    trained = [tensor for tensor in own if tensor.trained]
    if distributed is not None:
        chain = distributed if isinstance(distributed, (list, tuple)) else [distributed]
        for number, one in enumerate(chain):
            if one is not None:
                mine = trained if len(chain) == 1 else [t for t in trained if (".experts." in t.name) == (number > 0)]
                yield from _Buffers(file, builder).read(one, mine)
        return
    if saved is None:
        return
    several = list(saved) if isinstance(saved, (list, tuple)) else [saved]
    for number, one in enumerate(several):
        mine = trained if len(several) == 1 else [t for t in trained if (".experts." in t.name) == (number > 0)]
        yield from _numbered(file, one, mine)


# --- plain optimizers ------------------------------------------------------------------------------------------------


def _numbered(file: Path, saved: Mapping[str, Any], own: Sequence[OwnTensor]) -> Iterator[FoundState]:
    inner = saved.get("optimizer", saved)
    if not inner.get("state"):
        return
    groups = common.groups([saved])
    named, why = common.named(groups, {tensor.name: len(tensor.weight.shape) for tensor in own})
    if why:
        raise Unsupported(f"{file}: {why}; {_WAY_ON}")
    masters = saved.get("fp32_from_fp16_params")
    for index, (group, names) in enumerate(zip(inner["param_groups"], named, strict=True)):
        members = [tensor for tensor in own if tensor.name in set(names.names)]
        if len(members) != len(group["params"]):
            raise DamagedCheckpoint(
                f"{file}: param group {index} has {len(group['params'])} parameters, and {len(members)} of the model's "
                "belong to it"
            )
        low = iter(masters[index]) if masters is not None else iter(())
        for tensor, number in zip(members, group["params"], strict=True):
            states = {k: v for k, v in inner["state"].get(number, {}).items() if k != "step"}
            if masters is not None and tensor.weight.dtype != "float32":
                states["param"] = next(low, None)
            for state, ref in states.items():
                yield from _of(file, tensor, state, ref)


def _of(file: Path, tensor: OwnTensor, state: str, ref: Any) -> Iterator[FoundState]:
    if not isinstance(ref, TensorRef) or ref.shape != tensor.weight.shape or not ref.is_contiguous:
        found = list(ref.shape) if isinstance(ref, TensorRef) else type(ref).__name__
        raise DamagedCheckpoint(
            f"{file}: '{tensor.name}' has shape {list(tensor.weight.shape)} and its state '{state}' is {found}; the "
            "optimizer is another model's"
        )
    for part in tensor.parts:
        yield FoundState(part, state, ref, 0)


# --- the distributed optimizer's buffers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Buffers:
    file: Path
    builder: Builder

    def read(self, saved: Mapping[Any, Any], own: Sequence[OwnTensor]) -> Iterator[FoundState]:
        if not saved.get("buckets_coalesced"):
            raise Unsupported(
                f"{self.file.parent}: its distributed optimizer is of a release before Megatron-Core 0.7, which saved "
                f"bucket by bucket; {_WAY_ON}"
            )
        left = list(own)
        for key in sorted(key for key in saved if isinstance(key, int)):
            for dtypes, states in saved[key].items():
                dtype = _name(dtypes[0] if isinstance(dtypes, tuple) else dtypes)
                mine = [tensor for tensor in left if tensor.weight.dtype == dtype]
                left = [tensor for tensor in left if tensor.weight.dtype != dtype]
                yield from self._walk({k: v for k, v in states.items() if isinstance(v, TensorRef)}, mine[::-1])
        if left:
            raise DamagedCheckpoint(
                f"{self.file.parent}: no buffer of its optimizer is of the type of '{left[0].name}'"
            )

    def _walk(self, states: Mapping[str, TensorRef], own: Sequence[OwnTensor]) -> Iterator[FoundState]:
        """Each parameter of a buffer. base: where its bucket begins."""
        masters = states["param"]
        size = masters.numel
        if any(ref.shape != (size,) for ref in states.values()):
            raise DamagedCheckpoint(f"{self.file.parent}: a buffer of its optimizer has states of several sizes")
        base = at = 0
        for tensor in own:
            count = numel(tensor.weight.shape)
            aligned = base + -(-(at - base) // _ALIGNMENT) * _ALIGNMENT
            fits = [start for start in dict.fromkeys((aligned, at)) if self._is_at(masters, start, tensor)]
            if not fits:
                raise Unsupported(
                    f"{self.file.parent}: the optimizer's masters of '{tensor.name}' are not where its order of the "
                    f"parameters has them (element {aligned} of {size}), or are not its weights, rounded; {_WAY_ON}"
                )
            start = fits[0]
            if start != aligned:
                base = start  # a new bucket
            at = start + count
            for part in tensor.parts:
                for state, ref in states.items():
                    yield FoundState(part, state, ref, start)
        if at != size:
            raise DamagedCheckpoint(
                f"{self.file.parent}: a buffer of its optimizer has {size} elements, and the model's parameters {at}"
            )

    def _is_at(self, masters: TensorRef, start: int, tensor: OwnTensor) -> bool:
        """Whether the first and the last elements there are the weight's, not rounded."""
        weight = tensor.weight
        count = numel(weight.shape)
        if start + count > masters.numel:
            return False
        few = min(limits.SAME_RUN_ELEMENTS_COUNT, count)
        for first in (0, count - few):
            high = self._bits(masters, start + first, few)
            low = self._bits(weight, first, few)
            if rounds_to(high, masters.dtype, low, weight.dtype) is False:
                return False
        return True

    def _bits(self, ref: TensorRef, first: int, count: int) -> Any:
        return self.builder.bits(ref.file, ref.offset + first * itemsize(ref.dtype), count, ref.dtype)


def _name(dtype: Any) -> str:
    return dtype.name if isinstance(dtype, DtypeName) else str(dtype).removeprefix("torch.")
