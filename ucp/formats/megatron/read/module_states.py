"""What a folder's modules keep by themselves: told of, and never made anew."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ucp.errors import UcpError
from ucp.formats.megatron import keys, scales
from ucp.storage.files import Files
from ucp.storage.torch_pt.values import TensorRef


def told(objects: Mapping[str, Any], files: Files) -> tuple[str, tuple[str, ...]]:
    """A line about the modules that use FP8, '' where none does; and a sentence for each state that is not understood,
    which is kept as it is."""
    found: list[scales.ModuleScales] = []
    odd: list[str] = []
    for key, value in objects.items():
        if keys.module_state(key) is None:
            continue
        raw = content(value, files)
        if raw is None or not scales.may_be_pickle(raw):
            continue
        try:
            one = scales.of(raw, key)
        except UcpError as error:
            odd.append(f"what '{key}' holds is kept, and not understood: {error.message}")
            continue
        if one is not None:
            found.append(one)
    return scales.summary(found), tuple(odd)


@dataclass
class RanksStates:
    """Those of the older layout, where every rank has its own: of ranks that hold the same module the first's are kept,
    as Megatron's newer layout has them.

    objects: by the keys that a folder without stacking has.
    """

    files: Files
    objects: dict[str, Any] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)
    together: list[str] = field(default_factory=list)

    def add(self, own: str, name: str | None, value: Any) -> None:
        """own: the rank's name of it. name: the whole model's, None for that of several experts."""
        if value is None or content(value, self.files) == b"":
            return
        if name is None:
            self.together.append(own)
            return
        key = f"{name.replace('.local_experts.', '.experts.')}/shard_0_1"
        kept = self.objects.setdefault(key, value)
        if kept is not value and not scales.same(content(kept, self.files), content(value, self.files), key):
            self.other.append(name)

    def apart(self) -> tuple[str, ...]:
        """A sentence for what is lost."""
        out = []
        if self.other:
            out.append(
                f"ranks of '{self.other[0]}' and {len(self.other) - 1} others keep states of their own (as FP8 scales "
                "with reduce_amax=False); the first rank's are kept"
            )
        if self.together:
            out.append(
                f"'{self.together[0]}' is one state of all experts of a rank, which is left out; load the checkpoint "
                "with Megatron and save it with --ckpt-format torch_dist"
            )
        return tuple(out)


def content(value: Any, files: Files) -> bytes | None:
    """A module's state as bytes, which lie in a file or among the objects; None for one of another kind."""
    if isinstance(value, io.BytesIO):
        return value.getvalue()
    if isinstance(value, TensorRef) and value.dtype == "uint8" and value.is_contiguous:
        raw = bytearray(value.numel)
        if raw:
            files.read_into(value.file, value.offset, raw)
        return bytes(raw)
    return None
