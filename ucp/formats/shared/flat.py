"""What FSDP1 keeps flat: all parameters of a unit as one vector, of which each rank has a part."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ucp.errors import Unsupported

_FLAT = frozenset(("flat_param", "_flat_param"))


def refuse(path: Path, names: Iterable[str]) -> None:
    """Raise Unsupported if one of the names is a flat parameter's: no file says where in it which parameter lies."""
    flat = next((name for name in names if not _FLAT.isdisjoint(name.split("."))), None)
    if flat is not None:
        raise Unsupported(
            f"{path}: '{flat}' is FSDP1's flat parameter (LOCAL_STATE_DICT, or a flattened optimizer's), and no file "
            "says which parameters lie where in it; save with SHARDED_STATE_DICT or FULL_STATE_DICT"
        )
