"""The logical digests of a live state dict: `ucp.digest`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ucp.loading.read import reading_threads
from ucp.logical.listing import Digests
from ucp.saving.digest import digest_source
from ucp.torchdist.source import make_source
from ucp.torchdist.state_dicts import unwrap


def digest(state_dict: Mapping[str, Any]) -> Digests:
    """Digest every tensor that `ucp.save` would save of this state dict. Collective.

    The digests are those that ``ucp digest`` prints for a checkpoint of it. They are the same in every layout (dp, tp,
    FSDP2, one process), on the host and on a device. Each rank reads its own memory once, where it lies. Nothing is
    gathered.

    Parameters
    ----------
    state_dict
        As for `ucp.save`.

    Returns
    -------
    Digests
        ``tensors`` has a digest for each name and state, and ``all`` is one for them together. Each digest is 32
        hexadecimal digits.

    Raises
    ------
    Unsupported
        On every rank: a value cannot be kept exactly.
    Mismatch
        On every rank: ranks hold different values of what should be the same, or no rank holds some part of a tensor.
    SaveFailed
        On every rank: the ranks' state dicts contradict each other.
    """
    return digest_source(make_source(unwrap(state_dict)), threads=reading_threads())
