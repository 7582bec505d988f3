"""The ``"save"`` part of the config's section."""

from __future__ import annotations

from typing import Any

import pytest

from ucp.deepspeed.config import parse
from ucp.errors import BadArgument


def test_what_it_says() -> None:
    plain = parse({"ucp": {"enabled": True}})
    assert (plain.save.format, plain.save.background, plain.save.policy) == ("universal", True, "wait")
    assert (plain.save.timeout, plain.save.memory) == (1800.0, 16 << 30)
    given = parse({"ucp": {"save": {"async": False, "timeout": 60, "policy": "skip", "memory": 5}}})
    assert (given.save.background, given.save.timeout, given.save.policy, given.save.memory) == (False, 60.0, "skip", 5)
    assert parse({"ucp": {"save": {"format": "deepspeed"}}}).save.format == "deepspeed"


def test_programs_that_delete_right_after_a_save_have_it_synchronous() -> None:
    assert not parse({"ucp": {"enabled": True}}, save_async=False).save.background
    assert parse({"ucp": {"save": {"async": True}}}, save_async=False).save.background


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"formt": "universal"}, r"unknown key 'formt'; did you mean 'format'\?"),
        ({"format": "pickle"}, "is one of universal, deepspeed; found 'pickle'"),
        ({"policy": "hope"}, "is one of wait, skip; found 'hope'"),
        ({"async": 1}, "'async' needs true or false, found 1"),
        ({"memory": 0}, "'?memory.* needs a number of at least 1, found 0"),
        ({"memory": "much"}, "is bytes, or a size such as \"16GiB\"; found 'much'"),
        ({"memory": "2GB/s"}, "is bytes, or a size such as \"16GiB\"; found '2GB/s'"),
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


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"enable": True}, r"^\"ucp\" in the DeepSpeed config has the unknown key 'enable'; did you mean 'enabled'\?$"),
        ({"zzz": 1}, "unknown key 'zzz'; known are enabled, spec, sizes, load, save"),
        ({3: 1}, "unknown key '3'; known are enabled"),
        ({"save": {"asynch": True}}, r"^\"ucp\": {\"save\"} in the .* unknown key 'asynch'; did you mean 'async'\?$"),
        ({"save": {"keep_lst": 2, "keep_every": 5, "memory": 0}}, "did you mean 'keep_last'"),
        ({"sizes": {"a": 1, "b": True}}, "^\"ucp\": 'sizes' needs whole numbers by name, found {'a': 1, 'b': True}$"),
        ({"sizes": {3: 3}}, "needs whole numbers by name, found {3: 3}"),
        ({"sizes": [1]}, r"'sizes' needs a dict, found \[1\]"),
        ({"spec": None}, "'spec' needs a str, found None"),
        ({"load": None}, "'load' needs a dict, found None"),
        ({"load": {"allow_missing": "a"}}, "^\"ucp\": {\"load\"}: 'allow_missing' needs a list, found 'a'$"),
        ({"load": {"allow_unused": ["a", 3]}}, r"'allow_unused' needs a list of name patterns, found \['a', 3\]"),
        ({"load": {"prove": 1}}, '^"ucp": {"load": {"prove"}} is true, false, "full" or "always"; found 1$'),
        ({"load": {"prove": []}}, r"found \[\]$"),
        ({"save": {"keep_last": None}}, "'keep_last' needs a number of at least 1, found None"),
        ({"save": {"timeout": float("nan")}}, "needs seconds above 0, found nan"),
        ({"save": {"timeout": "60"}}, "'timeout' needs a float, found '60'"),
        ([], r"needs an object, found \[\]"),
    ],
)
def test_mistakes_in_the_whole_section(section: Any, text: str) -> None:
    with pytest.raises(BadArgument, match=text) as caught:
        parse({"ucp": section})
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert "pydantic" not in str(caught.value)


def test_what_is_left_out_is_as_it_was_without_a_section() -> None:
    assert parse({}) == parse({"ucp": {}}) == parse({"ucp": {"load": {}, "save": {}}})


def test_memory_may_be_a_size_in_words() -> None:
    for said, meant in (("16GiB", 16 << 30), ("500MB", 500_000_000), (8589934592, 8 << 30)):
        assert parse({"ucp": {"save": {"memory": said}}}).save.memory == meant
