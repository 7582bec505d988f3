"""The ``"save"`` part of the config's section."""

from __future__ import annotations

from typing import Any

import pytest

from ucp.deepspeed.config import parse
from ucp.errors import BadArgument


def test_what_it_says() -> None:
    plain = parse({"ucp": {"enabled": True}})
    assert (plain.save_format, plain.save_async, plain.save_policy) == ("universal", True, "wait")
    assert (plain.save_timeout, plain.save_memory) == (1800.0, 16 << 30)
    given = parse({"ucp": {"save": {"async": False, "timeout": 60, "policy": "skip", "memory": 5}}})
    assert (given.save_async, given.save_timeout, given.save_policy, given.save_memory) == (False, 60.0, "skip", 5)
    assert parse({"ucp": {"save": {"format": "deepspeed"}}}).save_format == "deepspeed"


def test_programs_that_delete_right_after_a_save_have_it_synchronous() -> None:
    assert not parse({"ucp": {"enabled": True}}, save_async=False).save_async
    assert parse({"ucp": {"save": {"async": True}}}, save_async=False).save_async


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"formt": "universal"}, r"unknown key 'formt'; did you mean 'format'\?"),
        ({"format": "pickle"}, "is one of universal, deepspeed; found 'pickle'"),
        ({"policy": "hope"}, "is one of wait, skip; found 'hope'"),
        ({"async": 1}, "'async' needs a bool, found 1"),
        ({"memory": 0}, "'?memory.* needs a number of at least 1, found 0"),
        ({"keep_last": 0}, "'?keep_last.* needs a number of at least 1, found 0"),
        ({"keep_last": True}, "needs a number of at least 1, found True"),
        ({"keep_every": 5}, 'needs "keep_last" beside it'),
        ({"format": "deepspeed", "keep_last": 5}, '"keep_last".* is for "format": "universal"'),
        ({"format": "deepspeed", "async": True}, '"async".* is for "format": "universal"'),
        ({"timeout": 0}, "needs seconds above 0, found 0"),
        ({"timeout": True}, "'timeout' needs a float, found True"),
    ],
)
def test_mistakes(section: dict[str, Any], text: str) -> None:
    with pytest.raises(BadArgument, match=text):
        parse({"ucp": {"save": section}})
