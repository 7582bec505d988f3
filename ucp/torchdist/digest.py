"""The logical digests of a state dict, now: `ucp.digest`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ucp.loading.read import reading_threads
from ucp.logical.listing import Digests
from ucp.saving.digest import digest_source
from ucp.torchdist.source import make_source
from ucp.torchdist.state_dicts import unwrap


def digest(state_dict: Mapping[str, Any]) -> Digests:
    """The digest of every tensor that `ucp.save` would save of this state dict, and ``.all`` of them together.

    Equal to those that ``ucp digest`` prints of a checkpoint of it, in every layout: dp, tp, FSDP2, one process, on
    the host or a device. Each rank reads its own memory once, where it is; nothing is gathered. Collective.

    Parameters
    ----------
    state_dict
        as for `ucp.save`.

    Returns
    -------
    Digests
        ``tensors``, by name and state, and ``all``: 32 hexadecimal digits.

    Raises
    ------
    Mismatch
        on every rank: ranks hold different values of what should be the same, or a part of a tensor nowhere.
    """
    return digest_source(make_source(unwrap(state_dict)), threads=reading_threads())
