"""Erasure coding, against numpy and against another library's field."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reedsolo

from ucp.memory import coding
from ucp.memory.stripes import Stripes


def pieces(count: int, size: int = 192) -> list[coding.Bytes]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, size, dtype=np.uint8) for _ in range(count)]


def coded(k: int, m: int, data: list[coding.Bytes]) -> list[coding.Bytes]:
    out = [np.empty_like(data[0]) for _ in range(m)]
    for row in range(m):
        coding.parity(k, m, row, data, out[row])
    return out


def test_one_parity_is_the_sum_without_carry() -> None:
    data = pieces(3)
    assert coded(3, 1, data)[0].tolist() == [a ^ b ^ c for a, b, c in zip(*map(list, data), strict=True)]


@pytest.mark.parametrize(("k", "m"), [(2, 2), (5, 3)])
def test_more_parities_are_what_another_library_multiplies(k: int, m: int) -> None:
    """A Cauchy matrix over the field of 0x11d: the inverse of row xor column."""
    reedsolo.init_tables(0x11D)
    data = pieces(k, 64)
    for row, parity in enumerate(coded(k, m, data)):
        for at in range(0, 64, 9):
            wanted = 0
            for column in range(k):
                coefficient = reedsolo.gf_inverse((k + row) ^ column)
                wanted ^= reedsolo.gf_mul(coefficient, int(data[column][at]))
            assert parity[at] == wanted


@pytest.mark.parametrize(("k", "m"), [(1, 1), (3, 1), (1, 2), (2, 2), (4, 3)])
def test_any_k_pieces_give_the_others(k: int, m: int) -> None:
    data = pieces(k)
    whole = dict(enumerate([*data, *coded(k, m, data)]))
    for lost in itertools.combinations(range(k + m), m):
        have = {number: piece for number, piece in whole.items() if number not in lost}
        for wanted in set(lost) & set(range(k)):
            assert (coding.restored(k, m, have, wanted) == data[wanted]).all()


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 1), (4, 1), (4, 2), (7, 3)])
def test_every_block_is_in_one_stripe_and_no_node_is_in_one_twice(n: int, m: int) -> None:
    stripes = Stripes(tuple("abcdefg"[:n]), m, 1000)
    for stripe in range(n):
        assert sorted(stripes.holders(stripe) + stripes.givers(stripe)) == list(stripes.nodes)
    for node in stripes.nodes:
        assert [stripes.start(node, s) for s in stripes.given(node)] == [b * stripes.block for b in range(n - m)]
        assert [stripes.holders(s)[row] for row, s in enumerate(stripes.held(node))] == [node] * m
    assert 1000 <= stripes.block * (n - m) < 1000 + 64 * (n - m)
