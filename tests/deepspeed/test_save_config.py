"""The ``"save"`` part of the config's section."""

from __future__ import annotations

from typing import Any

import pytest

from ucp.deepspeed.config import parse
from ucp.errors import BadArgument


def test_what_it_says() -> None:
    plain = parse({"ucp": {"enabled": True}})
    assert (plain.save_format, plain.save_async, plain.save_timeout) == ("deepspeed", False, 1800.0)
    given = parse({"ucp": {"save": {"format": "universal", "async": True, "timeout": 60}}})
    assert (given.save_format, given.save_async, given.save_timeout) == ("universal", True, 60.0)


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"formt": "universal"}, r"unknown key 'formt'; did you mean 'format'\?"),
        ({"format": "pickle"}, "is one of universal, deepspeed; found 'pickle'"),
        ({"format": "universal", "async": 1}, "'async' needs a bool, found 1"),
        ({"format": "universal", "keep_last": 0}, "'?keep_last.* needs a number of at least 1, found 0"),
        ({"format": "universal", "keep_last": True}, "needs a number of at least 1, found True"),
        ({"format": "universal", "keep_every": 5}, 'needs "keep_last" beside it'),
        ({"keep_last": 5}, 'needs "format": "universal" beside it'),
        ({"async": True}, 'needs "format": "universal" beside it'),
        ({"format": "universal", "timeout": 0}, "needs seconds above 0, found 0"),
        ({"format": "universal", "timeout": True}, "'timeout' needs a float, found True"),
    ],
)
def test_mistakes(section: dict[str, Any], text: str) -> None:
    with pytest.raises(BadArgument, match=text):
        parse({"ucp": {"save": section}})
