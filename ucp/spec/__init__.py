"""Specs: how a model family's parameters may be cut over tensor, pipeline and expert parallel ranks.

`language` reads a spec, `axes` the expressions in it, `meaning` says which part of a tensor a rank's shard holds.
The language's reference is the README beside the catalogue of specs.
"""
