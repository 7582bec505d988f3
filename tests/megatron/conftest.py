"""Folders that Megatron-Core wrote."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")

from tests.engines.megatron.fixtures import truths, written

__all__ = ["truths", "written"]
