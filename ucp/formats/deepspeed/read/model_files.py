"""What DeepSpeed's model files say: weights and buffers, names that are tied, counters, the caller's own state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.deepspeed.read.folder import FOLDING, OWN_KEYS
from ucp.geometry import Shape
from ucp.storage.torch_pt.values import TensorRef


@dataclass(frozen=True)
class ModelFile:
    """One ``*model_states.pt``, read without its tensors."""

    path: Path
    raw: Mapping[str, Any]

    def need(self, key: str) -> Any:
        if key not in self.raw:
            raise DamagedCheckpoint(f"{self.path}: the key '{key}' is missing; DeepSpeed writes it in every model file")
        return self.raw[key]

    @property
    def module(self) -> Mapping[str, TensorRef]:
        """Names to tensors. Entries that are not tensors (a module's extra state) are refused by name."""
        found = self.need("module")
        if not isinstance(found, Mapping):
            raise DamagedCheckpoint(f"{self.path}: 'module' is a {type(found).__name__}, not a state dict")
        for name, value in found.items():
            if not isinstance(value, TensorRef):
                raise Unsupported(f"{self.path}: the module's '{name}' is a {type(value).__name__}, not a tensor")
        return found

    @property
    def buffers(self) -> list[str]:
        """Names of the persistent buffers that the file holds."""
        module = self.module
        return [n for n in self.raw.get("buffer_names") or () if n in module]

    @property
    def param_shapes(self) -> list[dict[str, Shape]]:
        """One dict per flat group (a param group, or a subgroup at stage 3), in the order of its flat buffer."""
        found = self.raw.get("param_shapes")
        if not isinstance(found, (list, tuple)) or not all(isinstance(g, Mapping) for g in found):
            raise DamagedCheckpoint(
                f"{self.path}: 'param_shapes' is missing or no list of dicts, so the flat buffers cannot be read"
            )
        return [{str(n): tuple(int(k) for k in s) for n, s in g.items()} for g in found]

    @property
    def frozen_shapes(self) -> dict[str, Shape]:
        found = self.raw.get("frozen_param_shapes") or {}
        return {str(n): tuple(int(k) for k in s) for n, s in found.items()}

    @property
    def shared(self) -> dict[str, str]:
        """Alias -> owner, followed to the last owner."""
        direct = {str(a): str(o) for a, o in (self.raw.get("shared_params") or {}).items()}
        out = {}
        for alias, owner in direct.items():
            seen = {alias}
            while owner in direct and owner not in seen:
                seen.add(owner)
                owner = direct[owner]
            out[alias] = owner
        return out

    def integer(self, key: str) -> int | None:
        value = self.raw.get(key)
        return None if value is None else int(value)

    @property
    def client_state(self) -> dict[str, Any]:
        own = OWN_KEYS if self.raw.get("num_experts") is None else OWN_KEYS | {FOLDING}
        return {k: v for k, v in self.raw.items() if k not in own}

    @property
    def config(self) -> dict[str, Any]:
        found = self.raw.get("ds_config")
        return dict(found) if isinstance(found, Mapping) else {}


def tied_by_storage(module: Mapping[str, TensorRef]) -> dict[str, str]:
    """Alias -> first name, for entries that are the same elements of the same storage."""
    first: dict[tuple[Any, ...], str] = {}
    out: dict[str, str] = {}
    for name, ref in module.items():
        if not ref.numel:
            continue
        key = (ref.file, ref.storage, ref.offset, ref.shape, ref.strides, ref.dtype)
        if key in first:
            out[name] = first[key]
        else:
            first[key] = name
    return out
