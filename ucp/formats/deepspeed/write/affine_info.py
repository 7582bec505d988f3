"""What a tensor-parallel checkpoint says of its own cuts: ``universal_checkpoint_info``, with affine maps.

By it a reader needs no spec, and DeepSpeed's converter (``checkpoint/ds_to_universal.py: merge_tp_slices``) puts the
parts together. The lists of names are written where they say a cut, too: releases that know no maps go by them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ucp.catalog import Catalog
from ucp.formats.deepspeed.write.tp_slices import padded_widths, without_padding
from ucp.formats.shared import affine_maps
from ucp.formats.shared.renaming import best_names
from ucp.geometry import Blocks, Shape, whole
from ucp.parallel.mesh import Layout
from ucp.spec.bound import Bound
from ucp.spec.evaluate import Cutting, shape_of, shard
from ucp.spec.placement import expression_of

Shards = Sequence[tuple[Shape, Blocks]]


def said(
    source: Catalog,
    bound: Bound,
    layout: Layout,
    autotp: bool,
    left_out: Callable[[str], object] = lambda name: False,
) -> dict[str, Any]:
    """The info for a checkpoint whose ranks' parts are those of `tp_slices.sliced`; raises what that raises."""
    catalog = best_names(source, bound, lambda name: bound.find(name) is not None)
    maps: dict[str, Any] = {}
    lists: dict[str, list[str]] = {
        "tp_replicated_parameter_patterns": [],
        "parameter_with_row_parallelism_patterns": [],
        "parameter_to_average_patterns": [],
        "vocabulary_parameter_patterns": [],
    }
    vocabulary: dict[str, int] = {}
    for name, info in without_padding(catalog).parameters.items():
        expression = None if left_out(name) else expression_of(bound, name, info.shape, info.kind == "buffer")
        if expression is None:
            continue
        if expression.average:
            lists["parameter_to_average_patterns"].append(affine_maps.pattern(name))
            continue
        widths = padded_widths(catalog, expression, name)
        cutting = Cutting({"tp": layout.tp}, "balanced" if autotp else "exact", padded=widths)
        found = [shard(expression, bound.sizes, cutting, {"tp": r}, keep_padding=True) for r in range(layout.tp)]
        shards = [(mine.shape, mine.blocks) for mine in found]
        shape = shape_of(expression, bound.sizes, widths)
        maps[name] = affine_maps.entry(shape, shards)
        if shape != info.shape and shape[1:] == info.shape[1:]:
            lists["vocabulary_parameter_patterns"].append(affine_maps.pattern(name))
            vocabulary["original_vocab_size"] = info.shape[0]
        if listed := _list(shape, shards):
            lists[listed].append(affine_maps.pattern(name))
    return affine_maps.info(maps, **lists, **vocabulary)


def covers(info: Mapping[str, Any], catalog: Catalog) -> bool:
    """Whether the info tells of all parameters: of one that it leaves out a reader would take dimension 0 as cut."""
    told = {*info["affine_map"]["params"], *info["parameter_to_average_patterns"]}
    return all(own.kind == "buffer" or affine_maps.pattern(n) in told for n, own in catalog.parameters.items())


def _list(shape: Shape, shards: Shards) -> str | None:
    """The list of names that says the same cut. None where there is none, and where none is needed (dimension 0)."""
    if all(mine == shape and len(blocks) == len(whole(shape)) for mine, blocks in shards):
        return "tp_replicated_parameter_patterns"
    in_rows = len(shape) > 1 and all(mine[0] == shape[0] and mine[2:] == shape[2:] for mine, _ in shards)
    return "parameter_with_row_parallelism_patterns" if in_rows and all(len(b) <= 1 for _, b in shards) else None
