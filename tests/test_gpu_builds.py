"""The list of GPU architectures that operators are built for."""

from __future__ import annotations

import pytest

from scripts.gpu_builds import ARCHITECTURES, plain_architectures


@pytest.mark.parametrize(
    ("given", "set_to"),
    [("9.0a", "9.0"), ("8.0;9.0a", "8.0 9.0"), ("10.0f 9.0", "10.0 9.0"), ("9.0", "9.0"), ("", ""), (None, None)],
)
def test_letters_are_left_out(given: str | None, set_to: str | None) -> None:
    environment = {} if given is None else {ARCHITECTURES: given}
    plain_architectures(environment)
    assert environment.get(ARCHITECTURES) == set_to
