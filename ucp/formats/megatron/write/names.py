"""A catalog under Megatron's names."""

from __future__ import annotations

import re

from ucp.catalog import Catalog
from ucp.errors import Unsupported
from ucp.formats.megatron import NAME
from ucp.formats.nouns import WriteRequest
from ucp.formats.shared.renaming import rename
from ucp.storage import configs

_OWN = re.compile(r"(embedding|decoder|encoder|output_layer|mtp)\..+")


def megatron(catalog: Catalog, request: WriteRequest) -> Catalog:
    """The catalog as it is where its names are Megatron's, else by the lines of the model's spec.

    Raises Unsupported where nothing tells the spec, or it has none for Megatron, and what renaming raises.
    """
    if all(_OWN.fullmatch(name) for name in catalog.parameters):
        return catalog
    bound = request.choice.bound(configs.of_model(request.source))
    if bound is None:
        odd = next(name for name in catalog.parameters if not _OWN.fullmatch(name))
        raise Unsupported(
            f"'{odd}' is no name of Megatron's, and nothing says which model it is; give --model-config or --spec, "
            "so that its spec gives Megatron's names"
        )
    if NAME not in bound.spec.names:
        raise Unsupported(f"{bound.spec.file}: has no names of Megatron's (names: {NAME}:)")
    return rename(catalog, bound, NAME, to_framework=True)
