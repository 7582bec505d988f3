"""Folders that Megatron-Core wrote."""

from __future__ import annotations

from tests.engines.megatron.fixtures import truths, written
from tests.optional import skip_without

skip_without("megatron.core")

__all__ = ["truths", "written"]
