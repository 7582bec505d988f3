"""Specs: how a model family's parameters may be cut over tensor, pipeline and expert parallel ranks.

The reference of the language is the README beside the catalogue of specs. From a spec to the elements that a rank
holds:

    spec = catalogue.find("llama")                       # language: the file, every word with its place
    bound = bind(spec, config)                           # bound: sizes from config.json, conditions decided
    found = bound.find("model.norm.weight")              # its expression, or None
    cutting = Cutting({"tp": 2}, rule="balanced")        # to write shards: a rule, or explicit widths
    cuttings = solve_cuts(observed, bound.sizes, mesh)   # to read shards: from the shapes of all of them
    shard(found.expression, bound.sizes, cutting, {"tp": 1}).blocks
    moves(bound, "huggingface", names, to_framework=True)  # names: what another framework calls and makes of them

The blocks serve both directions. As the source of `ucp.geometry.intersect` they put shards together; as its target they
cut them. Their buffer is the shard's own row-major order, so a ZeRO range of the shard is just a range of that buffer.
"""
