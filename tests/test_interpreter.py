"""How Python runs for a while, and that it runs as before afterwards."""

from __future__ import annotations

import gc
import sys

import pytest

from ucp import limits
from ucp.interpreter import no_collections, quick_turns


def test_threads_take_turns_sooner_for_a_while() -> None:
    before = sys.getswitchinterval()
    with pytest.raises(KeyError), quick_turns():  # noqa: PT012
        assert sys.getswitchinterval() == pytest.approx(limits.SWITCH_SECONDS, abs=2e-6)
        raise KeyError
    assert sys.getswitchinterval() == before


def test_a_program_that_is_quicker_already_stays_so() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(limits.SWITCH_SECONDS / 2)
    try:
        with quick_turns():
            assert sys.getswitchinterval() == pytest.approx(limits.SWITCH_SECONDS / 2, abs=2e-6)
    finally:
        sys.setswitchinterval(before)


def test_no_collections_for_a_while() -> None:
    assert gc.isenabled()
    with no_collections():
        assert not gc.isenabled()
    assert gc.isenabled()
