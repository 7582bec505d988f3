"""The objects beside a checkpoint's tensors, for a live run: the places they have here, and whether they are safe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog
from ucp.errors import DamagedCheckpoint, UnsafePickle
from ucp.formats.megatron import keys, scales
from ucp.formats.megatron.read.common import EXTRA


@dataclass(frozen=True)
class SavedObjects:
    """By their keys. states: those of modules by the modules' own names, whether layers are stacked or not."""

    by_key: Mapping[str, Any]
    states: Mapping[str, Any]

    @classmethod
    def of(cls, catalog: Catalog) -> SavedObjects:
        found = _found(catalog)
        return cls(found, {name: value for key, value in found.items() if (name := keys.module_state(key)) is not None})

    def __contains__(self, key: str) -> bool:
        return key in self.by_key or keys.module_state(key) in self.states

    def get(self, key: str, default: Any) -> Any:
        """The object with this key, or of the module that the key is about."""
        if key in self.by_key:
            return self.by_key[key]
        name = keys.module_state(key)
        return default if name is None else self.states.get(name, default)


def check(folder: Path, catalog: Catalog) -> None:
    """Transformer Engine unpickles what its modules get, whatever it names. So that is read by the allow-list first.

    Raises UnsafePickle for a class that is not on it, DamagedCheckpoint for a pickle that is not read.
    """
    for key, value in _found(catalog).items():
        raw = scales.content(value) if keys.module_state(key) is not None else None
        if raw is None:
            continue
        try:
            scales.check(raw, f"{folder}: '{key}'")
        except UnsafePickle as error:
            raise UnsafePickle(
                f"{error}; its module would unpickle it. If you trust whoever wrote the file, "
                "load_checkpoint(..., trust_client_state=True) hands it over"
            ) from error
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(f"{error}; its module would unpickle it") from error


def _found(catalog: Catalog) -> Mapping[str, Any]:
    found = catalog.training_state.extra.get(EXTRA, {}).get("objects", {})
    return found if isinstance(found, Mapping) else {}
