"""What Transformer Engine's modules keep beside their tensors for FP8: the recipe, scales, and histories of maxima.

A module's `_extra_state` is a pickle in a tensor of bytes, an empty one where FP8 is off; up to release 1 it was a
stream of ``torch.save`` (transformer_engine/pytorch/module/base.py: ``get_extra_state``). With delayed scaling it has
``scale_fwd`` (one number for each tensor that is quantised), ``amax_history_fwd`` (steps × these), the same two with
``_bwd``, in release 1 ``scale_inv_fwd`` and ``_bwd``; other recipes scale each tensor anew and keep nothing.

Megatron saves one object for a layer's module, whatever the tensor parallelism, since scales are made of maxima that
these ranks share. So the bytes go wherever the layer goes, at any tp, pp, ep and dp; they are never made anew.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ucp.errors import DamagedCheckpoint, UcpError
from ucp.printable import line, short
from ucp.storage.torch_pt import inner
from ucp.storage.torch_pt.skipped import Skipped
from ucp.storage.torch_pt.values import Standin, TensorRef
from ucp.units import counted

# Release 1 knew one recipe, and did not save its name.
_DELAYED = "DelayedScaling"
_FORMATS = {(448, 448): "E4M3", (448, 57344): "HYBRID", (57344, 57344): "E5M2", (6, 6): "E2M1"}


@dataclass(frozen=True)
class ModuleScales:
    """What one module keeps for FP8.

    recipe: the name of its class. form: of the numbers, 'HYBRID' or another; None if it is not said. tensors: by name
    (``scale_fwd``, ...) the shape. history: steps that maxima are kept of; None where there are none. shared: whether
    the ranks of a layer have the same. unread: classes in it that are not read, each with its module.
    """

    recipe: str
    form: str | None
    tensors: Mapping[str, tuple[int, ...]]
    history: int | None
    shared: bool
    unread: tuple[str, ...] = ()


def of(raw: bytes, name: str) -> ModuleScales | None:
    """What these bytes say; None where they are of no module that uses FP8. name: what errors call them.

    Raises DamagedCheckpoint for bytes that are cut short, or whose scales and histories are of different numbers of
    tensors.
    """
    if not raw:
        return None
    skipped: Skipped = set()
    state = inner.load(raw, name, skipped).graph
    unread = tuple(sorted(f"{module}.{kind}" for module, kind in skipped))
    if not isinstance(state, Mapping):
        return None if state is None and not unread else ModuleScales("none", None, {}, None, True, unread)
    tensors = {str(key): ref.shape for key, ref in state.items() if isinstance(ref, TensorRef)}
    for way in ("fwd", "bwd"):
        scale, maxima = tensors.get(f"scale_{way}"), tensors.get(f"amax_history_{way}")
        if (scale is None) != (maxima is None) or (scale and maxima and maxima[1:] != scale):
            raise DamagedCheckpoint(
                f"scale_{way} has shape {_shape(scale)}, and amax_history_{way} {_shape(maxima)}; there should be one "
                "column of maxima for each scale",
                file=name,
            )
    recipe = state.get("recipe")
    maxima = tensors.get("amax_history_fwd")
    history = None if maxima is None else maxima[0]
    if not isinstance(recipe, Standin):
        return ModuleScales(_DELAYED if recipe is None and tensors else "unknown", None, tensors, history, True, unread)
    shared = bool(recipe.state.get("reduce_amax", True))
    return ModuleScales(recipe.class_name, _form(recipe.state.get("fp8_format")), tensors, history, shared, unread)


def check(raw: bytes, name: str) -> None:
    """Make sure that no class is in it that Transformer Engine would import and run when it gets these bytes.

    Raises UnsafePickle for one, DamagedCheckpoint for what is not read.
    """
    if may_be_pickle(raw):
        inner.load(raw, name)


def same(one: bytes | None, other: bytes | None, name: str) -> bool:
    """Whether two ranks' bytes hold the same."""
    if one == other:
        return True
    try:
        return bool(one and other and inner.load(one, name).plain() == inner.load(other, name).plain())
    except UcpError:
        return False


def may_be_pickle(raw: bytes) -> bool:
    """Whether Python would begin to interpret these bytes as a pickle, or torch as an archive."""
    import pickletools

    return bool(raw) and chr(raw[0]) in {operation.code for operation in pickletools.opcodes}


def content(value: Any) -> bytes | None:
    """The bytes of a module's state, as it is where tensors are real; None for one that is not bytes."""
    if isinstance(value, io.BytesIO):
        return value.getvalue()
    if value is None or isinstance(value, TensorRef):
        return None
    if str(getattr(value, "dtype", "")) == "torch.uint8":
        return bytes(value.cpu().numpy().tobytes())
    return None


def summary(found: Iterable[ModuleScales]) -> str:
    """All modules' in a line."""
    counts: dict[str, int] = {}
    notes: dict[str, None] = {}
    for one in found:
        form = "" if one.form is None else f" ({one.form})"
        kept = "no scales" if not one.tensors else "scales"
        kept += "" if one.history is None else f" and maxima of {one.history} steps"
        text = f"{one.recipe}{form}, {kept}"
        counts[text] = counts.get(text, 0) + 1
        if not one.shared:
            notes["each rank had scales of its own (reduce_amax=False), and the file has one rank's"] = None
        if one.unread:
            notes[f"not read: {', '.join(one.unread)}"] = None
    parts = [f"{text}: {counted(count, 'module')}" for text, count in counts.items()]
    return line("; ".join([*parts, *notes]))


def _form(value: Any) -> str | None:
    """A member of its enumeration by its two largest numbers, or by its name."""
    found = value.class_args[0] if isinstance(value, Standin) and value.class_args else None
    if isinstance(found, Standin):
        found = found.class_args
    if isinstance(found, tuple) and len(found) == 2:
        return _FORMATS.get(tuple(map(_whole, found)), short(found))
    return None


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
