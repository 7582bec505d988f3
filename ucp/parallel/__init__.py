"""Layouts of a training run, and which part of every parameter each rank holds under them."""
