"""Logical digests: of a tensor's elements and their places, the same whatever the layout that holds them."""
