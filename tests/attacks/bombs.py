"""Small values that would take a reader for ever, or all of its memory, if believed; as operations of pickles."""

from __future__ import annotations

from tests.attacks.plant import operations

LEVELS = 40


def shared(levels: int = LEVELS) -> bytes:
    """A list of a list twice, over and over: ``2 ** levels`` leaves to whoever counts each place."""
    # Each level: the one below stays in the memo and is appended twice to a new list.
    out = b"](K\x01e" + b"q\x01"
    for _ in range(levels):
        out += b"0](h\x01h\x01eq\x01"
    return out


def nested(depth: int) -> bytes:
    return b"]" * (depth + 1) + b"a" * depth


def a_range(stop: int) -> bytes:
    return b"cbuiltins\nrange\n" + operations(stop) + b"\x85R"


def empty_array(elements: int) -> bytes:
    """An array of elements of no bytes."""
    nothing = b"c_codecs\nencode\nX\x00\x00\x00\x00\x85R"
    dtype = b"cnumpy\ndtype\nX\x02\x00\x00\x00S0\x89\x88\x87R"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + nothing + b"\x87R"
    return made + b"(K\x01" + operations(elements) + b"\x85" + dtype + b"\x89" + nothing + b"tb"


def copies(count: int, size: int = 1 << 20) -> bytes:
    """One text, of which calls make so many copies."""
    text = b"X" + size.to_bytes(4, "little") + b"t" * size + b"q\x01"
    return b"](" + b"c_codecs\nencode\nq\x02" + text + b"\x85R" + b"h\x02h\x01\x85R" * count + b"e"


BOMBS: dict[str, bytes] = {
    "shared lists": shared(),
    "a dict of shared lists": b"}X\x01\x00\x00\x00a" + shared() + b"sX\x01\x00\x00\x00b" + shared() + b"s",
    "nested beyond recursion": nested(5000),
    "a list in itself": b"]q\x01h\x01a",
    "a dict in itself": b"}q\x01X\x01\x00\x00\x00ah\x01s",
    "50,000 digits": operations(10**50_000),
    "a long range": a_range(1 << 30),
    "a huge range": a_range(1 << 60),
    "an array of nothing": empty_array(1 << 36),
    "a size of a range": b"ctorch\nSize\n" + a_range(1 << 30) + b"\x85R",
    "sets and sets": b"](" + b"\x8f" * 3_000_000 + b"e",
    "lists in the memo": (b"]\x94" * 3_000_000),
    "copies of a text": copies(3000),
    "a billion": operations(10**9),
    "a negative billion": operations(-(10**9)),
    "a list of a billion": operations([10**9]),
    "infinity": operations(float("inf")),
    "nothing": operations(None),
    "text": operations("x" * 1000),
    "a dict of a billion": operations({"a": 10**9, 0: 10**9}),
}
