"""Operations in the words that people read; sources are counted from 1, as on the command line."""

from __future__ import annotations

from collections.abc import Iterable

from ucp.merging.operations import Combination, Copied, Differences, Drawn, Largest, Lerp, Linear, Redrawn, Slerp


def told(operation: Combination) -> str:
    """``(1 × source 1 + 1 × source 2) / the sum of the weights``. Two operations that differ read differently."""
    match operation:
        case Copied(source):
            return f"{_name(source)} as it is"
        case Linear(terms, normalised):
            return _over(_sum((weight, _name(source)) for source, weight in terms), terms, normalised)
        case Lerp(base, other, t):
            return f"{_name(base)} + {t!r} × ({_name(other)} - {_name(base)})"
        case Slerp(a, b, t):
            return f"from {_name(a)} to {_name(b)} along the arc (slerp), {t!r} of the way"
        case Redrawn(source, seed):
            return f"drawn anew with the mean and deviation of {_name(source)}, seed {seed}"
        case Differences():
            return _differences(operation)
        case _:
            return repr(operation)


def _differences(one: Differences) -> str:
    left = ""
    match one.selector:
        case Largest(density):
            left = f", of each difference the largest {density!r} of its elements"
        case Drawn(density, seed):
            left = f", of each difference {density!r} of its elements, drawn with seed {seed}, divided by that"
        case None:
            pass
        case other:
            left = f", of each difference what {other!r} leaves"
    masks = [f" × mask in {_name(mask)}" for mask in one.masks] or [""] * len(one.terms)
    parts = (
        (weight, f"({_name(source)} - {_name(one.base)}){mask}")
        for (source, weight), mask in zip(one.terms, masks, strict=True)
    )
    scale = "" if one.scale == 1 else f"{one.scale!r} × "
    elected = ", only those with the sign of their sum, as a mean (TIES)" if one.elected else ""
    return f"{_name(one.base)} + {scale}{_over(_sum(parts), one.terms, one.normalised)}{left}{elected}"


def _name(source: int) -> str:
    return f"source {source + 1}"


def _sum(parts: Iterable[tuple[float, str]]) -> str:
    return " + ".join(f"{f'{weight!r}'.removesuffix('.0')} × {what}" for weight, what in parts)


def _over(text: str, terms: tuple[tuple[int, float], ...], normalised: bool) -> str:
    return f"({text}) / the sum of the weights" if normalised else f"({text})" if len(terms) > 1 else text
